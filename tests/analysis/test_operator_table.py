"""Operators that models hold (`tests/operators.py`): each has a rule, or a reason to have none."""

from __future__ import annotations

import json

import torch

import toma_fx.analysis.rules.apply  # noqa: F401  (registers the rules)
from tests.operators import TABLE
from toma_fx.analysis.rules.base import RULES

NUMBERS = "computes with sizes, in Python: no tensors"
NEW = "makes numbers that no token is in"
MOVES = "moves tokens to where the data says"
NO_RULE = {
    "aten._assert_scalar": "checks a number of Python",
    "aten.item": "gives a number to Python",
    "aten.sym_size": NUMBERS,
    "aten.sym_storage_offset": NUMBERS,
    "aten.arange": NEW,
    "aten.full": NEW,
    "aten.linspace": NEW,
    "aten.meshgrid": NEW,
    "aten.new_ones": NEW,
    "aten.new_zeros": NEW,
    "aten.ones": NEW,
    "aten.scalar_tensor": NEW,
    "aten.zeros": NEW,
    "aten.argsort": MOVES,
    "aten.gather": MOVES,
    "aten.index": MOVES,
    "aten.index_put": MOVES,
    "aten.nonzero": MOVES,
    "aten.scatter_add": MOVES,
    "aten.sort": MOVES,
    "aten.topk": MOVES,
    "aten.embedding": "looks ids up, which no model has image tokens of",
    "aten.select_scatter": "writes at one index, which is one token where models call it",
    "aten.vstack": "joins rows of experts that the data has sorted",
    "aten.adaptive_avg_pool1d": "averages along its last dimension, which holds the tokens",
    "aten.upsample_linear1d": "resamples a table of positions, before any token",
    "aten.max": "gives places besides values: those of tokens are others after merging",
    "aten.im2col": "cuts a picture into patches that overlap: a token would occur in several",
    "aten.col2im": "adds patches that overlap up to a picture",
    "aten.fft_fftn": "mixes all places of a picture",
    "aten.fft_ifftn": "mixes all places of a picture",
    "aten.fft_fftshift": "moves all places of a picture",
    "aten.fft_ifftshift": "moves all places of a picture",
    "flex_attention": "attends to blocks of keys that the data picks",
}
"""Operators without a rule, and why there is none."""
NO_RULE |= dict.fromkeys(
    ("add", "eq", "floordiv", "ge", "le", "mod", "mul", "neg", "sub", "sym_max", "sym_not"), NUMBERS
)
HANDLED = {"getitem"}
"""What the analysis follows without a rule."""


def kinds_of(target: str) -> tuple[str, bool]:
    """(name of an operator as rules have it, whether torch says that it is element-wise)."""
    space, _, rest = target.partition(".")
    if not rest:
        return target, False
    name, _, overload = rest.rpartition(".")
    op = getattr(getattr(torch.ops, space), name)
    return f"{space}.{name}", torch.Tag.pointwise in getattr(op, overload).tags


def test_each_has_a_rule_or_a_reason() -> None:
    table = json.loads(TABLE.read_text())
    kinds = dict(kinds_of(target) for target in table)
    ruled = {name for name, pointwise in kinds.items() if pointwise or name in RULES} | HANDLED
    assert not kinds.keys() - ruled - NO_RULE.keys(), "they have neither rule nor reason"
    stale = {name for name in NO_RULE if name in ruled or name not in kinds}
    assert not stale, "they have a rule by now, or no model holds them"
