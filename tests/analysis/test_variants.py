"""What users do to denoisers: quantize, adapt, mask, cast, other shapes. Each merges right, or says
why not."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, TorchAoConfig
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import toma_fx
from tests import denoisers
from tests.capture.test_lora import add
from tests.zoo import CASES
from tests.zoo.base import Case, Inputs, randn
from tests.zoo.check import FRESH, Traced, difference, permuted, trace
from toma_fx.analysis.rules.base import RULES
from toma_fx.capture.model import flatten_call
from toma_fx.passes.pipeline import rewrite
from toma_fx.passes.uses import REFRESH

EXACT = 2e-5


# -- what every variant is asked ------------------------------------------------------------------


def traced(model: nn.Module, make: Callable[[int], Inputs], **config: Any) -> Traced:
    """A captured variant; with merging off it equals the eager one bit by bit on fresh inputs."""
    return trace(Case("variant", "a variant", lambda: model, make, config=config))


def sites(found: Traced) -> Counter[str]:
    return Counter(site.kind for site in found.analysis.sites)


def merged(found: Traced) -> Counter[str]:
    """Kinds of the branches that merge one by one, and how many segments merge whole."""
    plan = found.plan(scope="sublayer")
    streams = {stream.name: stream.branches for stream in found.analysis.streams}
    kinds = Counter("+".join(streams[s.stream][i].kinds) for s in plan.segments for i in s.branches)
    kinds["stack"] = len(found.plan(scope="stack").segments)
    return kinds


def check(found: Traced, plain: Traced | None = None, exact: float = EXACT) -> None:
    """The variant merges where the plain model does, passes the permutation oracle, and changes."""
    if plain is not None:
        assert sites(found) == sites(plain)
        assert merged(found) == merged(plain)
    for scope in ("sublayer", "stack"):
        permuted(found, scope, exact)
    out = found.run(found.plan(), "refresh")
    assert [x.dtype for x in out] == [x.dtype for x in found.expected]
    assert all(torch.isfinite(x).all() for x in out)
    assert difference(out, found.expected) > 1e-4


def unet(**changes: Any) -> Any:
    """SDXL's shape with one level of attention."""
    return denoisers.small_sdxl(**{"cross_attention_dim": 32, **changes})


def unet_call(seed: int) -> Inputs:
    inputs = denoisers.sdxl_inputs(16, 16, seed=seed)
    inputs["encoder_hidden_states"] = denoisers.sdxl_inputs(seed=seed)["encoder_hidden_states"]
    g = torch.Generator().manual_seed(seed)
    return {**inputs, "encoder_hidden_states": torch.randn(2, 5, 32, generator=g)}


def flux() -> Any:
    return denoisers.flux(num_layers=1, num_single_layers=1, joint_attention_dim=32, in_channels=16)


def flux_call(seed: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    return {
        **denoisers.flux_inputs(8, 8, seed=seed),
        "hidden_states": torch.randn(2, 64, 16, generator=g),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=g),
    }


SMALL = {"unet": (unet, unet_call), "flux": (flux, flux_call)}


@functools.cache
def plain(name: str) -> Traced:
    """The model as it comes."""
    build, make = SMALL[name]
    return traced(build(), make)


# -- tiny modules ---------------------------------------------------------------------------------

GRID, N, C, HEADS = (4, 6), 24, 16, 4
WIDTH = C // HEADS


def image(seed: int) -> Tensor:
    return randn(seed, 2, N, C)


class Tiny(nn.Module):
    """Linear maps, and a forward given as a function."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.run = nn.LayerNorm(C), run
        self.blocks = nn.ModuleDict({name: nn.Linear(C, C) for name in "qkvo"})
        self.blocks["wide"], self.blocks["back"] = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.few = nn.Linear(C, C // 2)
        self.q_norm, self.k_norm = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.eval().requires_grad_(False)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, WIDTH)).transpose(1, 2)

    def qkv(self, x: Tensor, source: Tensor) -> list[Tensor]:
        """[B, heads, N, width] each."""
        return [self.heads(self.blocks[n](x if n == "q" else source)) for n in "qkv"]

    def out(self, x: Tensor) -> Tensor:
        return self.blocks["o"](x.transpose(1, 2).flatten(2))

    def attention(self, x: Tensor, source: Tensor | None = None, **options: Any) -> Tensor:
        q, k, v = self.qkv(x, x if source is None else source)
        return self.out(F.scaled_dot_product_attention(q, k, v, **options))

    def mlp(self, x: Tensor) -> Tensor:
        return self.blocks["back"](F.gelu(self.blocks["wide"](x)))

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.run(self, **inputs)


def residual(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A block with a branch to try, and an MLP."""

    def run(m: Tiny, x: Tensor, **others: Tensor) -> Tensor:
        x = x + inner(m, m.norm(x), **others)
        return x + m.mlp(m.norm(x))

    return run


