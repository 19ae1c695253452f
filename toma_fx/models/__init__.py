"""Small embedded denoisers, and models by name with example inputs."""
