"""Many pictures by many processes: a folder that they share, and a stage for datasets."""