def tiny(run: Callable[..., Tensor], **others: Callable[[int], Tensor]) -> Traced:
    """A captured tiny module; `others` make its further inputs from a seed."""

    def make(seed: int) -> Inputs:
        return {"x": image(seed), **{name: other(seed) for name, other in others.items()}}

    return traced(Tiny(run), make, grid=GRID)


def check_tiny(found: Traced, kind: str = "attention") -> None:
    """The branch to try merges as well as the MLP, in one segment."""
    assert merged(found) == {kind: 1, "mlp": 1, "stack": 1}, found.analysis.refusals
    check(found)


OWN_TABLES: dict[str, Callable[..., Tensor]] = {
    "a mask made of the tokens": lambda m, n: m.attention(
        n, attn_mask=m.blocks["v"](n)[:, None, None, :, 0]
    ),
    "one table at two ranks": lambda m, n: (
        m.attention(n) * torch.linspace(0.5, 1, n.shape[1])[:, None]
        + (
            m.blocks["v"](n).unflatten(2, (2, -1)).transpose(1, 2)
            * torch.linspace(0.5, 1, n.shape[1])[:, None]
        )
        .transpose(1, 2)
        .flatten(2)
    ),
}


@pytest.mark.parametrize("name", OWN_TABLES)
@torch.no_grad()
def test_tables_of_the_tokens_themselves_and_tables_used_twice(name: str) -> None:
    check(tiny(residual(OWN_TABLES[name])))


# -- quantized ------------------------------------------------------------------------------------

TORCHAO = {
    "int8 weights": ("Int8WeightOnlyConfig", EXACT),
    "float8 weights": ("Float8WeightOnlyConfig", EXACT),
    # noise of float32 may round a token to the next integer
    "int8 activations": ("Int8DynamicActivationInt8WeightConfig", 2e-2),
    "float8 activations": ("Float8DynamicActivationFloat8WeightConfig", 5e-2),
}


