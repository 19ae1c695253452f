"""Calls of products, attention, quantized layers and convolutions, drawn at random."""

from __future__ import annotations

from typing import Any

import torch

from tests.analysis.draws import Draw, Ref
from tests.analysis.operator_cases import GENERATORS, A, cases, out_features
from toma_fx.analysis.factors import Keys, Plain, Segment, Tokens
from toma_fx.analysis.labels import ONE, Label, Layout, axis, fold, plain


def of(*segments: Segment) -> Label:
    """A dimension of tokens."""
    return Label((Tokens(segments),))


def lead(d: Draw, rank: int | None = None) -> Layout:
    """Rows and heads, in as many dimensions as told, and perhaps folded."""
    heads: list[Any] = [Plain(d.world.heads)] if d.world.heads > 1 and d.chance(0.6) else []
    factors = [*d.rows(), *heads] if d.chance(0.7) else [*heads, *d.rows()]
    if rank == 1:
        return (fold([Label((f,)) for f in factors]),)
    return tuple(x for x in d.fold(factors, 0.2) if x.size > 1 or d.chance(0.5))


def _maybe(d: Draw, labels: Layout) -> Layout:
    """The leading dimensions of the other operand: the same, fewer, none, or others by chance."""
    kind = d.rng.choices(["same", "plain", "ones", "none", "shuffle"], [8, 1, 1, 1, 1])[0]
    if kind == "plain":
        return tuple(plain(x.size) for x in labels)
    if kind == "ones":
        return tuple(x if x.axes else ONE for x in labels)
    if kind == "shuffle":
        return tuple(d.shuffle(list(labels)))
    return () if kind == "none" and not any(x.axes for x in labels) else labels


@cases("matmul", "bmm", "baddbmm")
def product(d: Draw, op: Any) -> None:
    w, three = d.world, op is not A.matmul
    kinds = ["weight", "scores", "values", "table", "vector", "any"]
    kind = d.rng.choices(kinds, [3, 4, 4, 2, 1, 2])[0]
    front = lead(d, 1 if three else None)
    t, k = of(*d.segments()), of(*d.segments())
    c, out = plain(w.channels), plain(out_features(d))
    back = _maybe(d, front)
    left, right = {
        "weight": (
            (*front, t, c),
            (*(tuple(plain(x.size) for x in front) if three else ()), c, out),
        ),
        "scores": ((*front, t, c), (*back, c, k)),
        "values": (
            (*front, t, Label((Keys(k.tokens, d.chance(0.8)),))),  # type: ignore[arg-type]
            (*back, k, c),
        ),
        "table": ((*front, t, out, c), (*front, t, c, out)[d.pick(0, 0, 1) :]),
        "vector": ((*front, t, c), (c,)),
        "any": ((*front, d.pick(t, c), d.pick(t, c)), (*back, d.pick(k, c), d.pick(k, c))),
    }[kind]
    if kind == "table" and d.chance(0.7):
        right = tuple(plain(x.size) for x in right)
    if d.chance(0.1):  # the other way round
        left, right = (*right[:-2], *right[-2:][::-1]), (*left[:-2], *left[-2:][::-1])
    a, b = d.value(left), d.value(right)
    if op is A.baddbmm:
        shape = [left[0].size, left[1].size, right[-1].size]
        beta = {"beta": 0} if d.chance(0.9) else {}
        d.call(op, d.value([1] if d.chance(0.5) else shape), a, b, **beta)
    else:
        d.call(op, a, b)


@cases("mm")
def matrix_product(d: Draw, op: Any) -> None:
    x = _rows_of_features(d, d.world.channels) if d.chance(0.6) else d.layout(rank=2)
    right: Any = [x[1].size, out_features(d)]
    if d.chance(0.2):
        right = d.layout(rank=2)
    d.call(op, d.value(x), d.value(right))


@cases("scaled_dot_product_attention")
def attention(d: Draw, op: Any) -> None:
    w = d.world
    front = lead(d)
    front = front if front or d.chance(0.3) else (ONE,)
    t = of(*d.segments())
    k = d.pick(t, t, of(*d.segments()), of(d.text), of(d.other), plain(w.count))
    width, out = plain(w.channels), plain(d.pick(w.channels, w.channels, 3))
    q = (*front, t, width)
    if d.chance(0.1):
        q = tuple(d.shuffle(list(q)))
    back = _maybe(d, front)
    keys = (*back, k, width)
    own = k if d.chance(0.9) else d.pick(of(d.image), of(d.other), plain(k.size))
    values = (*(back if d.chance(0.9) else _maybe(d, front)), own, out)
    arguments: list[Any] = [d.value(q), d.value(keys), d.value(values)]
    if d.chance(0.4):
        shape: list[Any] = [
            *(x if d.chance(0.3) else plain(x.size) if d.chance(0.4) else ONE for x in front),
            d.pick(plain(q[-2].size), t, ONE, of(d.ids)),
            d.pick(plain(k.size), plain(k.size), ONE),
        ]
        shape = shape[d.pick(0, 0, max(len(shape) - 2, 0)) :]
        mask = d.value(tuple(shape), d.pick(torch.float64, torch.bool))
        if d.case.values[mask.name].dtype == torch.bool:
            d.case.values[mask.name][..., 0] = True
            if not d.case.values[mask.name].all(-1).any():
                d.case.values[mask.name][:] = True
        arguments.append(mask)
    elif d.chance(0.1):
        arguments += [None, 0.0, True]
    d.call(op, *arguments)


