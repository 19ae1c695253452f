"""Private names of torch, diffusers, accelerate and peft: one function each, used here alone.

None of them is promised to stay. A name that is gone raises `CompatError` here; a name that means
something else fails its test in `tests/test_compat.py`. Packages are imported when a function is
called.
"""