def torchao(model: nn.Module, config: str, **options: Any) -> Any:
    """The model with the linear layers of its blocks quantized by torchao."""
    library = pytest.importorskip("torchao.quantization")

    def chosen(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and "blocks" in path

    library.quantize_(model, getattr(library, config)(**options), filter_fn=chosen)
    return model


@pytest.fixture
def float8_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao asks for a GPU before it multiplies in float8; the product itself runs here."""
    api = pytest.importorskip("torchao.quantization.quant_api")
    monkeypatch.setattr(api, "_check_hardware_support", lambda granularity: None)


@pytest.mark.parametrize("kind", TORCHAO)
@pytest.mark.parametrize("name", ["flux", "unet"])
@pytest.mark.usefixtures("float8_on_the_cpu")
@torch.no_grad()
def test_torchao(name: str, kind: str) -> None:
    config, exact = TORCHAO[kind]
    options: dict[str, Any] = {}
    model, make = SMALL[name][0](), SMALL[name][1]
    if kind == "float8 activations":
        options["granularity"] = pytest.importorskip("torchao.quantization").PerRow()
        model, make = model.to(torch.bfloat16), in_dtype(make, torch.bfloat16)
    check(traced(torchao(model, config, **options), make), plain(name), exact)


@pytest.mark.parametrize("kind", ["int8 activations", "float8 activations"])
@pytest.mark.usefixtures("float8_on_the_cpu")
@torch.no_grad()
def test_one_scale_for_all_tokens_is_refused(kind: str) -> None:
    library = pytest.importorskip("torchao.quantization")
    model = torchao(
        Tiny(residual(Tiny.attention)).to(torch.bfloat16),
        TORCHAO[kind][0],
        granularity=library.PerTensor(),
    )
    found = traced(model, lambda seed: {"x": image(seed).bfloat16()}, grid=GRID)
    with pytest.raises(toma_fx.NoMergeSites, match="one scale over the"):
        found.plan()


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("block", [C, C // 2])
@torch.no_grad()
def test_scales_of_a_token_or_a_part_of_it(block: int, keepdim: bool) -> None:
    """Rounded to 15 levels and back; one scale for `block` channels."""
    pytest.importorskip("torchao.quantization")
    ops, blocks = torch.ops.torchao, [1, 1, block]

    def inner(m: Tiny, n: Tensor) -> Tensor:
        dtypes = torch.float32, torch.int32, keepdim
        form = "SYMMETRIC", blocks, torch.int8, -7, 7, 1e-6
        scale, zero = ops.choose_qparams_affine(n, *form, *dtypes)
        rounded = ops.quantize_affine(n, blocks, scale, zero, torch.int8, -7, 7)
        return m.attention(ops.dequantize_affine(rounded, blocks, scale, zero, torch.int8, -7, 7))

    found = tiny(residual(inner))
    assert sum(merged(found).values()) == 3, found.analysis.refusals
    check(found)


@torch.no_grad()
def test_torchao_as_diffusers_loads_it(tmp_path: Any) -> None:
    """In bfloat16, which its loader asks for; weights are shared, and running changes nothing."""
    kind = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
    config = TorchAoConfig(kind, modules_to_not_convert=["embedder", "norm", "norm_context"])
    flux().save_pretrained(tmp_path)
    model = FluxTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=config, torch_dtype=torch.bfloat16
    )
    make = in_dtype(flux_call, torch.bfloat16)
    off, optimized = toma_fx.optimize(model, ratio=0), toma_fx.optimize(model, min_tokens=16)
    want = model(**make(1))[0]
    assert torch.equal(off(**make(1))[0], want)
    outs = [optimized(**make(seed))[0] for seed in (1, 2)]
    assert all(torch.isfinite(out).all() for out in outs)
    assert denoisers.relative(outs[0], want) > 1e-3
    weight = model.transformer_blocks[0].attn.to_q.weight
    assert type(weight).__name__ == "Int8Tensor"
    (found,) = optimized.specializations
    graph = found.captured.graph_module
    held = {x.data_ptr() for x in (*graph.parameters(), *graph.buffers())}
    assert weight.qdata.data_ptr() in held
    assert torch.equal(model(**make(1))[0], want)


@torch.no_grad()
def test_adapters_on_int8_weights_are_captured_once() -> None:
    model = torchao(denoisers.flux(num_layers=1, num_single_layers=0), "Int8WeightOnlyConfig")
    call = denoisers.flux_inputs(4, 4)
    for i, name in enumerate("ab"):
        add(model, name, i)
    optimized = toma_fx.optimize(model, ratio=0)
    for name in "aba":
        model.set_adapters([name])
        assert torch.equal(optimized(**call)[0], model(**call)[0])
    assert optimized.cache.captures == 2


@pytest.mark.parametrize("kind", [kind for kind in TORCHAO if "float8 act" not in kind])
@torch.no_grad()
def test_torchao_compiled(kind: str) -> None:
    model = torchao(flux(), TORCHAO[kind][0])
    eager = toma_fx.optimize(model, min_tokens=16)
    compiled = toma_fx.optimize(model, min_tokens=16).compile(backend="aot_eager")
    for seed in (1, 2):
        got, want = compiled(**flux_call(seed))[0], eager(**flux_call(seed))[0]
        assert denoisers.relative(got, want) < 1e-3
    assert eager.specializations[0].plan.segments


def in_dtype(make: Callable[[int], Inputs], dtype: torch.dtype) -> Callable[[int], Inputs]:
    """The same call with all but position ids in `dtype`."""

    def cast(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cast(k, v) for k, v in value.items()}
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floats and not name.endswith("ids") else value

    return lambda seed: cast("", make(seed))


# -- custom operators -----------------------------------------------------------------------------


@torch.library.custom_op("toma_variants::gemm_4bit", mutates_args=())
def gemm_4bit(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """x [..., C] by a weight of which each byte holds two numbers of four bits."""
    weight = torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(x.dtype) - 8
    return x @ (weight * scale[:, None].to(x.dtype)).T


@gemm_4bit.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.custom_op("toma_variants::first_token", mutates_args=())
def first_token(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x[:, :1] * scale.sum()


@first_token.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 1, x.shape[2])


class Linear4bit(nn.Module):
    """A linear layer in four bits, as bitsandbytes keeps it."""

    def __init__(self, source: nn.Linear, flat: bool) -> None:
        super().__init__()
        scale = source.weight.abs().amax(1) / 7
        digits = ((source.weight / scale[:, None]).round() + 8).to(torch.uint8)
        self.register_buffer("packed", digits[:, ::2] | digits[:, 1::2] << 4)
        self.register_buffer("scale", scale)
        self.bias, self.flat = source.bias, flat

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]) if self.flat else x
        y = torch.ops.toma_variants.gemm_4bit(rows, self.packed, self.scale)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias


def in_four_bits(model: Any, flat: bool) -> Any:
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "blocks" in path:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, Linear4bit(module, flat))
    return model.eval()


@pytest.fixture
def rules() -> Iterator[None]:
    """Declarations of the test are forgotten."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize(
    ("name", "flat"),
    [
        ("unet", True),
        ("flux", False),
        ("unet", False),
        ("flux", True),
    ],
)
@pytest.mark.usefixtures("rules")
@torch.no_grad()
def test_a_declared_custom_op_merges(name: str, flat: bool) -> None:
    build, make = SMALL[name]
    toma_fx.tokenwise("toma_variants::gemm_4bit")
    check(traced(in_four_bits(build(), flat), make), plain(name))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.usefixtures("rules")
