"""Oracles that know nothing of the rules: other orders of tokens, and tokens that come in twins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tests.analysis.draws import Case, Ref
from tests.analysis.tokens_of_rows import gather_table, has_segment, reindex, weigh_keys
from toma_fx.analysis.factors import AXES, FRAMES, HEIGHT, Keys, Segment
from toma_fx.analysis.facts import Positional, Rejected, Transfer
from toma_fx.analysis.labels import Fact, Layout, layouts_of, rows_of, token_dim, tokens
from toma_fx.analysis.rules.apply import apply_rule
from toma_fx.graph.nodes import ATTENTION, SOFTMAX, op_name
from toma_fx.passes.snippets import close_factors, open_factors, place_rows

Tensors = tuple[Tensor, ...]


def substitute(value: Any, operands: Mapping[str, Any]) -> Any:
    """Arguments with values, or nodes, for the operands."""
    if isinstance(value, Ref):
        return operands[value.name]
    if isinstance(value, (list, tuple)):
        return type(value)(substitute(v, operands) for v in value)
    return value


def compute(case: Case, values: Mapping[str, Tensor], args: Any = None) -> Tensors:
    """What the call gives, as a tuple."""
    args = substitute(case.args if args is None else args, values)
    out = case.target(*args, **case.kwargs)
    return tuple(out) if isinstance(out, (list, tuple)) else (out,)


def derive(case: Case, outputs: Tensors) -> Transfer | Rejected:
    """What the rule says of the call."""
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for name, value in case.values.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = value
    node = graph.call_function(case.target, substitute(case.args, nodes), case.kwargs)
    returns = case.target._schema.returns  # type: ignore[attr-defined]
    several = len(returns) > 1 or str(returns[0].type).startswith("List")
    node.meta["val"] = outputs if several else outputs[0]
    facts: dict[str, Fact] = dict(case.layouts)
    return apply_rule(node, facts)


def result_layouts(transfer: Transfer, outputs: Tensors) -> tuple[Layout | None, ...]:
    """A layout for each output, if it has one."""
    return layouts_of(transfer.fact) if transfer.fact else (None,) * len(outputs)


def knows_rows(case: Case, target: Segment) -> bool:
    """Whether each operand that has these tokens tells all of their rows."""
    ones = torch.zeros(case.world.batch, case.world.frames, target.length, dtype=torch.long)
    try:
        for name, layout in case.layouts.items():
            if has_segment(layout, target.name):
                reindex(case.values[name], layout, target, ones)
    except AssertionError:
        return False
    return True


# -- another order --------------------------------------------------------------------------------


def check_order(
    case: Case, transfer: Transfer, target: Segment, outputs: Tensors, seed: int
) -> None:
    """The tokens of each row in an order of its own: the result has them in that order."""
    table = _order(case.world.batch, case.world.frames, target, seed)
    values = dict(case.values)
    for name, layout in case.layouts.items():
        values[name] = reindex(values[name], layout, target, table)
    for positional in _tables(transfer, target):
        operand = values[positional.operand]
        values[positional.operand] = gather_table(operand, positional, target, table)
        _check_package(operand, positional, target, table)
    expected = [
        reindex(out, layout, target, table) if layout else out
        for out, layout in zip(outputs, result_layouts(transfer, outputs), strict=True)
    ]
    _compare(case, compute(case, values), expected, "another order of tokens")


def check_fold(case: Case, transfer: Transfer, outputs: Tensors, seed: int) -> bool:
    """Pixels of a picture that become tokens, in another order; returns whether any do."""
    (layout,), ((name, sides),) = result_layouts(transfer, outputs), case.layouts.items()
    dim = token_dim(layout)
    if layout is None or dim is None:
        return False
    (segment,) = layout[dim].tokens.segments  # type: ignore[union-attr]
    axes = AXES[-len(segment.grid or ()) :]
    dims: list[int] = []
    for axis in axes:  # of the digits of a side, the first
        strides = {i: a.stride for i, x in enumerate(sides) for a in x.axes if a.name == axis}
        dims += [max(strides, key=lambda i: strides[i])] if strides else []
    values, w = dict(case.values), case.world
    counts = (w.batch, w.frames if FRAMES not in axes else 1)
    table = _order(*counts, segment, seed)
    last = list(range(-len(dims), 0))
    x = values[name].movedim(dims, last)
    rest = tuple(label for i, label in enumerate(sides) if i not in dims)
    pixels = reindex(x.flatten(-len(dims)), (*rest, tokens(segment)), segment, table)
    values[name] = pixels.reshape(x.shape).movedim(last, dims)
    expected = [reindex(outputs[0], layout, segment, table)]
    _compare(case, compute(case, values), expected, "another order of pixels")
    return True


def check_rows(case: Case, transfer: Transfer, outputs: Tensors) -> bool:
    """Rows of a batch of pictures in another order; returns whether there are any."""
    (name, layout), *_ = case.layouts.items()
    (out,) = result_layouts(transfer, outputs)
    if out is None or not layout[0].axes:
        return False
    order = torch.arange(layout[0].size).flip(0)
    assert out[0] == layout[0], "the batch has another label"
    values = {**case.values, name: case.values[name][order]}
    _compare(case, compute(case, values), [outputs[0][order]], "another order of rows")
    return True


def _order(batch: int, frames: int, target: Segment, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, target.length, generator=generator).argsort(-1)


def _tables(transfer: Transfer, target: Segment) -> list[Positional]:
    return [p for p in transfer.positionals if target in p.tokens.segments]


def _check_package(x: Tensor, positional: Positional, target: Segment, table: Tensor) -> None:
    """What the package gathers for the rows is what `gather_table` does."""
    layout, tokens = positional.layout, positional.tokens
    names = {a.name for a in (*rows_of(layout), *tokens.fixed)}
    own = table if names & {FRAMES, HEIGHT} else table[:, :1]
    own = (own if "batch" in names else own[:1]).flatten(0, 1)
    at = sum(s.length for s in tokens.segments[: tokens.segments.index(target)])
    before, after = torch.arange(at), torch.arange(at + target.length, tokens.length)
    parts = (before.expand(len(own), -1), own + at, after.expand(len(own), -1))
    expected = gather_table(x, positional, target, table)
    x = x[(None,) * (len(layout) - x.dim())]
    x, dim = open_factors(x, layout, positional.dim)
    index = place_rows(torch.cat(parts, 1), layout, positional.dim)
    shape = [max(pair) for pair in zip(x.shape, index.shape, strict=True)]
    x = x.expand([*shape[:dim], x.shape[dim], *shape[dim + 1 :]])
    gathered = close_factors(torch.take_along_dim(x, index, dim), layout)
    assert torch.equal(gathered.expand(expected.shape), expected), "the package gathers otherwise"


# -- twins ----------------------------------------------------------------------------------------


def check_twins(
    case: Case, transfer: Transfer, target: Segment, outputs: Tensors, seed: int
) -> bool:
    """Tokens that come in twins, one of each pair kept, another one in each row.

    Literals get their new values by the patches. The result is that at the tokens kept; shares of
    keys are twice as large, since a key stands for two. Returns whether the call can be tested so.
    """
    w, kept, tables = case.world, target.length // 2, _tables(transfer, target)
    over_keys = [p for p in tables if p.layout[p.dim].keys]
    layouts = result_layouts(transfer, outputs)
    if kept < 2 or not _allows_twins(case, layouts, target, over_keys):
        return False
    alike = (1, 1) if over_keys else (w.batch, w.frames)  # a mask has no rows of its own
    first, second = _order(*alike, target, seed).expand(w.batch, w.frames, -1).chunk(2, -1)
    every = torch.arange(target.length).expand(w.batch, w.frames, -1)
    twins = every.scatter(-1, second, first)
    full = dict(case.values)
    for name, layout in case.layouts.items():
        full[name] = reindex(full[name], layout, target, twins)
    for p in over_keys:
        own, lead = full[p.operand], len(p.layout) - full[p.operand].dim()
        full[p.operand] = _repeat_table(own, p, target, twins[0, 0], p.dim - lead)
    few = dict(full)
    for name, layout in case.layouts.items():
        few[name] = reindex(weigh_keys(few[name], layout, target, 2), layout, target, first)
    for p in tables:
        few[p.operand] = gather_table(few[p.operand], p, target, first)
    for c in transfer.counted:  # a sum counts each token as often as it stands for others
        if target in c.tokens.segments:
            few[c.operand] = _double(few[c.operand], c, target, kept)
    args = case.args
    for patch in transfer.patches:
        args = with_literal(args, patch.path, patch.value({}))
        assert args == case.args, f"a literal that is another number: {patch}"
    for patch in transfer.patches:
        args = with_literal(args, patch.path, patch.value({target.name: kept}))
    expected = [
        reindex(weigh_keys(out, layout, target, 2), layout, target, first) if layout else out
        for out, layout in zip(compute(case, full), layouts, strict=True)
    ]
    _compare(case, compute(case, few, args), expected, f"one of two twins, {args}")
    return True


def _double(x: Tensor, counted: Positional, target: Segment, kept: int) -> Tensor:
    """An operand of which `kept` tokens of a segment are left, these times two."""
    segments = counted.tokens.segments
    at = sum(s.length for s in segments[: segments.index(target)])
    factor = torch.ones(x.shape[counted.dim], dtype=x.dtype)
    factor[at : at + kept] = 2
    return x * factor.view([-1 if d == counted.dim else 1 for d in range(x.dim())])


def _allows_twins(case: Case, layouts: Any, target: Segment, over_keys: list[Positional]) -> bool:
    """Whether halving the tokens leaves what is computed of others the same.

    It doesn't where softmax is over keys of which not all are halved, or over shares, or where
    shares are no longer shares in the result, which nothing sums over then.
    """
    op = op_name(case.target)
    before, after = (_keys(each, target) for each in (case.layouts.values(), layouts))
    shares = any(k.normal for k in before)
    if op in SOFTMAX and (shares or any(len(k.tokens.segments) > 1 for k in before)):
        return False
    if op == ATTENTION:
        label = case.layouts.get(case.args[1].name, (None,))[-2:][0]
        found = label.tokens if label else None
        if found and target in found.segments and len(found.segments) > 1:
            return False
    forgotten = shares and any(not k.normal for k in after)
    return not forgotten and not any(p.layout[p.dim].is_product for p in over_keys)


def _keys(layouts: Any, target: Segment) -> list[Keys]:
    factors = [f for x in layouts for label in x or () for f in label.factors]
    return [f for f in factors if isinstance(f, Keys) and target in f.tokens.segments]


def _repeat_table(x: Tensor, p: Positional, target: Segment, twins: Tensor, dim: int) -> Tensor:
    """A table with equal entries for twins, which are the same in all rows."""
    segments = p.tokens.segments
    at = sum(s.length for s in segments[: segments.index(target)])
    index = torch.arange(x.shape[dim])
    index[at : at + target.length] = twins + at
    return x.index_select(dim, index)


def with_literal(args: Any, path: tuple[int, ...], value: int) -> Any:
    """Arguments with another literal at a path."""
    if not path:
        return value
    new = list(args)
    new[path[0]] = with_literal(args[path[0]], path[1:], value)
    return type(args)(new)


# -- words ----------------------------------------------------------------------------------------


def _compare(case: Case, results: Tensors, expected: Any, what: str) -> None:
    for a, b in zip(results, expected, strict=True):
        assert a.shape == b.shape, f"{what}: {tuple(a.shape)} for {tuple(b.shape)}"
        if op_name(case.target) != "aten.empty_like":
            dtype = torch.complex128 if a.is_complex() else torch.float64
            same = torch.allclose(a.to(dtype), b.to(dtype), 1e-6, 1e-6, equal_nan=True)
            assert same, what


def describe(case: Case, transfer: Transfer | None = None) -> str:
    """The call, for people."""
    lines = [f"{case.target} {case.args} {case.kwargs}", str(case.world)]
    for name, x in case.values.items():
        lines.append(f"  {name} {list(x.shape)}: {_text(case.layouts.get(name))}")
    if transfer is not None:
        lines += [f"  result: {_text(x)}" for x in layouts_of(transfer.fact)]
        lines += [f"  {p.operand} along {_text(p.layout)}, {p.dim}" for p in transfer.positionals]
        lines += [f"  {p}" for p in transfer.patches]
    return "\n".join(lines)


def _text(layout: Layout | None) -> str:
    return "nothing known" if layout is None else ", ".join(map(str, layout))
