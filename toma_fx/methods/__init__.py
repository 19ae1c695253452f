"""Merging methods as pure functions on tensors, and their configurations."""