@torch.no_grad()
def test_attention_of_a_declared_custom_op(batch: int) -> None:
    """Folded with the batch or, where it is 1, without."""

    def run(m: Tiny, x: Tensor) -> Tensor:
        return x + m.attention(m.norm(x))

    toma_fx.tokenwise("toma_variants::gemm_4bit")
    model = in_four_bits(Tiny(run), flat=True)
    found = traced(model, lambda seed: {"x": randn(seed, batch, N, C)}, grid=GRID)
    assert merged(found) == {"attention": 1, "stack": 1}, found.analysis.refusals
    check(found)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_an_undeclared_custom_op_is_refused_by_name(name: str) -> None:
    build, make = SMALL[name]
    found = traced(in_four_bits(build(), flat=False), make)
    with pytest.raises(toma_fx.NoMergeSites, match=r"toma_variants\.gemm_4bit"):
        found.plan()


@pytest.mark.usefixtures("rules")
@torch.no_grad()
def test_a_wrong_declaration_is_refused() -> None:
    """What is declared token-wise but makes one token of many; the MLP behind it merges."""
    toma_fx.tokenwise("toma_variants::first_token")

    def inner(m: Tiny, n: Tensor) -> Tensor:
        y = m.attention(n)
        return y * torch.ops.toma_variants.first_token(y, m.norm.weight, m.norm.bias)

    found = tiny(residual(inner))
    assert merged(found) == {"mlp": 1, "stack": 1}
    (rejection,) = found.plan().rejections
    assert "another shape (toma_variants.first_token" in rejection.reason
    check(found)


# -- adapters, fused projections, processors ------------------------------------------------------


def with_adapters(model: Any, names: Sequence[str], **options: Any) -> Any:
    for i, name in enumerate(names):
        add(model, name, i, **options)
    model.set_adapters(list(names))
    return model


def sliced(model: Any) -> Any:
    model.set_attention_slice(1)
    return model


def fused(model: Any) -> Any:
    model.fuse_qkv_projections()
    return model


def processed(model: Any) -> Any:
    model.set_attn_processor(AttnProcessor())
    return model


def checkpointing(model: Any) -> Any:
    model.enable_gradient_checkpointing()
    return model


CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "unet, DoRA": ("unet", lambda m: with_adapters(m, ["a"], use_dora=True)),
    "unet, two adapters": ("unet", lambda m: with_adapters(m, ["a", "b"])),
    "unet, fused QKV": ("unet", fused),
    "unet, softmax": ("unet", processed),
    "unet, softmax in float32": ("unet", lambda m: processed(unet(upcast_attention=True))),
    "unet, float32 attention": ("unet", lambda m: unet(upcast_attention=True)),
    "unet, gradient checkpointing": ("unet", checkpointing),
    "flux, DoRA": ("flux", lambda m: with_adapters(m, ["a"], use_dora=True)),
    "flux, two adapters": ("flux", lambda m: with_adapters(m, ["a", "b"])),
    "flux, fused QKV": ("flux", fused),
    "flux, gradient checkpointing": ("flux", checkpointing),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_model(change: str) -> None:
    name, act = CHANGES[change]
    build, make = SMALL[name]
    check(traced(act(build()), make), plain(name))


@pytest.mark.parametrize("name", ["unet", "sd15"])
@torch.no_grad()
def test_attention_written_out(name: str) -> None:
    """baddbmm, softmax, bmm, as the older processor does: self and cross."""
    build, make = {
        **SMALL,
        "sd15": (denoisers.sd15, lambda seed: denoisers.sd15_inputs(seed=seed)),
    }[name]
    found = traced(processed(build()), make)
    count = sum(type(m).__name__ == "BasicTransformerBlock" for m in found.model.modules())
    assert sites(found) == {"self": count, "cross": count}
    assert sum(merged(found).values()) - merged(found)["stack"] == 3 * count
    check(found)


@pytest.mark.parametrize("name", ["sd3", "pixart_sigma", "cogvideox", "aura_flow", "hunyuan_dit"])
@torch.no_grad()
def test_fused_projections_of_other_families(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    check(traced(fused(case.build()), case.inputs, **case.config), trace(case))


# -- masks ----------------------------------------------------------------------------------------

TEXT = 5


def bias(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: randn(seed + 50, *shape)


def visible(*shape: int) -> Callable[[int], Tensor]:
    """Which keys each query sees; the first key is always seen."""

    def make(seed: int) -> Tensor:
        seen = randn(seed + 50, *shape) > 0
        seen[..., 0] = True
        return seen

    return make


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((2, 1, 1, TEXT), visible), ((2, 1, N, TEXT), bias), ((1, HEADS, N, TEXT), visible)],
)
@torch.no_grad()
def test_masks_of_cross_attention(shape: tuple[int, ...], kind: Any) -> None:
    def run(m: Tiny, x: Tensor, mask: Tensor, text: Tensor) -> Tensor:
        x = x + m.attention(m.norm(x), text, attn_mask=mask)
        return x + m.mlp(m.norm(x))

    found = tiny(run, mask=kind(*shape), text=lambda seed: randn(seed + 90, 2, TEXT, C))
    check_tiny(found, "cross")


