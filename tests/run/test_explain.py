"""`explain`: every attention appears, with its reason where it is left alone."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from torch import nn

import toma_fx
from tests import denoisers
from tests.methods.test_methods import inputs, model
from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import capture
from toma_fx.errors import NoMergeSites, OffloadError
from toma_fx.methods.toma import ToMAConfig
from toma_fx.models.named import example_inputs
from toma_fx.plan.grouping import pattern_of
from toma_fx.plan.plan import MergePlan
from toma_fx.plan.planner import make_plan


def test_sdxl_sites_streams_and_kinds() -> None:
    analysis, _ = analyzed_sdxl()
    kinds = [s.kind for s in analysis.sites]
    # one layer at the first resolution (1 down, 2 up), two at the second (1 down, mid, 2 up)
    assert (kinds.count("self"), kinds.count("cross")) == (3 + 8, 3 + 8)
    assert [len(s.branches) for s in analysis.streams] == [3, 6, 6, 6, 6, 3, 3]
    assert all(b.rejected is None for s in analysis.streams for b in s.branches)
    kinds_of = [b.kinds for b in analysis.streams[1].branches]
    assert kinds_of == [("attention",), ("cross",), ("mlp",)] * 2
    assert [b.block for b in analysis.streams[1].branches] == [0, 0, 0, 1, 1, 1]


def test_flux_is_one_stream_of_joint_attention() -> None:
    analysis, _ = analyze(capture(denoisers.flux(), (), denoisers.flux_inputs(8, 12)))
    assert [s.kind for s in analysis.sites] == ["joint"] * 4
    assert {s.query for s in analysis.sites} == {
        "[encoder_hidden_states 5 | hidden_states 96 (8x12)]"
    }
    (stream,) = analysis.streams
    kinds = [b.kinds for b in stream.branches]
    assert kinds == [("attention",), ("mlp",)] * 2 + [("attention", "mlp")] * 2


@pytest.mark.parametrize("scope", ["sublayer", "block", "stack"])
def test_every_attention_is_merged_or_rejected_with_a_reason(scope: str) -> None:
    report = toma_fx.explain(
        denoisers.sdxl(),
        denoisers.sdxl_inputs(),
        scope=scope,
        min_tokens=200,
        exclude="up_blocks.1.*.attn2",
    )
    analysis, _ = analyzed_sdxl()
    merged = {row.site for row in report.rows}
    rejected = {r.node: r.reason for r in report.rejections}
    assert merged.isdisjoint(rejected)
    assert {s.node for s in analysis.sites} <= merged | set(rejected)
    assert all(rejected.values())
    assert sum("fewer than min_tokens" in r for r in rejected.values()) == 24
    assert sum("exclude" in r for r in rejected.values()) == 2


def test_table_and_json() -> None:
    report = toma_fx.explain(denoisers.flux(), denoisers.flux_inputs(), ratio=0.75)
    text = str(report)
    assert "256 -> 64" in text
    assert "single_transformer_blocks.*" in text
    assert "ideal speed-up" in text
    data = json.loads(report.to_json())
    assert len(data["rows"]) == 6
    row = data["rows"][0]
    assert (row["tokens"], row["merged"], row["grid"], row["window"]) == (256, 64, [16, 16], "4x4")
    assert data["ideal_speedup"] == pytest.approx(data["flops_before"] / data["flops_after"])
    assert report.flops_before > report.flops_refresh > report.flops_after


@cache
def sdxl_report() -> toma_fx.Report:
    return toma_fx.explain(denoisers.sdxl(), denoisers.sdxl_inputs(), min_tokens=200)


def test_what_is_alike_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    report = sdxl_report()
    monkeypatch.setenv("COLUMNS", "140")
    lines = str(report).splitlines()
    merged = [line.split() for line in lines if "256 -> 128" in line]
    assert [line[:2] for line in merged] == [
        ["*.transformer_blocks.0.attn1", "3x"],
        ["*.transformer_blocks.0.attn2", "3x"],
        ["*.0.ff.net", "3x"],
    ]
    assert sum(int(line[-1].rstrip("%")) for line in merged) in (99, 100, 101)
    left = [line for line in lines if "64 tokens, fewer than min_tokens=200" in line]
    assert [line.split()[:2] for line in left] == [
        ["*.transformer_blocks.*.attn1", "8x"],
        ["*.transformer_blocks.*.attn2", "8x"],
        ["*.ff.net", "8x"],
    ]
    full, tree = str(report.full()), str(report.tree())
    for row in report.rows:
        assert row.module in full
    assert full.count("fewer than min_tokens=200") == tree.count("left alone") == 24
    assert tree.count("256 -> 128 tokens") == len(report.rows) == 9
    assert repr(report).startswith("<Report: 9 merged branches, whole model 0.183 -> 0.157 GFLOP")
    assert len(repr(toma_fx.summary(denoisers.sdxl()))) < 80


def test_patterns_fit_what_they_stand_for() -> None:
    for paths, pattern in (
        (["blocks.0.attn", "blocks.7.attn"], "blocks.*.attn"),
        (["blocks.0.attn", "mid.attn"], "*.attn"),
        (["down.1.attentions.0.attn", "mid.attentions.0.attn"], "*.attentions.0.attn"),
        (["mid.block.attn"], "mid.block.attn"),
        (["", ""], ""),
        (["a.b", "c.d"], "*"),
        (["down_blocks.1.transformer_blocks.0.attn1"] * 2, "*.transformer_blocks.0.attn1"),
    ):
        assert pattern_of(paths) == pattern
        assert all(fnmatchcase(path, pattern) for path in paths)


def test_tables_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    report = sdxl_report()
    for columns in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, str(report).splitlines())) <= columns
    assert "<pre" in report._repr_html_()
    assert "256 -&gt; 128" in report._repr_html_()


def test_a_notebook_shows_a_report_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consoles of rich display what they print there, as well as write it."""
    shown = list[Any]()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *args: shown.append(args))
    report = sdxl_report()
    assert "256 -&gt; 128" in report._repr_html_()
    assert "256 -> 128" in str(report)
    assert "256 -> 128" in str(report.full())
    assert not shown
    Console(file=StringIO()).print(report)
    assert shown, "what the test would notice"


