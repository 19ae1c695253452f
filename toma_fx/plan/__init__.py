"""Plan: what merges, what does not, and why, as a value."""