@pytest.mark.parametrize(
    ("shape", "kind"), [((N, N), visible), ((2, 1, N, N), bias), ((2, HEADS, N, N), visible)]
)
@torch.no_grad()
def test_masks_of_attention_written_out(shape: tuple[int, ...], kind: Any) -> None:
    def inner(m: Tiny, n: Tensor, mask: Tensor) -> Tensor:
        q, k, v = m.qkv(n, n)
        scores = q @ k.transpose(-1, -2) / WIDTH**0.5
        scores = scores.masked_fill(~mask, -1e4) if mask.dtype == torch.bool else scores + mask
        return m.out(scores.softmax(-1) @ v)

    found = tiny(residual(inner), mask=kind(*shape))
    assert sum(merged(found).values()) == 3
    check(found)


@torch.no_grad()
def test_masks_as_a_unet_takes_them() -> None:
    """What is padded in the text, and for every query in the image, gets -10000."""

    def make(seed: int) -> Inputs:
        masks = {"encoder_attention_mask": visible(2, TEXT)(seed)}
        return {**unet_call(seed), **masks}

    found = traced(unet(), make)
    assert merged(found) == merged(plain("unet"))
    check(found)


@torch.no_grad()
def test_a_window_of_neighbors_made_in_the_model() -> None:
    def inner(m: Tiny, n: Tensor) -> Tensor:
        at = torch.arange(n.shape[1])
        return m.attention(n, attn_mask=(at[:, None] - at[None]).abs() < 7)

    check_tiny(tiny(residual(inner)))


# -- attention written out ------------------------------------------------------------------------


def by_einsum(m: Tiny, n: Tensor) -> Tensor:
    q, k, v = m.qkv(n, n)
    shares = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return m.out(torch.einsum("bhij,bhjd->bhid", shares, v))


@torch.no_grad()
def test_attention_by_einsum() -> None:
    check_tiny(tiny(residual(by_einsum)))


# -- heads ----------------------------------------------------------------------------------------


