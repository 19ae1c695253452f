"""Capture: a model becomes one flat ATen graph that shares its parameters."""
