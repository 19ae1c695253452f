"""Transfer rules: how each op family moves the token axis. One small function per family.

A rule gets a `Call` (the node's arguments, shapes and the layouts of its operands) and returns a
`Transfer` or `Rejected`. Which dimension is which is decided by dimension bookkeeping alone, never
by comparing sizes with a token count, so that a head width equal to the token count can't mislead.
"""