def few_heads(m: Tiny, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 4 heads, keys and values of 2."""
    return m.heads(m.blocks["q"](x)), m.heads(m.few(x)), m.heads(m.few(x) + 1)


def grouped(repeat: Callable[[Tensor], Tensor]) -> Callable[[Tiny, Tensor], Tensor]:
    def inner(m: Tiny, n: Tensor) -> Tensor:
        q, k, v = few_heads(m, n)
        return m.out(F.scaled_dot_product_attention(q, repeat(k), repeat(v)))

    return inner


def by_expansion(x: Tensor) -> Tensor:
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, 2, n, d).reshape(b, 2 * h, n, d)


def enabled(m: Tiny, n: Tensor) -> Tensor:
    return m.out(F.scaled_dot_product_attention(*few_heads(m, n), enable_gqa=True))


def normed(norm: Callable[[Tiny, Tensor, str], Tensor]) -> Callable[[Tiny, Tensor], Tensor]:
    def inner(m: Tiny, n: Tensor) -> Tensor:
        q, k, v = m.qkv(n, n)
        return m.out(F.scaled_dot_product_attention(norm(m, q, "q"), norm(m, k, "k"), v))

    return inner


def normed_whole(m: Tiny, n: Tensor) -> Tensor:
    """Over all heads at once, before they are told apart (Wan, LTX)."""
    q, k, v = (m.blocks[name](n) for name in "qkv")
    q, k = F.rms_norm(q, (C,)), F.layer_norm(k, (C,))
    return m.out(F.scaled_dot_product_attention(m.heads(q), m.heads(k), m.heads(v)))


INNER: dict[str, Callable[..., Tensor]] = {
    "GQA by flag": enabled,
    "GQA by repeat_interleave": grouped(lambda x: x.repeat_interleave(2, 1)),
    "GQA by repeat": grouped(lambda x: x.repeat(1, 2, 1, 1)),
    "GQA by expand": grouped(by_expansion),
    "QK norm, rms and layer": normed(lambda m, x, name: getattr(m, f"{name}_norm")(x)),
    "QK norm, unit length": normed(lambda m, x, _: F.normalize(x, dim=-1) * 3),
    "QK norm, in float32": normed(lambda m, x, _: F.rms_norm(x.float(), (WIDTH,)).type_as(x)),
    "QK norm before the heads": normed_whole,
}


@pytest.mark.parametrize("name", INNER)
@torch.no_grad()
def test_heads(name: str) -> None:
    check_tiny(tiny(residual(INNER[name])))


# -- rotary embeddings ----------------------------------------------------------------------------

Turn = Callable[[Tensor, Tensor], Tensor]


def angles(table: Tensor) -> Tensor:
    """[..., width] -> [..., width / 2]"""
    return table[..., : WIDTH // 2]


def as_complex(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * torch.polar(torch.ones_like(angles(table)), angles(table))
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def in_halves(x: Tensor, table: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = (torch.cat([f(angles(table))] * 2, -1) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-second, first], -1) * sin


def in_pairs(x: Tensor, table: Tensor) -> Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    cos, sin = (f(angles(table)).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def in_strides(x: Tensor, table: Tensor) -> Tensor:
    """Written into an empty tensor, as Wan does."""
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], angles(table).cos(), angles(table).sin()
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def by_matrices(x: Tensor, table: Tensor) -> Tensor:
    """[cos, -sin; sin, cos] for each pair, as the original code of Flux does."""
    cos, sin = angles(table).cos(), angles(table).sin()
    turn = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (turn[..., 0] * pairs[..., 0] + turn[..., 1] * pairs[..., 1]).reshape(x.shape)


def each_axis(x: Tensor, table: Tensor) -> Tensor:
    """Half of the channels turn by the row, half by the column; tables are made in the model."""
    at = torch.arange(N)
    rows, columns = in_pairs_by(x[..., :2], at // GRID[1]), in_pairs_by(x[..., 2:], at % GRID[1])
    return torch.cat([rows, columns], -1)


def in_pairs_by(x: Tensor, position: Tensor) -> Tensor:
    angle = position[:, None] * torch.tensor([1.0])
    return torch.stack(
        [x[..., 0::2] * angle.cos() - x[..., 1::2] * angle.sin(),
         x[..., 0::2] * angle.sin() + x[..., 1::2] * angle.cos()], -1
    ).flatten(-2)  # fmt: skip


TURNS: dict[str, Turn] = {
    "complex": as_complex,
    "halves": in_halves,
    "pairs": in_pairs,
    "strides": in_strides,
    "matrices": by_matrices,
}
TABLES = {"table": (N, WIDTH), "a batch of tables": (2, 1, N, WIDTH)}


def rotated(turn: Turn, tokens_first: bool) -> Callable[..., Tensor]:
    """Queries and keys are turned; laid out [B, N, heads, width] or [B, heads, N, width]."""

    def inner(m: Tiny, n: Tensor, table: Tensor) -> Tensor:
        q, k, v = m.qkv(n, n)
        if tokens_first:
            table = table[..., None, :] if table.dim() == 2 else table.transpose(1, 2)
            q, k = (turn(x.transpose(1, 2), table).transpose(1, 2) for x in (q, k))
        else:
            q, k = turn(q, table), turn(k, table)
        return m.out(F.scaled_dot_product_attention(q, k, v))

    return inner


@pytest.mark.parametrize(
    ("table", "tokens_first"),
    [
        ("table", False),
        ("a batch of tables", True),
        ("table", True),
        ("a batch of tables", False),
    ],
)
@pytest.mark.parametrize("turn", TURNS)
@torch.no_grad()
def test_rotary(turn: str, table: str, tokens_first: bool) -> None:
    found = tiny(residual(rotated(TURNS[turn], tokens_first)), table=bias(*TABLES[table]))
    check_tiny(found)


@torch.no_grad()
def test_rotary_of_each_axis() -> None:
    found = tiny(residual(rotated(each_axis, tokens_first=False)), table=bias(N, WIDTH))
    check_tiny(found)


# -- attention that is not followed ---------------------------------------------------------------


def in_autocast(m: Tiny, n: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out = m.attention(n)
    return out.float()


def by_flex(m: Tiny, n: Tensor) -> Tensor:
    return m.out(flex_attention(*m.qkv(n, n)))


def by_slices(m: Tiny, n: Tensor) -> Tensor:
    """A piece of batch and heads at a time, as attention slicing does."""
    q, k, v = (x.flatten(0, 1) for x in m.qkv(n, n))
    parts = [
        (q[i : i + 2] @ k[i : i + 2].transpose(1, 2)).softmax(-1) @ v[i : i + 2]
        for i in range(0, len(q), 2)
    ]
    return m.out(torch.cat(parts).unflatten(0, (-1, HEADS)))


NOT_FOLLOWED = {
    "autocast": (in_autocast, "wrap_with_autocast"),
    "flex": (by_flex, "flex_attention"),
    "slices": (by_slices, "a range of the batch of tokens"),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
@torch.no_grad()
def test_attention_that_is_not_followed(name: str) -> None:
    """It stays whole, with its reason in the analysis; the MLP merges and is right."""
    inner, reason = NOT_FOLLOWED[name]
    found = tiny(residual(inner))
    assert merged(found) == {"mlp": 1, "stack": 1}
    assert any(reason in str(refused) for refused in found.analysis.refusals.values())
    check(found, exact=2e-2 if name == "autocast" else EXACT)


def between(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A branch to try between two MLPs."""

    def run(m: Tiny, x: Tensor) -> Tensor:
        return residual(inner)(m, x + m.mlp(m.norm(x)))

    return run


@pytest.mark.parametrize("place", [between, residual])
@pytest.mark.parametrize("name", NOT_FOLLOWED)
@torch.no_grad()
def test_attention_that_is_not_followed_is_reported(name: str, place: Any) -> None:
    inner, reason = NOT_FOLLOWED[name]
    rejections = tiny(place(inner)).plan().rejections
    assert any(reason in rejection.reason for rejection in rejections)


@pytest.mark.parametrize("name", NOT_FOLLOWED)
@torch.no_grad()
def test_a_model_of_attention_that_is_not_followed(name: str) -> None:
    inner, reason = NOT_FOLLOWED[name]
    with pytest.raises(toma_fx.NoMergeSites, match=reason):
        tiny(lambda m, x: x + inner(m, m.norm(x))).plan()


@torch.no_grad()
def test_attention_slicing_of_a_unet() -> None:
    found = traced(sliced(unet()), unet_call)
    assert merged(found) == {"mlp": 3, "stack": 3}
    check(found)


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("unet", torch.float16),
        ("flux", torch.bfloat16),
        ("unet", torch.bfloat16),
        ("flux", torch.float16),
    ],
    ids=str,
)
@torch.no_grad()
def test_half_precision_is_near_float32(name: str, dtype: torch.dtype) -> None:
    """With the same patterns, merged in half precision is nearly what is merged in float32."""
    build, make = SMALL[name]
    whole, half = plain(name), traced(build().to(dtype), in_dtype(make, dtype))
    assert merged(half) == merged(whole)
    plan = whole.plan()
    program = rewrite(whole.captured, whole.analysis, whole.flow, plan, REFRESH)
    count = len(program.gives)
    patterns = program.graph_module(*flatten_call((), make(FRESH))[0])[-count:]
    want = whole.run(plan, "reuse", *patterns)
    cast = [p.to(dtype) if p.is_floating_point() else p for p in patterns]
    (got,) = half.run(half.plan(), "reuse", *cast)
    assert got.dtype == dtype
    unmerged = difference(half.expected, whole.expected)
    assert difference([got], want) < 3 * max(unmerged, 1e-2)
    assert difference(want, whole.expected) > 3 * difference([got], want)


