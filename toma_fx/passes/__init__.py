"""Passes that carry out a plan."""
