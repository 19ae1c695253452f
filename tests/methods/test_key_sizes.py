"""Attention that weighs merged keys by their sizes, and merging of keys alone by any method."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toma_fx
from tests import denoisers, reference
from tests.graphs import text as graph_text
from tests.methods.test_methods import inputs as picture_inputs
from tests.methods.test_methods import model as picture_model
from tests.methods.test_methods import run_onnx
from tests.passes.test_rewrite import captured_block
from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import capture
from toma_fx.errors import ConfigError, NoMergeSites
from toma_fx.methods.config import make_config
from toma_fx.methods.setting import Place, Setting
from toma_fx.methods.toma import ToMAConfig
from toma_fx.passes.pipeline import rewrite
from toma_fx.passes.uses import REUSE
from toma_fx.plan.planner import make_plan

GRID = (4, 4)
N, C = 16, 8


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# -- sizes of each method -------------------------------------------------------------------------

SIZED: dict[str, dict[str, Any]] = {
    "toma": {"tile": 4, "scale": 5.0},
    "tomesd": {},
    "tomesd, some": {"ratio": 0.2},
    "tofu": {"prune_depth": 1.0},
    "retom": {},
    "retom, some": {"ratio": 0.3},
    "todo": {"downsample": "average", "factor": 3},
    "todo, area": {"downsample": "area", "factor": 2},
    "random": {},
}


@pytest.mark.parametrize("title", SIZED)
def test_sizes_are_what_each_merged_token_stands_for(title: str) -> None:
    """Read off what `unmerge` gives every token, or `merge` takes for a mean: counted apart."""
    name = title.partition(",")[0]
    config = make_config(method=name, options={"min_tokens": 1, **SIZED[title]})
    setting = config.setting(Place((8, 10), (8, 10)))
    assert isinstance(setting, Setting)
    x = torch.randn(2, 80, C, generator=torch.Generator().manual_seed(3))
    pattern = dict(zip(setting.chosen, setting.select(x), strict=True))
    pattern |= dict(zip(setting.weighed, setting.weights(x, pattern), strict=True))
    sizes, count = setting.sizes(pattern), setting.merged_count
    if name == "todo":
        shares = setting.merge(torch.eye(80)[None], pattern)
        want = 1 / shares.amax(-1)
    else:
        # what each token gets of each merged one: columns of the unmerge matrix
        want = setting.unmerge(torch.eye(count).expand(2, -1, -1), pattern).sum(1)
    torch.testing.assert_close(sizes.expand(want.shape), want, rtol=1e-4, atol=1e-4)
    if title != "todo, area":  # whose windows overlap
        torch.testing.assert_close(sizes.sum(-1), torch.full((len(sizes),), 80.0))
    assert sizes.max() > sizes.min() or title in ("retom", "todo, area"), "sizes differ"


def test_every_built_in_method_has_sizes_and_pinv_has_none() -> None:
    for cls in toma_fx.methods.config.METHODS:
        cls(proportional=True)
    with pytest.raises(ConfigError, match="pinv"):
        ToMAConfig(proportional=True, inverse="pinv")
    with pytest.raises(ConfigError, match="True or False"):
        ToMAConfig(proportional=1)  # type: ignore[arg-type]


# -- groups of equal tokens: merging loses nothing ------------------------------------------------


class Attention(nn.Module):
    """Pre-norm attention with text and a mask, as the flags say."""

    def __init__(self, text: int = 0, mask: str = "", written_out: bool = False) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.text, self.mask, self.written_out = text, mask, written_out

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        n = self.norm(x)
        n = torch.cat([text, n], 1) if self.text else n
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(n).chunk(3, -1))
        if self.written_out:
            y = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if self.mask else None)
        return x + self.out(y.transpose(1, 2).flatten(2)[:, self.text :])


def equal_groups(seed: int = 0) -> Tensor:
    """Tokens [2, 16, C] whose groups of 1 to 4 in cells of 2x2 are equal, others far apart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *GRID, C, generator=generator)
    for row, column, size in ((0, 0, 4), (0, 2, 2), (2, 0, 3), (2, 2, 1)):
        for i in range(1, size):
            x[:, row + i // 2, column + i % 2] = x[:, row, column]
    return x.flatten(1, 2)


R = 3 + 1 + 2
"""Tokens of `equal_groups` that are like their destination."""


def call_of(text: int, mask: str) -> tuple[Tensor, Tensor, Tensor]:
    x = equal_groups()
    keep = torch.ones(2, 1, 1, text + N, dtype=torch.bool)
    keep[:, ..., text + 11] = False  # a token that is a group by itself
    if text:
        keep[1, ..., 0] = False
    bias = torch.where(keep, 0.0, -3.0) if mask == "float" else keep
    return x, torch.randn(2, 3, C, generator=torch.Generator().manual_seed(9)), bias


@pytest.mark.parametrize("scope", ["sublayer", "block", "keys"])
@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize("mask", ["", "bool", "float"])
def test_equal_tokens_merge_without_loss(scope: Any, text: int, mask: str) -> None:
    """Merged or not, attention is the same, and without the sizes it isn't."""
    torch.manual_seed(1)
    model = Attention(text, mask).eval()
    call = call_of(text, mask)
    want, errors = model(*call), {}
    for proportional in (False, True):
        config = toma_fx.ToMeSDConfig(
            ratio=R / N, scope=scope, min_tokens=1, grid=GRID, proportional=proportional
        )
        optimized = toma_fx.optimize(model, method=config)
        if mask and scope == "keys":
            with pytest.raises(NoMergeSites, match="laid out for all keys"):
                optimized(*call)
            return
        errors[proportional] = denoisers.relative(optimized(*call), want)
    assert errors[True] < 1e-5 < 1e-3 < errors[False]


# -- graphs ---------------------------------------------------------------------------------------


ADDED = """\
- scaled_dot_product_attention: float32[1, 2, 16, 4] = aten.scaled_dot_product_attention(transpose, transpose_1, transpose_2)
+ sum_dim_int_list: float32[1, 4, 2] = aten.sum.dim_IntList(pattern_p0_unmerge, [-2], dtype=torch.float32)
+ flatten_using_ints_2: float32[1, 8] = aten.flatten.using_ints(sum_dim_int_list, 1)
+ log_default: float32[1, 8] = aten.log(flatten_using_ints_2)
+ view_default: float32[1, 1, 1, 8] = aten.view(log_default, [1, 1, 1, 8])
+ scaled_dot_product_attention: float32[1, 2, 16, 4] = aten.scaled_dot_product_attention(transpose, transpose_1, transpose_2, view_default)"""  # noqa: E501


def test_graph_before_and_after() -> None:
    captured, analysis, flow = captured_block()
    lines: list[list[str]] = []
    for proportional in (False, True):
        config = ToMAConfig(min_tokens=4, tile=2, scope="keys", proportional=proportional)
        program = rewrite(captured, analysis, flow, make_plan(analysis, flow, config), REUSE)
        lines.append(graph_text(program.graph_module).splitlines())
    without, with_sizes = lines
    gone = [f"- {line}" for line in without if line not in with_sizes]
    assert [*gone, *(f"+ {x}" for x in with_sizes if x not in without)] == ADDED.splitlines()


def test_sites_of_one_pattern_share_what_is_added() -> None:
    captured = capture(denoisers.flux(), (), denoisers.flux_inputs(8, 8))
    analysis, flow = analyze(captured)
    plan = make_plan(analysis, flow, ToMAConfig(min_tokens=16, proportional=True))
    graph = rewrite(captured, analysis, flow, plan, REUSE).graph_module.graph
    logs = [n for n in graph.nodes if "aten.log.default" in str(n.target)]
    masks = [n.args[3] for n in graph.nodes if "dot_product" in str(n.target)]
    assert len(logs) == len({*masks}) == 1
    assert len(masks) == 4


class Named(Setting):
    """A setting that does not say its sizes."""

    merged_count = 8

    def describe(self) -> str:
        return ""

    def merge(self, x: Tensor, pattern: Any) -> Tensor:
        return x[:, ::2]

    def unmerge(self, y: Tensor, pattern: Any) -> Tensor:
        return y.repeat_interleave(2, 1)

    def positions(self, pattern: Any) -> Tensor:
        return torch.arange(0, 16, 2).unsqueeze(0)


class NamedConfig(toma_fx.MethodConfig):
    """Its configuration."""

    name = "named"

    def setting(self, place: Place) -> Setting:
        return Named(place.grid)


def test_twins_are_refused_with_the_reason() -> None:
    call = call_of(0, "")
    written = Attention(written_out=True).eval()
    fields: dict[str, Any] = {"min_tokens": 1, "grid": GRID, "scope": "sublayer"}
    toma_fx.optimize(written, method="tomesd", **fields)(*call)
    with pytest.raises(NoMergeSites, match="attention is written out"):
        toma_fx.optimize(written, method="tomesd", proportional=True, **fields)(*call)
    model = Attention().eval()
    toma_fx.optimize(model, method=NamedConfig, **fields)(*call)
    with pytest.raises(NoMergeSites, match="does not say how many tokens"):
        toma_fx.optimize(model, method=NamedConfig, proportional=True, **fields)(*call)
    setting = NamedConfig().setting(Place(GRID, GRID))
    with pytest.raises(ConfigError, match=r"Named\.sizes"):
        setting.sizes({})


# -- whole models against an eager implementation -------------------------------------------------


@contextmanager
def weighed(sizes: Callable[[], Tensor], text: int) -> Iterator[None]:
    """Attention over `text` keys and as many as there are sizes adds their logarithms.

    Written on attention itself, and by loops over the batch.
    """
    plain = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        size = sizes()
        if key.shape[-2] != text + size.shape[1]:
            return plain(query, key, value, **options)
        assert options.get("attn_mask") is None
        rows = []
        for b in range(len(query)):
            scores = query[b] @ key[b].transpose(-1, -2) / query.shape[-1] ** 0.5
            scores[..., text:] += torch.log(size[b % len(size)])
            rows.append(torch.softmax(scores, -1) @ value[b])
        return torch.stack(rows)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


@pytest.mark.parametrize("scope", ["sublayer", "stack"])
def test_whole_models_equal_an_eager_implementation(
    scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest: list[reference.Pattern] = []
    make = reference.make_pattern

    def recorded(*args: Any) -> reference.Pattern:
        newest[:] = [make(*args)]
        return newest[0]

    monkeypatch.setattr(reference, "make_pattern", recorded)
    options: dict[str, Any] = {
        "scope": scope, "tile": (4, 4), "min_tokens": 60, "scale": 20.0, "share": "stream"
    }  # fmt: skip
    s = reference.Settings((4, 4), 8, scale=20.0, scope=scope)
    for model, call, text in (
        (denoisers.small_sdxl(), denoisers.small_sdxl_inputs(), 0),
        (denoisers.small_flux(), denoisers.small_flux_inputs(), 5),
    ):
        got = toma_fx.optimize(model, **options, proportional=True)(**call)[0]
        plain = toma_fx.optimize(model, **options)(**call)[0]
        with weighed(lambda: newest[0].unmerge.sum(1), text):
            if text:
                want = reference.reference_flux(model, (8, 8), dataclasses.replace(s), call)
            else:
                want = reference.reference_unet(model, {64: s})(**call)[0]
        assert denoisers.relative(got, want) < 1e-5
        assert denoisers.relative(plain, want) > 1e-4, "sizes matter"


@pytest.mark.parametrize("proportional", [False, True])
def test_keys_by_content_equal_an_eager_implementation(proportional: bool) -> None:
    """ToDo's placement with ToMA's pattern: queries whole, keys and values merged by dense maps."""
    model, call = denoisers.small_sdxl(), denoisers.small_sdxl_inputs()
    options: dict[str, Any] = {
        "scope": "keys", "share": "block", "tile": (4, 4), "min_tokens": 60, "scale": 20.0
    }  # fmt: skip
    optimized = toma_fx.optimize(model, **options, proportional=proportional)
    got = optimized(**call)[0]
    plain, s = F.scaled_dot_product_attention, reference.Settings((4, 4), 8, scale=20.0)
    seen: list[reference.Pattern] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if not seen:
            return plain(query, key, value, **options)
        p = seen.pop()
        merge = p.merge.unsqueeze(1)
        bias = torch.log(p.unmerge.sum(1))[:, None, None] if proportional else None
        return plain(query, merge @ key, merge @ value, attn_mask=bias)

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        if x.shape[1] == 64:
            seen.append(reference.make_pattern(x, [(8, 8)], s))

    eager = copy.deepcopy(model)
    attentions = [m for name, m in eager.named_modules() if name.endswith("attn1")]
    for module in attentions:
        module.register_forward_pre_hook(hook, with_kwargs=True)
    F.scaled_dot_product_attention = attention
    try:
        want = eager(**call)[0]
    finally:
        F.scaled_dot_product_attention = plain
    assert denoisers.relative(got, want) < 1e-5
    assert denoisers.relative(model(**call)[0], want) > 1e-4
    groups = optimized.specializations[0].plan.groups
    assert len(groups) == len(optimized.specializations[0].plan.segments) > 1


def test_compiled_and_exported() -> None:
    """Keys alone, weighed: programs trace, compile without recompilation, and run in ONNX."""
    fields: dict[str, Any] = {"scope": "keys", "min_tokens": 1, "proportional": True}
    optimized = toma_fx.optimize(picture_model(), method="toma", **fields)
    steps = [optimized(**picture_inputs()).clone() for _ in range(2)]
    optimized.reset()
    compiled = toma_fx.optimize(picture_model(), method="toma", **fields)
    compiled = compiled.compile(backend="aot_eager")
    for want in steps:
        assert denoisers.relative(compiled(**picture_inputs()), want) < 1e-5
    exported = toma_fx.export.export_programs(optimized, picture_inputs())
    assert list(exported) == ["refresh", "reuse"]
    for program, want in zip(exported.values(), steps, strict=True):
        assert denoisers.relative(run_onnx(program)[0], want) < 1e-5