def added_in_float32(m: Tiny, x: Tensor) -> Tensor:
    """Each sum in float32, what goes on in bfloat16 (Wan)."""
    gate = torch.full((C,), 0.7)
    for branch in (m.attention, m.mlp):
        x = (x.float() + branch(m.norm(x)) * gate).type_as(x)
    return x


def kept_in_float32(m: Tiny, x: Tensor) -> Tensor:
    """The stream in float32, branches in bfloat16."""
    x = x.float()
    for branch in (m.attention, m.mlp):
        y = branch(m.norm(x.bfloat16()))
        x = x + y.float()
    return x


@pytest.mark.parametrize("run", [added_in_float32, kept_in_float32])
@torch.no_grad()
def test_stream_in_float32_around_branches_in_bfloat16(run: Callable[..., Tensor]) -> None:
    model = Tiny(run).to(torch.bfloat16)
    found = traced(model, lambda seed: {"x": image(seed).bfloat16()}, grid=GRID)
    assert [len(stream.branches) for stream in found.analysis.streams] == [2]
    assert merged(found) == {"attention": 1, "mlp": 1, "stack": 1}
    check(found, exact=2e-2)


@pytest.mark.parametrize("name", ["flux", "unet"])
@torch.no_grad()
def test_autocast_around_a_call(name: str) -> None:
    """Merging is refused by name; without merging the outputs are the model's, in and out."""
    build, make = SMALL[name]
    model = build()
    off, merging = toma_fx.optimize(model, ratio=0), toma_fx.optimize(model, min_tokens=16)
    for region in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=region):
            got, want = off(**make(1))[0], model(**make(1))[0]
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
    assert off.cache.captures == 2
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(toma_fx.TomaError, match="autocast"):
        merging(**make(1))
    assert denoisers.relative(merging(**make(1))[0], model(**make(1))[0]) > 1e-3


@torch.no_grad()
def test_region_without_autocast_in_the_model() -> None:
    def inner(m: Tiny, n: Tensor) -> Tensor:
        q, k, v = m.qkv(n, n)
        with torch.autocast("cpu", enabled=False):
            q, k = F.rms_norm(q.float(), (WIDTH,)), F.rms_norm(k.float(), (WIDTH,))
        return m.out(F.scaled_dot_product_attention(q, k, v))

    check_tiny(tiny(residual(inner)))


# -- shapes ---------------------------------------------------------------------------------------

CALLS = [(1, (7, 9), 3), (2, (13, 11), 5), (3, (5, 31), 1), (4, (8, 8), 17)]
"""Batch, token grid and length of the text."""


