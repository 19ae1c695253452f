"""Merging methods as pure functions on tensors."""
