"""Analysis: which dimension enumerates tokens, attention kinds, residual streams."""
