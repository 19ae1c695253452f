"""Calls of every operator that has a rule, drawn at random: shapes, layouts, forms of arguments."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from tests.analysis.draws import Draw, Ref
from toma_fx.analysis.factors import Refused, Tokens
from toma_fx.analysis.labels import ONE, Label, Layout, axis, drop, fold, plain

A = torch.ops.aten
Generator = Callable[[Draw], None]
GENERATORS: dict[str, Generator] = {}


def cases(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a generator of calls for operators; if it takes a name, it is told the operator."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        def bind(name: str) -> Generator:
            return lambda d: function(d, getattr(A, name))

        GENERATORS.update({f"aten.{name}": bind(name) for name in names})
        return function

    return add


# -- element-wise ---------------------------------------------------------------------------------


@cases("add", "sub", "mul", "div", "maximum", "pow", "atan2", "eq")
def binary(d: Draw, op: Any) -> None:
    x, layout = d.main()
    y = d.partner(layout)
    pair = (x, y) if d.chance(0.7) or isinstance(y, float) else (y, x)
    options = {"alpha": 2} if op in (A.add, A.sub) and d.chance(0.2) else {}
    if op in (A.maximum, A.atan2):
        pair = tuple(d.value(layout) if isinstance(v, float) else v for v in pair)
        d.call(op, *pair)
    else:
        scalar, tensor = {A.pow: ("Tensor_Scalar", "Tensor_Tensor")}.get(op, ("Scalar", "Tensor"))
        d.call(getattr(op, scalar if isinstance(y, float) else tensor), *pair, **options)


@cases("gelu", "silu", "sigmoid", "neg", "exp", "sqrt", "relu", "tanh", "hardswish", "zero")
def unary(d: Draw, op: Any) -> None:
    d.call(op, d.main()[0])


def as_mask(d: Draw, layout: Layout) -> Any:
    """A mask that may meet a value."""
    mask = d.partner(layout, torch.bool)
    fits = isinstance(mask, Ref) and d.case.values[mask.name].dtype == torch.bool
    return mask if fits else d.value(layout, torch.bool)


@cases("where")
def where(d: Draw, op: Any) -> None:
    x, layout = d.main()
    mask, y = as_mask(d, layout), d.partner(layout)
    if isinstance(y, float):
        d.call(op.ScalarOther, mask, x, y)
    else:
        d.call(op.self, *((mask, x, y) if d.chance(0.6) else (mask, y, x)))


@cases("masked_fill")
def masked_fill(d: Draw, op: Any) -> None:
    x, layout = d.main()
    mask = as_mask(d, layout)
    d.call(op.Scalar, x, mask, d.pick(0.0, 0.0, -1e4, 3.0))


@cases("lerp", "addcmul")
def ternary(d: Draw, op: Any) -> None:
    x, layout = d.main()
    y, z = (d.partner(layout) for _ in range(2))
    y, z = (d.value(layout) if isinstance(v, float) else v for v in (y, z))
    d.call(op.Tensor if op is A.lerp else op, *d.rng.sample([x, y, z], 3))


@cases("clip")
def clip(d: Draw, op: Any) -> None:
    x, layout = d.main()
    if d.chance(0.5):
        d.call(op, x, -0.5, 0.5)
    else:
        low = d.partner(layout)
        d.call(op.Tensor, x, d.value(layout) if isinstance(low, float) else low)


@cases("expand_as", "copy")
def like_another(d: Draw, op: Any) -> None:
    y, layout = d.main()
    x = d.partner(layout)
    x = d.value(layout) if isinstance(x, float) else x
    d.call(op, *((x, y) if op is A.expand_as or d.chance(0.4) else (y, x)))


@cases("full_like", "zeros_like", "ones_like", "empty_like", "fill")
def filled(d: Draw, op: Any) -> None:
    value = [2.0] if op in (A.full_like, A.fill) else []
    d.call(op.Scalar if op is A.fill else op, d.main()[0], *value)


@cases("polar", "floor_divide", "rsub", "__and__")
def without_tag(d: Draw, op: Any) -> None:
    """Element-wise operators that torch does not tag as such."""
    x, layout = d.main()
    y = d.partner(layout)
    y = d.value(layout) if isinstance(y, float) else y
    if op is A.__and__:
        d.call(op.Tensor, *(as_mask(d, layout) for _ in range(2)))
    else:
        d.call(op.Tensor if op is A.rsub else op, *((x, y) if d.chance(0.6) else (y, x)))


@cases("contiguous", "clone", "alias", "detach", "lift_fresh_copy")
def copies(d: Draw, op: Any) -> None:
    d.call(op, d.main()[0])


@cases("to", "_to_copy")
def cast(d: Draw, op: Any) -> None:
    x, _ = d.main()
    if op is A.to:
        d.call(op.dtype, x, torch.float32)
    else:
        d.call(op, x, dtype=torch.float32)


@cases("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(d: Draw, op: Any) -> None:
    d.call(op, d.main()[0], 0.5, d.chance(0.9))


# -- linear maps, norms, reductions ---------------------------------------------------------------


def out_features(d: Draw) -> int:
    w = d.world
    return d.pick(w.channels, w.count, w.batch, 3)


@cases("linear")
def linear(d: Draw, op: Any) -> None:
    x, layout = d.main()
    size, out = layout[-1].size, out_features(d)
    weight = [out, size] if d.chance(0.9) else (d.layout(rank=1)[0], plain(size))
    d.call(op, x, d.value(weight), *([d.value([out])] if d.chance(0.5) else []))


@cases("layer_norm", "rms_norm")
def norm(d: Draw, op: Any) -> None:
    x, layout = d.main()
    count = d.pick(1, 1, 1, 2)
    shape = [label.size for label in layout[-count:]]
    more = [d.value(shape) for _ in range(d.rng.randrange(3))]
    d.call(op, x, shape, *(more[:1] if op is A.rms_norm else more))


@cases("group_norm", "batch_norm", "instance_norm")
def statistics(d: Draw, op: Any) -> None:
    x, layout = d.main()
    channels = layout[1].size if len(layout) > 1 else 1
    affine = [d.value([channels]), d.value([channels])] if d.chance(0.5) else [None, None]
    if op is A.group_norm:
        groups = d.pick(*(g for g in range(1, channels + 1) if channels % g == 0))
        d.call(op, x, groups, *affine)
    elif op is A.instance_norm:
        d.call(op, x, *affine, None, None, True, 0.1, 1e-5, False)
    else:
        mean, var = d.value([channels]), d.value([channels])
        d.case.values[var.name].abs_()
        d.call(op, x, *affine, mean, var, d.chance(0.4), 0.1, 1e-5, False)


@cases("_native_batch_norm_legit_no_training")
def frozen_norm(d: Draw, op: Any) -> None:
    x, layout = d.main()
    channels = layout[1].size if len(layout) > 1 else 1
    mean, var = d.value([channels]), d.value([channels])
    d.case.values[var.name].abs_()
    affine = [d.value([channels]), d.value([channels])] if d.chance(0.5) else [None, None]
    d.call(op, x, *affine, mean, var, 0.1, 1e-5)


@cases("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm")
def reduction(d: Draw, op: Any) -> None:
    x, layout = d.main()
    dims: Any = d.dims(layout) if d.chance(0.9) else d.pick([], list(range(len(layout))))
    if op in (A.mean, A.sum) and d.chance(0.1):
        d.call(op, x)
        return
    overload = {A.mean: "dim", A.sum: "dim_IntList", A.var: "dim", A.std: "dim"}.get(op, "default")
    before = [2.0] if op is A.linalg_vector_norm else []
    more = [True] if op in (A.var, A.std) and d.chance(0.5) else []
    if more:
        d.call(getattr(op, overload), x, dims, True, d.chance(0.5))
    else:
        d.call(
            getattr(op, overload), x, *before, dims, **{"keepdim": True} if d.chance(0.5) else {}
        )


@cases("log_softmax", "softmax", "_softmax")
def softmax(d: Draw, op: Any) -> None:
    layout = d.scores() if d.chance(0.5) else d.layout()
    dim = d.pick(-1, d.dim(layout))
    x = d.value(layout)
    if op is A._softmax:
        d.call(op, x, dim, False)
    else:
        d.call(op.int, x, dim)


@cases("cumsum", "flip", "roll")
def scan(d: Draw, op: Any) -> None:
    x, layout = d.main()
    if op is A.roll:
        dims = d.dims(layout)
        d.call(op, x, *([[1] * len(dims), dims] if d.chance(0.9) else [[1]]))
        return
    d.call(op, x, d.dims(layout) if op is A.flip else d.dim(layout))


# -- dimensions that move -------------------------------------------------------------------------


def regroup_sizes(d: Draw, sizes: list[int]) -> list[int]:
    """Sizes with some factored, some multiplied with their neighbor, some 1 put in or dropped."""
    out: list[int] = []
    for size in sizes:
        divisors = [k for k in range(2, size) if size % k == 0]
        kind = d.rng.choices(["keep", "fold", "split", "one"], [5, 2, 2, 1])[0]
        if kind == "fold" and out:
            out[-1] *= size
        elif kind == "split" and divisors:
            k = d.rng.choice(divisors)
            out += [k, size // k]
        else:
            out += [1, size] if kind == "one" else [] if size == 1 and d.chance(0.5) else [size]
    return out


def fold_picture(d: Draw) -> tuple[Layout, int, int]:
    """A picture or video, its patches perhaps split off, and the dimensions that become tokens."""
    w = d.world
    names = ("frames", "height", "width")[d.pick(0, 1, 1) :]
    shape = [d.pick(2, 3), *w.grid][-len(names) :]
    sides, inner = [axis(*side) for side in zip(names, shape, strict=True)], list[Label]()
    if d.chance(0.4):
        pairs = [axis(n, 2 * s).factors[0].split(s) for n, s in zip(names, shape, strict=True)]
        sides, inner = (
            [Label(a) if a[0].size > 1 else ONE for a, _ in pairs],
            [Label(b) for _, b in pairs],
        )
    before, after = [axis("batch", w.batch)], [*inner, plain(w.channels)]
    if d.chance(0.3):
        before, after = [*before, *after], []
    if len(names) == 2 and w.frames > 1:
        before.insert(d.pick(0, len(before)), axis("frames", w.frames))
    return (*before, *sides, *after), len(before), len(before) + len(sides)


@cases("view", "reshape", "_unsafe_view", "view_copy")
def view(d: Draw, op: Any) -> None:
    if d.chance(0.15):
        picture, start, stop = fold_picture(d)
        sizes = [label.size for label in picture]
        rest = d.pick(sizes[stop:], [prod(sizes[stop:])])
        d.call(op, d.value(picture), [*sizes[:start], prod(sizes[start:stop]), *rest])
        return
    x, layout = d.main()
    sizes = regroup_sizes(d, [label.size for label in layout])
    if d.chance(0.2):  # of any factors
        d.rng.shuffle(sizes)
    if sizes and d.chance(0.4) and op is not A._unsafe_view:
        sizes[d.rng.randrange(len(sizes))] = -1
    d.call(op, x, sizes)


@cases("reshape_as")
def reshape_as(d: Draw, op: Any) -> None:
    """A dimension folded, and back to what it was; or to the sizes of something else."""
    x, layout = d.main()
    other = layout
    if len(layout) > 1 and d.chance(0.6):
        k = d.rng.randrange(len(layout) - 1)
        try:
            other = (*layout[:k], fold(layout[k : k + 2]), *layout[k + 2 :])
        except Refused:
            other = layout
    if d.chance(0.3):
        other = tuple(plain(label.size) for label in other)
    y = d.value(other)
    d.call(op, *((x, y) if d.chance(0.5) else (y, x)))


@cases("flatten")
def flatten(d: Draw, op: Any) -> None:
    if d.chance(0.2):
        picture, start, stop = fold_picture(d)
        d.call(op.using_ints, d.value(picture), start, stop - 1)
        return
    x, layout = d.main()
    start = d.rng.randrange(len(layout))
    stop = d.rng.randrange(start, len(layout))
    d.call(op.using_ints, x, start, d.pick(stop, stop - len(layout)))


@cases("unflatten")
def unflatten(d: Draw, op: Any) -> None:
    x, layout = d.main()
    dim = d.rng.randrange(len(layout))
    label = layout[dim]
    sizes = [f.size for f in label.factors] or [1]
    if d.chance(0.5):
        sizes = regroup_sizes(d, [label.size]) or [1]
    if d.chance(0.4):
        sizes[d.rng.randrange(len(sizes))] = -1
    d.call(op.int, x, d.pick(dim, dim - len(layout)), sizes)


@cases("expand", "broadcast_to")
def expand(d: Draw, op: Any) -> None:
    x, layout = d.main()
    sizes = [label.size if label.size > 1 else d.pick(1, 2, 4) for label in layout]
    sizes = [-1 if d.chance(0.3) else s for s in sizes]
    d.call(op, x, [d.pick(1, 2, 4) for _ in range(d.pick(0, 0, 1))] + sizes)


@cases("repeat", "tile")
def repeat(d: Draw, op: Any) -> None:
    x, layout = d.main()
    times = [d.pick(1, 1, 1, 2, 3) for _ in range(len(layout) + d.pick(0, 0, 1))]
    times = times[d.pick(0, 1) :] if op is A.tile else times
    d.call(op, x, times)


@cases("repeat_interleave")
def repeat_interleave(d: Draw, op: Any) -> None:
    x, layout = d.main()
    d.call(op.self_int, x, d.pick(1, 2, 3), *([d.dim(layout)] if d.chance(0.9) else []))


@cases("permute")
def permute(d: Draw, op: Any) -> None:
    x, layout = d.main()
    dims = d.rng.sample(range(len(layout)), len(layout))
    d.call(op, x, [k - len(layout) if d.chance(0.3) else k for k in dims])


@cases("movedim", "moveaxis")
def movedim(d: Draw, op: Any) -> None:
    x, layout = d.main()
    count = d.rng.randint(1, len(layout))
    places = [d.rng.sample(range(len(layout)), count) for _ in range(2)]
    source, target = ([k - len(layout) if d.chance(0.3) else k for k in each] for each in places)
    if count == 1 and d.chance(0.5):
        d.call(op.int, x, source[0], target[0])
    else:
        d.call(op.intlist, x, source, target)


@cases("transpose", "swapaxes", "swapdims", "mT", "t")
def transpose(d: Draw, op: Any) -> None:
    if op is A.t:
        d.call(op, d.value(d.layout(rank=d.pick(1, 2, 2))))
        return
    x, layout = d.main()
    pair = [d.dim(layout), d.dim(layout)]
    d.call(op.int if op is A.transpose else op, x, *([] if op is A.mT else pair))


@cases("unsqueeze")
def unsqueeze(d: Draw, op: Any) -> None:
    x, layout = d.main()
    d.call(op, x, d.rng.randrange(-len(layout) - 1, len(layout) + 1))


@cases("squeeze")
def squeeze(d: Draw, op: Any) -> None:
    layout = list(d.layout())
    for _ in range(d.rng.randrange(3)):
        layout.insert(d.rng.randrange(len(layout) + 1), ONE)
    x = d.value(tuple(layout))
    kind = d.pick("all", "dim", "dims")
    ones = [i for i, label in enumerate(layout) if label.size == 1] or [0]
    dim = d.pick(d.dim(tuple(layout)), *ones)
    more = {"all": [], "dim": [dim], "dims": [d.dims(tuple(layout))]}[kind]
    d.call(getattr(op, {"all": "default"}.get(kind, kind)), x, *more)


@cases("select")
def select(d: Draw, op: Any) -> None:
    x, layout = d.main()
    dim = d.dim(layout)
    size = layout[dim].size
    d.call(op.int, x, dim, d.rng.randrange(-size, size))


@cases("unbind")
def unbind(d: Draw, op: Any) -> None:
    x, layout = d.main()
    d.call(op.int, x, *([d.dim(layout)] if d.chance(0.8) else []))


@cases("view_as_complex")
def view_as_complex(d: Draw, op: Any) -> None:
    layout = d.layout(features=2)
    layout = layout if d.chance(0.8) else (*layout, plain(2))
    d.call(op, d.value(layout))


@cases("view_as_real")
def view_as_real(d: Draw, op: Any) -> None:
    d.call(op, d.value(d.layout(), torch.complex128))


# -- joins and cuts -------------------------------------------------------------------------------


@cases("chunk", "split")
def chunk(d: Draw, op: Any) -> None:
    x, layout = d.main()
    d.call(op.Tensor if op is A.split else op, x, d.pick(1, 2, 3), d.dim(layout))


@cases("split_with_sizes")
def split_with_sizes(d: Draw, op: Any) -> None:
    x, layout = d.main()
    dim = d.dim(layout)
    dim = d.token_dim(layout, dim)
    sizes, only = [layout[dim].size], layout[dim].tokens
    if only and len(only.segments) == 2 and len(layout[dim].factors) == 1 and d.chance(0.8):
        sizes = [s.length for s in only.segments]
    elif sizes[0] > 1 and d.chance(0.7):
        k = d.rng.randrange(1, sizes[0])
        sizes = [k, sizes[0] - k]
    d.call(op, x, sizes, dim)


@cases("slice", "narrow")
def slice_(d: Draw, op: Any) -> None:
    x, layout = d.main()
    dim = d.token_dim(layout, d.dim(layout))
    size, only = layout[dim].size, layout[dim].tokens
    start = d.rng.randrange(size)
    stop = d.rng.randrange(start, size) + 1
    if only and len(only.segments) == 2 and d.chance(0.8):
        first = only.segments[0].length
        start, stop = d.pick((0, first), (first, size))
    if d.chance(0.15):
        start, stop = 0, size
    if op is A.narrow:
        d.call(op, x, dim, start, stop - start)
        return
    first: Any = start - size if start and d.chance(0.3) else start
    last: Any = stop - size if stop < size and d.chance(0.4) else stop
    if stop == size:
        last = d.pick(2**63 - 1, None, size)
    step = [2] if d.chance(0.1) else []
    d.call(op.Tensor, x, dim, None if not start and d.chance(0.3) else first, last, *step)


@cases("slice_scatter")
def slice_scatter(d: Draw, op: Any) -> None:
    x, layout = d.main()
    dim = d.dim(layout)
    size = layout[dim].size
    start, step = d.rng.randrange(size), d.pick(1, 1, 2)
    stop = d.rng.randrange(start, size) + 1
    count = len(range(start, stop, step))
    part = list(layout)
    part[dim] = plain(count) if layout[dim].size != count else layout[dim]
    if d.chance(0.3):
        part = [plain(label.size) for label in part]
    d.call(op, x, d.value(tuple(part)), dim, start, stop, step)


@cases("cat", "concat", "concatenate")
def cat(d: Draw, op: Any) -> None:
    layout = d.layout()
    kind = d.pick("features", "features", "tokens", "ranges", "chance")
    if kind == "tokens":
        layout = d.layout([d.image], usual=True)
        dim = next(i for i, label in enumerate(layout) if label.tokens)
        by = d.pick(d.text, d.other, None)
        far = Label((Tokens((by,)),)) if by else plain(d.pick(1, d.world.count))
        other = tuple(far if i == dim else label for i, label in enumerate(layout))
        if d.chance(0.2):
            other = tuple(label if i == dim else plain(label.size) for i, label in enumerate(other))
        parts = [d.value(layout), d.value(other)]
        d.call(op, d.rng.sample(parts, 2), d.pick(dim, dim - len(layout)))
        return
    if kind == "ranges" and d.world.batch > 1:
        batch = axis("batch", d.world.batch)
        k = d.rng.randrange(1, d.world.batch)
        rest = Label((Tokens((d.image,)),)), plain(d.world.channels)
        pieces = [batch.cut(0, k), batch.cut(k, d.world.batch)]
        pieces = pieces if d.chance(0.7) else pieces[::-1]
        d.call(op, [d.value((p, *rest)) for p in pieces], 0)
        return
    dim = d.dim(layout)
    parts = [d.value(layout)]
    for _ in range(d.pick(1, 1, 2)):
        found = d.partner(layout) if kind == "chance" else layout
        if isinstance(found, tuple) and found[dim].is_plain:
            size = plain(d.pick(1, 2, 4))
            found = tuple(size if i == dim % len(found) else x for i, x in enumerate(found))
        parts.append(d.value(found) if isinstance(found, tuple) else found)
    d.call(op, [p for p in parts if not isinstance(p, float)], dim)


def taken_row(d: Draw, index: int, segments: Any = None) -> Layout:
    """Tokens of one row of a batch, that row picked out: [tokens, channels]."""
    w = d.world
    tokens = Label((Tokens(segments or (d.image,)),))
    batch = axis("batch", w.batch)
    return drop((batch.cut(index, index + 1), tokens, plain(w.channels)), [0])


@cases("pad_sequence")
def pad_sequence(d: Draw, op: Any) -> None:
    w = d.world
    order = list(range(w.batch))
    order = order if d.chance(0.7) else order[::-1]
    rows = [taken_row(d, i, d.pick(None, None, (d.image, d.text))) for i in order]
    d.call(op, [d.value(row) for row in rows], d.chance(0.8))


@cases("stack")
def stack(d: Draw, op: Any) -> None:
    if d.world.batch > 1 and d.chance(0.3):
        order = list(range(d.world.batch))
        order = order if d.chance(0.7) else order[::-1]
        d.call(op, [d.value(taken_row(d, i)) for i in order], *d.pick([], [0], [1], [-1]))
        return
    x, layout = d.main()
    others = [d.partner(layout) if d.chance(0.4) else d.value(layout) for _ in range(d.pick(1, 2))]
    parts = [x, *(o for o in others if not isinstance(o, float))]
    d.call(op, parts, d.rng.randrange(-len(layout) - 1, len(layout) + 1))


@cases("constant_pad_nd", "pad")
def pad(d: Draw, op: Any) -> None:
    x, layout = d.main()
    count = d.pick(1, 1, 2)
    widths = [d.pick(0, 0, 1, 2, -1) for _ in range(2 * min(count, len(layout)))]
    d.call(op, x, widths, *(["replicate"] if op is A.pad and d.chance(0.2) else []))


@cases("outer")
def outer(d: Draw, op: Any) -> None:
    pool: list[Any] = [d.layout(rank=1), [3], [d.world.count], d.layout([d.other], rank=1)]
    pool.append((Label((Tokens((d.ids,)),)),))
    d.call(op, d.value(d.pick(*pool)), d.value(d.pick(*pool)))
