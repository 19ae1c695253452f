"""Rules of ops that move dimensions around: reshapes, transposes, repetitions, single indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from toma_fx.analysis.factors import AXES, Plain, Refused
from toma_fx.analysis.facts import Patch, Transfer
from toma_fx.analysis.labels import (
    ONE,
    Label,
    Layout,
    drop,
    find_grid,
    fold,
    layouts_of,
    plain,
    split,
    token_dim,
    tokens,
    tokens_of,
    use_up,
)
from toma_fx.analysis.rules.base import Call, carries_positions, rule
from toma_fx.graph.nodes import RESHAPES, UNKNOWN, shape_of
from toma_fx.graph.regroup import regroup

ROWS_SEPARATED = "rows of the batch are taken apart"


def make_patch(path: tuple[int, ...], label: Label) -> tuple[Patch, ...]:
    """The patch of a literal that is the size of a dimension, if that holds tokens."""
    positions = label.positions
    if positions is None:
        return ()
    return (Patch(path, positions.segments, label.size // max(positions.length, 1)),)


def _reshape(call: Call, literals: Mapping[int, tuple[int, ...]]) -> Transfer:
    """A row-major reshape; `literals`: paths of the sizes of result dimensions among arguments."""
    layout, target = call.layout(call.arg(0)), call.shape
    labels = [ONE] * len(target)
    gone: list[int] = []
    for ins, outs in reversed(regroup(shape_of(call.arg(0)), target)):
        behind = labels[outs[-1] + 1 :] if outs else []
        name = "" if tokens_of(behind) or find_grid(behind[:2]) else call.name  # windows before it
        parts = _regroup([layout[d] for d in ins], [target[d] for d in outs], name)
        gone += [] if outs else ins
        for d, label in zip(outs, parts, strict=True):
            labels[d] = label
    if any(layout[d].positions for d in gone):
        raise Refused("a token axis of one token is dropped")
    count = len(labels)
    result = drop((*labels, *(layout[d] for d in gone)), range(count, count + len(gone)))
    result = _use_up_sides(call.name, result)
    patches = tuple(p for d, path in literals.items() for p in make_patch(path, result[d]))
    return Transfer(result, patches, needs_all_tokens=_why_all(layout, result))


def _why_all(before: Layout, after: Layout) -> str:
    """Why a reshape must see all tokens: those after it are others."""
    old, new = tokens_of(before), tokens_of(after)
    if old is None or (new is not None and old.segments == new.segments):
        return ""
    return "tokens are laid out as a spatial grid"


def _regroup(labels: Sequence[Label], sizes: Sequence[int], name: str) -> list[Label]:
    """The labels of dimensions of these sizes that are made of those of `labels`."""
    if len(labels) == 1 and len(sizes) == 1:
        return list(labels)
    if not sizes:
        return []
    if all(label.is_plain for label in labels):
        return [plain(size) for size in sizes]
    if any(size >= UNKNOWN for size in (*sizes, *(x.size for x in labels))):
        raise Refused("a reshape that folds sizes which depend on the data")
    if len(sizes) == 1:
        return [fold(labels, name)]
    return split(fold(labels), sizes, name)


def _use_up_sides(name: str, layout: Layout) -> Layout:
    """What is left of the sides of a picture that became tokens here: rows, if they are windows.

    Behind the tokens, or among features, it is pixels, which are plain.
    """
    new, at = tokens_of(layout), token_dim(layout)
    if new is None or at is None or new.segments[0].name != name:
        return layout
    sides = AXES[-len(new.segments[0].grid or ()) :]
    if any(len(x.axes) < len(x.factors) for x in layout[:at]):
        return tuple(use_up(x, sides) for x in layout)
    inner = {a.name: a.base for x in layout[:at] for a in x.axes if a.stride == 1}
    strides = tuple(inner.get(side, 1) for side in sides)
    label = tokens(replace(new.segments[0], strides=strides)) if max(strides) > 1 else layout[at]
    return (*layout[:at], label, *(use_up(x, sides) for x in layout[at + 1 :]))


@rule(*RESHAPES, linear=True)
def view(call: Call) -> Transfer:
    """Reshapes: labels follow the groups of dimensions that stay together."""
    sizes = call.arg(1)
    return _reshape(
        call, {d: (1, d) for d, s in enumerate(sizes) if isinstance(s, int) and s != -1}
    )


@rule("flatten", linear=True)
def flatten(call: Call) -> Transfer:
    """A reshape that names dimensions, no sizes."""
    return _reshape(call, {})


@rule("unflatten", linear=True)
def unflatten(call: Call) -> Transfer:
    """A reshape of one dimension to literal sizes."""
    dim, sizes = call.arg(1) % len(call.layout(call.arg(0))), call.arg(2)
    literals = {dim + i: (2, i) for i, s in enumerate(sizes) if isinstance(s, int) and s != -1}
    return _reshape(call, literals)


@rule("reshape_as", linear=True)
def reshape_as(call: Call) -> Transfer:
    """A reshape to the sizes of another value, which must have the same tokens in each place."""
    transfer, other = _reshape(call, {}), call.layout(call.arg(1))
    if [x.positions for x in layouts_of(transfer.fact)[0] or ()] != [x.positions for x in other]:
        raise Refused("a reshape to the sizes of a value with other tokens")
    return transfer


@rule("expand", "broadcast_to", linear=True)
def expand(call: Call) -> Transfer:
    """Broadcast to literal sizes."""
    layout, sizes = call.layout(call.arg(0)), call.arg(1)
    shift = len(sizes) - len(layout)
    labels = [plain(size) for size in call.shape]
    patches: tuple[Patch, ...] = ()
    for d, label in enumerate(layout, shift):
        if label.size != call.shape[d]:
            continue
        labels[d] = label
        if isinstance(sizes[d], int) and sizes[d] != -1 and label.size != 1:
            patches += make_patch((1, d), label)
    return Transfer(tuple(labels), patches)


@rule("repeat", "tile", linear=True)
def repeat(call: Call) -> Layout:
    """Tiling: each dimension as often as told, one copy after the other."""
    layout, times = call.layout(call.arg(0)), call.arg(1)
    times = [*[1] * (len(layout) - len(times)), *times]
    full = (*(ONE,) * (len(times) - len(layout)), *layout)
    return tuple(
        label if n == 1 else label.times(Plain(n), outer=True)
        for label, n in zip(full, times, strict=True)
    )


@rule("repeat_interleave", linear=True)
def repeat_interleave(call: Call) -> Layout:
    """Repetition of each index along a dimension."""
    layout, times, dim = call.layout(call.arg(0)), call.arg(1, "repeats"), call.arg(2, "dim")
    if dim is None or not isinstance(times, int):
        raise Refused("repetition of the token axis")
    dim %= len(layout)
    label = layout[dim] if times == 1 else layout[dim].times(Plain(times), outer=False)
    return (*layout[:dim], label, *layout[dim + 1 :])


@rule("permute", linear=True)
def permute(call: Call) -> Layout:
    """Reordering of dimensions."""
    layout = call.layout(call.arg(0))
    return tuple(layout[d] for d in call.arg(1))


@rule("movedim", "moveaxis", linear=True)
def movedim(call: Call) -> Layout:
    """Dimensions move to other places; the rest keeps its order."""
    layout = call.layout(call.arg(0))
    pairs = [x if isinstance(x, (list, tuple)) else [x] for x in (call.arg(1), call.arg(2))]
    source, target = ([d % len(layout) for d in dims] for dims in pairs)
    rest = iter(d for d in range(len(layout)) if d not in source)
    moved = dict(zip(target, source, strict=True))
    return tuple(layout[moved[d] if d in moved else next(rest)] for d in range(len(layout)))


@rule("transpose", "swapaxes", "swapdims", "t", "mT", linear=True)
def transpose(call: Call) -> Layout:
    """Swap of two dimensions."""
    labels = list(call.layout(call.arg(0)))
    a, b = {"aten.t": (0, 1), "aten.mT": (-2, -1)}.get(call.op) or (call.arg(1), call.arg(2))
    if len(labels) > 1:
        labels[a], labels[b] = labels[b], labels[a]
    return tuple(labels)


@rule("unsqueeze", linear=True)
def unsqueeze(call: Call) -> Layout:
    """A new dimension of size 1."""
    labels = list(call.layout(call.arg(0)))
    labels.insert(call.arg(1) % (len(labels) + 1), ONE)
    return tuple(labels)


@rule("squeeze", linear=True)
def squeeze(call: Call) -> Layout:
    """Removal of dimensions of size 1."""
    layout = call.layout(call.arg(0))
    dims = call.arg(1, "dim", list(range(len(layout))))
    dims = [dims] if isinstance(dims, int) else dims
    removed = {d % len(layout) for d in dims if layout[d].size == 1}
    if any(layout[d].positions for d in removed):
        raise Refused("a token axis of one token is dropped")
    return drop(layout, removed)


@rule("select", linear=True)
def select(call: Call) -> Layout | Transfer:
    """One index of another dimension."""
    layout, index = call.layout(call.arg(0)), call.arg(2, "index")
    dim = call.arg(1, "dim", 0) % len(layout)
    if isinstance(index, int) and _has_rows(layout, dim):
        row = _take_row(layout, dim, index % layout[dim].size)
        return Transfer(row, needs_all_tokens=ROWS_SEPARATED)
    call.mix("selection of one index of", layout, [dim])
    return drop(layout, [dim])


def _has_rows(layout: Layout, dim: int) -> bool:
    """Whether a dimension enumerates rows of tokens."""
    only = layout[dim].factors
    return carries_positions(layout) and len(only) == 1 and bool(layout[dim].axes)


def _take_row(layout: Layout, dim: int, index: int) -> Layout:
    row = layout[dim].cut(index, index + 1)
    return drop((*layout[:dim], row, *layout[dim + 1 :]), [dim])


@rule("unbind", linear=True)
def unbind(call: Call) -> Transfer:
    """All indices of another dimension."""
    layout = call.layout(call.arg(0))
    dim = call.arg(1, "dim", 0) % len(layout)
    size = shape_of(call.arg(0))[dim]
    if _has_rows(layout, dim):
        rows = tuple(_take_row(layout, dim, i) for i in range(size))
        return Transfer(rows, needs_all_tokens=ROWS_SEPARATED)
    call.mix("unbinding of", layout, [dim])
    return Transfer((drop(layout, [dim]),) * size)


@rule("view_as_complex")
def view_as_complex(call: Call) -> Layout:
    """Pairs along the last dimension become one complex number."""
    layout = call.layout(call.arg(0))
    call.mix("complex numbers along", layout, [-1])
    return layout[:-1]


@rule("view_as_real")
def view_as_real(call: Call) -> Layout:
    """One complex number becomes a pair along a new last dimension."""
    return (*call.layout(call.arg(0)), plain(2))