@cases("einsum")
def einsum(d: Draw, op: Any) -> None:
    w, heads = d.world, plain(d.world.heads)
    rows = lead(d, 1)[0]
    t, k, c, e = of(*d.segments()), of(*d.segments()), plain(w.channels), plain(out_features(d))
    shares = Label((Keys(k.tokens, d.chance(0.8)),))  # type: ignore[arg-type]
    letters = {"b": rows, "h": heads, "q": t, "k": k, "d": c, "e": e, "s": shares}
    left, right, out = d.pick(
        ("bqd", "de", "bqe"), ("bhqd", "bhkd", "bhqk"), ("bqhd", "bkhd", "bhqk"),
        ("bhqs", "bhkd", "bhqd"), ("bhqs", "bkhd", "bqhd"), ("bqd", "bqd", "bqd"),
        ("bqd", "bqde", "bqe"), ("bqd", "qd", "bqd"), ("bqd", "bq", "bd"), ("bqd", "d", "bq"),
        ("qd", "qe", "dqe"), ("bqd", "hd", "hbq"), ("bqd", "ed", "beq"), ("bd", "bqd", "bqd"),
    )  # fmt: skip
    if d.chance(0.2):
        names = list(dict.fromkeys(left + right))
        out = "".join(d.rng.sample(names, d.rng.randint(1, len(names))))
    words, operands = [left, right], list[Ref]()
    for i, word in enumerate(words):
        labels = tuple(letters[x] for x in word)
        if i and d.chance(0.7 if "k" not in word else 0.2):
            labels = tuple(plain(x.size) for x in labels)
        operands.append(d.value(labels))
    equation = f"{left},{right}->{out}".replace("s", "k")
    d.call(op, equation, operands)


# -- pictures -------------------------------------------------------------------------------------


def picture(d: Draw, sides: int) -> Any:
    """[batch, 4, height, width] without tokens, mostly; or tokens with as many dimensions."""
    if d.chance(0.2):
        layout = d.layout(rank=sides + 2)
        return d.value(layout), [label.size for label in layout]
    names = ("frames", "height", "width")[-sides:]
    layout = (axis("batch", d.world.batch), plain(4), *(axis(n, d.pick(4, 6)) for n in names))
    return d.value(layout), [label.size for label in layout]


@cases("conv1d", "conv2d", "conv3d", "conv_transpose2d", "convolution")
def convolution(d: Draw, op: Any) -> None:
    sides = {A.conv1d: 1, A.conv3d: 3}.get(op, 2)
    x, sizes = picture(d, sides)
    kernel, out = d.pick(1, 2), d.pick(4, sizes[0])
    shape = [out, sizes[1]] if op is not A.conv_transpose2d else [sizes[1], out]
    weight = d.value([*shape, *[kernel] * sides])
    step = [kernel] * sides
    if op is A.convolution:
        d.call(op, x, weight, None, step, [0] * sides, [1] * sides, False, [0] * sides, 1)
    else:
        d.call(
            getattr(op, "input" if op is A.conv_transpose2d else "default"), x, weight, None, step
        )


@cases(
    "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "_upsample_nearest_exact2d",
    "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa", "avg_pool2d",
    "avg_pool3d", "max_pool2d", "adaptive_avg_pool2d", "pixel_shuffle", "pixel_unshuffle",
)  # fmt: skip
def spatial(d: Draw, op: Any) -> None:
    name = str(op).partition(".")[2]
    sides = 3 if name.endswith("3d") else 2
    x, sizes = picture(d, sides)
    if "upsample" in name:
        corners = [False] if "linear" in name or "cubic" in name else []
        d.call(op.default, x, [2 * s for s in sizes[2:]], *corners)
    elif "pixel" in name:
        d.call(op, x, 2)
    else:
        d.call(op, x, [2] * sides)


# -- quantized ------------------------------------------------------------------------------------


