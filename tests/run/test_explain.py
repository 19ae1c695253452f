"""`explain`: every attention appears, with its reason where it is left alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import toma_fx
from tests import denoisers
from tests.methods.test_methods import inputs, model
from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import capture
from toma_fx.methods.toma import ToMAConfig
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
    assert "single_transformer_blocks.1" in text
    assert "ideal speed-up" in text
    data = json.loads(report.to_json())
    assert len(data["rows"]) == 6
    row = data["rows"][0]
    assert (row["tokens"], row["merged"], row["grid"], row["window"]) == (256, 64, [16, 16], "4x4")
    assert data["ideal_speedup"] == pytest.approx(data["flops_before"] / data["flops_after"])
    assert report.flops_before > report.flops_refresh > report.flops_after


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