@torch.no_grad()
def test_sizes_alternate_in_one_module() -> None:
    """More sizes than are kept: the one unused longest goes, and each is right when it is back."""
    model = denoisers.flux(num_layers=1, num_single_layers=1)
    optimized = toma_fx.optimize(model, min_tokens=16, max_signatures=2)
    firsts: dict[Any, Tensor] = {}
    for batch, grid, text in CALLS[:3] * 2:
        inputs = denoisers.flux_inputs(*grid, batch=batch, text=text)
        optimized.reset()
        got = optimized(**inputs)[0]
        assert torch.equal(got, firsts.setdefault(grid, got))
        assert denoisers.relative(got, model(**inputs)[0]) > 1e-4
        assert len(optimized.specializations) <= 2
        (group,) = optimized.specializations[-1].plan.groups
        assert (group.setting.grid, group.batch) == (grid, batch)
        assert all(g % t == 0 for g, t in zip(grid, group.setting.tile, strict=True))
    assert optimized.cache.captures == 6
    for batch, grid, text in CALLS[1:3]:
        optimized(**denoisers.flux_inputs(*grid, batch=batch, text=text))
    assert optimized.cache.captures == 6, "the last two are kept"


@pytest.mark.parametrize(
    ("batch", "grid", "text"),
    CALLS,
)
@torch.no_grad()
def test_odd_shapes(batch: int, grid: tuple[int, int], text: int) -> None:
    model = denoisers.flux(num_layers=1, num_single_layers=1)
    found = traced(model, lambda s: denoisers.flux_inputs(*grid, batch=batch, text=text, seed=s))
    assert merged(found) == merged(plain("flux"))
    check(found)


@pytest.mark.parametrize(
    ("batch", "height", "width"),
    [(1, 14, 18), (3, 26, 22), (4, 10, 62)],
)
@torch.no_grad()
def test_odd_shapes_of_a_unet(batch: int, height: int, width: int) -> None:
    build, _ = SMALL["unet"]

    def make(seed: int) -> Inputs:
        text = randn(seed, batch, 7, 32)
        inputs = denoisers.sdxl_inputs(height, width, batch, seed)
        return {**inputs, "encoder_hidden_states": text}

    found = traced(build(), make)
    assert merged(found) == merged(plain("unet"))
    check(found)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@torch.no_grad()
def test_place_of_the_image_in_a_joint_stream(place: str) -> None:
    """One stream of text and image: both blocks merge, the text stays."""
    order = {"first": "xyz", "middle": "yxz", "last": "yzx"}[place]
    start = {"first": 0, "middle": TEXT, "last": TEXT + 3}[place]

    def run(m: Tiny, **inputs: Tensor) -> Tensor:
        joined = torch.cat([inputs[name] for name in order], 1)
        for _ in range(2):
            joined = joined + m.attention(m.norm(joined))
            joined = joined + m.mlp(m.norm(joined))
        return joined[:, start : start + N]

    others = {"y": lambda s: randn(s + 1, 2, TEXT, C), "z": lambda s: randn(s + 2, 2, 3, C)}
    found = tiny(run, **others)
    assert sites(found) == {"joint": 2}
    assert merged(found) == {"attention": 2, "mlp": 2, "stack": 1}
    check(found)


# -- video ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, (2, 4, 4)], ids=["default", "space-time"])
@torch.no_grad()
def test_windows_of_a_video(tile: Any) -> None:
    """Default windows lie in one frame each; those of two frames keep what is best of both."""
    case = next(c for c in CASES if c.name == "wan")

    def make(seed: int) -> Inputs:
        inputs = case.inputs(seed)
        batch, channels, *_ = inputs["hidden_states"].shape
        return {**inputs, "hidden_states": randn(seed, batch, channels, 4, 16, 8)}

    found = traced(case.build(), make, tile=tile)
    assert merged(found) == merged(traced_case("wan"))
    check(found)
    (group,) = found.plan().groups
    depth, height, width = group.setting.tile
    assert group.setting.grid == (4, 8, 4)
    assert (depth, height, width) == (tile or (1, height, width))
    program = rewrite(found.captured, found.analysis, found.flow, found.plan(), REFRESH)
    results = program.graph_module(*flatten_call((), make(FRESH))[0])
    index = results[-len(program.gives)]
    assert index.shape[-2:] == (
        math.prod((4, 8, 4)) // (depth * height * width),
        group.setting.keep,
    )
    of_each = F.one_hot(index // (height * width), depth).sum(-2)
    if tile is None:
        assert of_each.shape[-1] == 1
    else:
        assert (of_each > 0).all(-1).any(), "destinations in both frames of a window"
        assert (of_each[..., 0] != of_each[..., 1]).any(), "not as many in the one as in the other"


@functools.cache
def traced_case(name: str) -> Traced:
    return trace(next(c for c in CASES if c.name == name))