def test_the_page_of_a_report() -> None:
    report = sdxl_report()
    page = report.to_html("SDXL <small>")
    assert "<h1>SDXL &lt;small&gt;</h1>" in page
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    bars = [e for e in svg.iter("rect") if e.find("title") is not None]
    assert len(bars) == 2 * len(report.rows), "before and after"
    cost = [float(bar.get("height", 0)) for bar in bars]
    for row, before, after in zip(report.rows, cost[::2], cost[1::2], strict=True):
        assert after / before == pytest.approx(row.flops_after / row.flops_before, rel=0.2)
    for reason in {r.reason for r in report.rejections}:
        assert page.count(reason) == 3


def test_an_optimized_model_is_explained_as_it_is() -> None:
    optimized: Any = toma_fx.optimize(model(), ratio=0.25, min_tokens=1)
    assert {r.merged for r in toma_fx.explain(optimized, inputs()).rows} == {72}
    with optimized.using(ratio=0.75):
        assert {r.merged for r in toma_fx.explain(optimized, inputs()).rows} == {24}
    report = toma_fx.explain(optimized, inputs(), toma=True, min_tokens=1)
    assert {r.merged for r in report.rows} == {48}, "unless it is asked for something else"
    assert len(toma_fx.explain(model(), inputs(), min_tokens=1).rows) == len(report.rows)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_without_weights(family: str) -> None:
    """On the meta device, as of the model with weights."""
    real: Any = getattr(denoisers, family)()
    with torch.device("meta"):
        bare = type(real).from_config(real.config).eval()
    size = (128, 128) if family == "sdxl" else (64, 64)
    reports = [
        toma_fx.explain(module, example_inputs(module, *size, text=8), min_tokens=4)
        for module in (real, bare)
    ]
    assert reports[0] == reports[1]
    half = type(real).from_config(real.config).eval()
    half.register_parameter("extra", nn.Parameter(torch.empty(2, device="meta")))
    with pytest.raises(OffloadError, match="extra"):
        toma_fx.explain(half, example_inputs(real, *size, text=8), min_tokens=4)
    optimized: Any = toma_fx.optimize(bare, min_tokens=4)
    with pytest.raises(OffloadError, match="not loaded"):
        optimized(**example_inputs(bare, *size, text=8))