def _rows_of_features(d: Draw, features: int) -> Layout:
    """[rows and tokens, features], mostly."""
    factors: list[Any] = [*d.rows(), Tokens(d.segments())]
    if d.chance(0.1):
        d.rng.shuffle(factors)
    return (fold([Label((f,)) for f in factors]), plain(features))


@cases("_int_mm")
def integer_product(d: Draw, op: Any) -> None:
    x = _rows_of_features(d, 4) if d.chance(0.7) else d.layout(rank=2)
    weight: Any = [x[1].size, out_features(d)]
    if d.chance(0.2):
        weight = (x[1], of(d.image))
    d.call(op, d.value(x, torch.int8, 5.0), d.value(weight, torch.int8, 5.0))


@cases("_scaled_mm")
def scaled_product(d: Draw, op: Any) -> None:
    x = _rows_of_features(d, 16) if d.chance(0.8) else d.layout(rank=2, features=16)
    float8 = torch.float8_e4m3fn
    scale: Any = (x[0], ONE) if d.chance(0.6) else [x[0].size, 1] if d.chance(0.5) else [1]
    weight = d.value([16, x[1].size], float8)
    d.case.values[weight.name] = d.case.values[weight.name].t()
    other = d.value([1, 16] if scale != [1] else [1], torch.float32)
    first = d.value(x, float8)
    d.call(op, first, weight, d.value(scale, torch.float32), other, out_dtype=torch.bfloat16)


@cases("_weight_int8pack_mm")
def packed_bytes(d: Draw, op: Any) -> None:
    x = _rows_of_features(d, 32) if d.chance(0.8) else d.layout(rank=2, features=32)
    weight = d.value([16, x[1].size], torch.int8, 5.0)
    d.call(op, d.value(x, torch.float32), weight, d.value([16], torch.float32))


@cases("_weight_int4pack_mm_for_cpu")
def packed_nibbles(d: Draw, op: Any) -> None:
    x = _rows_of_features(d, 64) if d.chance(0.8) else d.layout(rank=2, features=64)
    seeded = torch.Generator().manual_seed(d.rng.randrange(100))
    weight = torch.randint(0, 16, (32, x[1].size), generator=seeded, dtype=torch.int32)
    packed = d.value([1])
    d.case.values[packed.name] = A._convert_weight_to_int4pack_for_cpu(weight, 1)
    scales = d.value([x[1].size // 32, 32, 2], torch.bfloat16)
    d.call(op, d.value(x, torch.bfloat16), packed, 32, scales)


def _blocks(d: Draw, layout: Layout) -> list[int]:
    """Blocks of one scale each: one for each token, mostly."""
    whole = [x.size if x.is_plain or d.chance(0.1) else 1 for x in layout]
    return [d.pick(b, b, b, 1, x.size) for b, x in zip(whole, layout, strict=True)]


def choose(d: Draw, op: Any) -> None:
    layout = d.layout()
    blocks = _blocks(d, layout)
    x = d.value(layout, torch.float32)
    if op is torch.ops.torchao.choose_scale_float8:
        d.call(op, x, blocks)
        return
    keep = {"keepdim": True} if d.chance(0.5) else {}
    d.call(op, x, "SYMMETRIC", blocks, torch.int8, -128, 127, **keep)


def quantize(d: Draw, op: Any) -> None:
    layout = d.layout()
    blocks = _blocks(d, layout)
    labels = [x if b == 1 else plain(x.size // b) for b, x in zip(blocks, layout, strict=True)]
    if d.chance(0.2):
        labels = [plain(x.size) for x in labels]
    if d.chance(0.3):
        labels = [x for b, x in zip(blocks, labels, strict=True) if b == 1]
    scale = d.value(tuple(labels), torch.float32)
    d.case.values[scale.name].abs_().add_(0.01)
    integers = op is torch.ops.torchao.dequantize_affine
    x = d.value(layout, torch.int8 if integers else torch.float32, 20.0 if integers else 1.0)
    zero = d.value(tuple(labels), torch.int32, 3.0)
    d.call(op, x, blocks, scale, zero, torch.int8, -128, 127)


def add_torchao() -> None:
    """Generators for the operators of torchao, if that is installed."""
    try:
        import torchao.quantization.quant_primitives  # noqa: F401
    except ImportError:
        return
    for name, function in (
        ("choose_qparams_affine", choose), ("choose_scale_float8", choose),
        ("quantize_affine", quantize), ("dequantize_affine", quantize),
    ):  # fmt: skip
        target = getattr(torch.ops.torchao, name)
        GENERATORS[f"torchao.{name}"] = lambda d, f=function, t=target: f(d, t)  # type: ignore[misc]


add_torchao()