def test_a_refusal_says_what_is_alike_once() -> None:
    with pytest.raises(NoMergeSites) as error:
        toma_fx.explain(denoisers.sdxl(), denoisers.sdxl_inputs(), min_tokens=5000)
    assert "*.transformer_blocks.*.attn1 (attention, 8x): 64 tokens, fewer" in str(error.value)
    assert len(str(error.value)) < 800


def test_larger_scopes_need_fewer_flops() -> None:
    inputs = denoisers.flux_inputs()
    flops = [
        toma_fx.explain(denoisers.small_flux(), inputs, scope=s).flops_after
        for s in ("sublayer", "block", "stack")
    ]
    assert flops == sorted(flops, reverse=True)
    assert len(set(flops)) == 3


@cache
def analyzed_sdxl() -> Any:
    return analyze(capture(denoisers.sdxl(), (), denoisers.sdxl_inputs()))


def plan_of(**options: Any) -> MergePlan:
    return make_plan(*analyzed_sdxl(), ToMAConfig(**{"min_tokens": 60, **options}))


def test_options_select_what_merges() -> None:
    assert {s.kinds for s in plan_of(branches="attention").segments} == {("attention",)}
    paths = [m for s in plan_of(include="mid_block.*").segments for m in s.modules]
    assert paths
    assert all(p.startswith("mid_block.") for p in paths)
    plan = plan_of(overrides={"mid_block.*": {"ratio": 0.25}})
    merged = {s.modules[0].split(".")[0]: s.setting.merged_count for s in plan.segments[1:4]}
    assert merged == {"down_blocks": 32, "mid_block": 48, "up_blocks": 32}
    for share, groups in (("stream", 7), ("block", 11), ("branch", 33)):
        assert len(plan_of(scope="sublayer", share=share).groups) == groups


def test_presets_follow_the_publication() -> None:
    sdxl = toma_fx.PRESETS["paper-sdxl"]
    flux = toma_fx.PRESETS["paper-flux"]
    for preset in (sdxl, flux):
        assert preset.scope == "sublayer"
        assert (preset.destinations_every, preset.weights_every) == (10, 5)
    plan = make_plan(*analyzed_sdxl(), sdxl)
    assert {s.setting.tile for s in plan.segments} == {(2, 2)}, "64 tiles of a 16x16 grid"


def test_a_mean_tile_of_a_bucket_is_shown() -> None:
    """A grid of odd sides has no tile of the wanted sides; the nearest that divides is shown."""
    call = denoisers.small_sdxl_inputs(52, 38, batch=1)
    report = toma_fx.explain(denoisers.small_sdxl(), call, min_tokens=60)
    assert {r.grid for r in report.rows} == {(26, 19)}
    tiles = [(r.grid, tuple(map(int, r.window.split("x")))) for r in report.rows]
    assert all(g[0] % t[0] == g[1] % t[1] == 0 for g, t in tiles)


def test_the_graphs_between_passes_are_written_on_demand(tmp_path: Path) -> None:
    """Each run of passes has a folder: the graph before, after each pass, the list of passes."""
    toma_fx.explain(model(), inputs(), min_tokens=1, dump=tmp_path)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert [name.rpartition("_")[2] for name in folders] == ["capture", "reuse", "refresh"]
    last = tmp_path / folders[-1]
    names = [path.name for path in sorted(last.glob("*.txt"))]
    assert names[:3] == ["00_input.txt", "01_provide_patterns.txt", "02_merge_segments.txt"]
    assert "facility_location" not in (last / names[0]).read_text()
    assert "facility_location" in (last / names[1]).read_text()
    assert "ProvidePatterns(1 groups): " in (last / "passes.txt").read_text()
    before = set(tmp_path.iterdir())
    toma_fx.explain(model(), inputs(), min_tokens=1)
    assert set(tmp_path.iterdir()) == before, "only on demand"
