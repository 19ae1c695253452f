"""Every method in the one rewrite: by name, compiled, exported, with states, and one from outside
the package. What each computes is tested by itself and in test_methods_reference."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import toma_fx
from tests import denoisers
from tests.denoisers import relative
from tests.examples import load_example
from tests.zoo.base import lively, randn
from toma_fx.errors import (
    ConfigError,
    DynamicError,
    ModelTypeError,
    NoMergeSites,
    RewriteError,
    SignatureError,
    UnknownNameError,
)
from toma_fx.export import Exported
from toma_fx.methods.config import METHODS, PRESETS, make_config, method_names
from toma_fx.methods.setting import Pattern

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods.md"
BUILT_IN = (
    "bigain", "ca-tome", "coredit", "dito", "grid", "ibtm", "random", "retom", "todo", "tofu",
    "toma", "tomesd", "topi",
)  # fmt: skip
SIGNALS = ("dito", "ibtm")
"""Those that select on what the step before gave, by a kind of program of their own."""
GRID = (8, 12)


own_method = load_example("own_method")
ALL = (*(name for name in BUILT_IN if name != "topi"), "salient")
"""Those that merge a picture that is alone; test_topi has the other."""
CLASSES = {cls.name: cls for cls in (*METHODS, own_method.SalientConfig)}


@cache
def model() -> nn.Module:
    """The smallest model there is: one block with rotary positions."""
    torch.manual_seed(0)
    return lively(load_example("own_model").PictureDenoiser(GRID, width=16, heads=2, depth=1))


def inputs(seed: int = 1, timestep: float = 800.0, batch: int = 2) -> dict[str, Any]:
    sample = randn(seed, batch, 4, 2 * GRID[0], 2 * GRID[1])
    return {"sample": sample, "timestep": torch.full((batch,), timestep)}


@cache
def static(name: str) -> toma_fx.MethodConfig:
    """A configuration of static shapes of each method, merging all it can."""
    fields: dict[str, Any] = {"min_tokens": 1}
    if name != "todo":
        fields |= {"scope": "block", "branches": ("attention", "mlp"), "destinations_every": 2}
    if name in ("toma", "grid", "random", "coredit", *SIGNALS):
        fields |= {"weights_every": 2}
    if name == "ca-tome":
        fields |= {"checkpoints": None}
        return toma_fx.calibrate(model(), [inputs(1), inputs(2)], threshold=0.5, **fields)
    return make_config(method=CLASSES[name], options=fields)


# -- by name --------------------------------------------------------------------------------------


def test_methods_by_name() -> None:
    assert sorted(method_names()) == list(BUILT_IN)
    for name in BUILT_IN:
        config = make_config(method=name)
        assert type(config) is CLASSES[name]
        assert config.name == name
        assert make_config(method=CLASSES[name]) == make_config(method=config) == config
    assert make_config(method="toma") == make_config() == PRESETS["default"]


def test_the_page_has_every_built_in_method() -> None:
    rows = re.findall(r"^\| (`.+?) \| (`.+?) \|", PAGE.read_text(), re.M)
    shown = [re.findall(r"`([\w-]+)`", cell) for row in rows for cell in row]
    pairs = {
        (name, cls)
        for names, classes in zip(shown[::2], shown[1::2], strict=True)
        for name, cls in zip(names, classes, strict=False)
        if cls.endswith("Config")
    }
    assert pairs == {(cls.name, cls.__name__) for cls in METHODS}


def test_a_class_of_a_user_is_no_name_and_replaces_none() -> None:
    class Tomesd(own_method.SalientConfig):
        name = "tomesd"

    assert type(make_config(method="tomesd")) is toma_fx.ToMeSDConfig
    assert type(make_config(method=Tomesd)) is Tomesd
    with pytest.raises(UnknownNameError, match="method=MyConfig"):
        make_config(method="salient")
    with pytest.raises(UnknownNameError, match="it is an option of todo"):
        make_config(method=Tomesd, options={"factor": 2, "window": 4})


@dataclass(frozen=True, kw_only=True)
class NeedsWindow(toma_fx.MethodConfig):
    """A method with an option that has no default."""

    window: int

    def setting(self, place: toma_fx.Place) -> str:
        return f"window {self.window}"


def test_options_of_a_class_are_its_fields() -> None:
    options = {"window": 3, "scope": "block"}
    assert make_config(method=NeedsWindow, options=options) == NeedsWindow(window=3, scope="block")


def test_every_method_says_what_it_does() -> None:
    for name in BUILT_IN:
        cls = CLASSES[name]
        texts = [c.__doc__ or "" for c in cls.__mro__ if c.__module__.startswith("toma_fx.methods")]
        text = " ".join(texts)
        for word in ("Selects", "Merges", "Unmerges", "Cost", "arXiv"):
            assert word in text, f"{name} does not say: {word}"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"method": "tome-sd"}, "tomesd"),
        ({"method": "toma", "options": {"sx": 2}}, "tomesd"),
        ({"method": "tomesd", "options": {"tile": 4}}, "toma"),
        ({"method": "tomesd", "options": {"ration": 0.4}}, "ratio"),
        ({"method": "todo", "options": {"ratio": 0.4}}, "tomesd"),
        ({"toma": "tomesd"}, "method='tomesd'"),
        ({"method": "todo", "options": {"downsample": "nearst"}}, "nearest"),
        ({"method": "ca-tome", "options": {"checkpoints": "config-9"}}, "config-"),
    ],
)
def test_unknown_names_get_the_nearest(arguments: dict[str, Any], hint: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        make_config(**arguments)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "ca-tome", "options": {"threshold": 1.2}},
        {"method": "ca-tome", "options": {"threshold": -1.01}},
        {"method": "ca-tome", "options": {"threshold": float("nan")}},
        {"method": "tomesd", "options": {"ratio": 1.0}},
        {"method": "tomesd", "options": {"sx": 0}},
        {"method": "todo", "options": {"factor": 0}},
        {"method": "tomesd", "options": {"select_at": (0, -1)}},
        {"method": 3},
        {"method": int},
        {"method": toma_fx.MethodConfig},
        {"toma": "paper-sdxl", "method": "tomesd"},
        {"toma": toma_fx.ToMAConfig(), "method": "tomesd"},
        {"toma": 3},
    ],
)
def test_bad_values_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_config(**arguments)


def test_off() -> None:
    for config in (
        make_config(False),
        make_config(method="tomesd", options={"ratio": 0.0}),
        make_config(method="todo", options={"factor": 1}),
        make_config(method="ca-tome", options={"threshold": 1.0}),
    ):
        assert not config.merges
        assert torch.equal(
            toma_fx.optimize(model(), method=config)(**inputs()), model()(**inputs())
        )


# -- in the one rewrite ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_compiled_without_recompilation(name: str) -> None:
    """One graph per program, none added while steps go on, and what the eager programs give."""
    eager = toma_fx.optimize(model(), method=static(name))
    compiled = toma_fx.optimize(model(), method=static(name)).compile(backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    for step in range(6):
        call = inputs(seed=step, timestep=800.0 - step)
        want, plain = eager(**call), model()(**call)
        assert relative(compiled(**call), want) < 1e-5
        assert relative(want, plain) > 1e-3, "it merges"
    graphs = {"todo": 1} | dict.fromkeys(SIGNALS, 3)
    assert counters["stats"]["unique_graphs"] == graphs.get(name, 2)
    assert sum(counters["graph_break"].values()) == 0
    assert sum(compiled.totals.values()) == 6


def run_onnx(exported: Exported, opset: int = 20) -> list[Tensor]:
    """Outputs of an exported program in ONNX Runtime."""
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    made = torch.onnx.export(exported.program, dynamo=True, opset_version=opset, verbose=False)
    assert made is not None
    assert {d.version for d in made.model_proto.opset_import if not d.domain} == {opset}
    session = ort.InferenceSession(
        made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    tensors = [x for x in exported.example if isinstance(x, Tensor)]
    names = [i.name for i in session.get_inputs()]
    assert len(names) == len(tensors)
    feed = {n: np.ascontiguousarray(x.numpy()) for n, x in zip(names, tensors, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, feed)]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_exported_to_onnx(name: str) -> None:
    """Every program of the schedule gives in ONNX Runtime what it gives in process."""
    optimized = toma_fx.optimize(model(), method=static(name))
    steps = [optimized(**inputs()).clone() for _ in range(2)]
    optimized.reset()
    exported = toma_fx.export.export_programs(optimized, inputs())
    match = ["match"] if name in SIGNALS else []
    assert list(exported) == (["reuse"] if name == "todo" else ["refresh", *match, "reuse"])
    programs = [program for kind, program in exported.items() if kind != "match"]
    for program, want in zip(programs, steps[-len(programs) :], strict=True):
        got = run_onnx(program)
        assert len(got) == 1 + len(program.gives)
        assert relative(got[0], want) < 1e-5
    assert relative(steps[0], model()(**inputs())) > 1e-3, "it merges"


@pytest.mark.parametrize("name", ["tomesd", "salient"])
@torch.no_grad()
def test_requests_at_different_steps_share_a_batch(name: str) -> None:
    """Patterns of any form are joined and cut by rows."""
    optimized = toma_fx.optimize(model(), method=static(name))
    first, second = inputs(1, 800.0, 1), inputs(2, 700.0, 1)
    _, early = optimized.step(first, toma_fx.State())
    alone = optimized.step(inputs(3, 799.0, 1), early)[0]
    fresh = optimized.step(second, toma_fx.State())[0]
    both = {
        "sample": torch.cat([inputs(3, 799.0, 1)["sample"], second["sample"]]),
        "timestep": torch.tensor([799.0, 700.0]),
    }
    out, states = optimized.step(both, [early, toma_fx.State()])
    assert relative(out, torch.cat([alone, fresh])) < 1e-5
    assert [s.step for s in states] == [2, 1]


@torch.no_grad()
def test_stream_methods_select_on_the_stream_and_others_on_the_entry() -> None:
    for name in ("tomesd", "toma"):
        options = {"min_tokens": 1, "scope": "sublayer", "share": "block"}
        optimized = toma_fx.optimize(model(), method=name, **options)
        optimized(**inputs())
        (made,) = optimized.specializations
        (group,), (stream,) = made.plan.groups, made.analysis.streams
        assert (group.feature == stream.values[0]) == (name == "tomesd")


@torch.no_grad()
def test_selection_at_listed_steps() -> None:
    optimized = toma_fx.optimize(model(), method="tomesd", select_at=[0, 3])
    done = []
    for step in range(5):
        before = dict(optimized.totals)
        optimized(**inputs(timestep=800.0 - step))
        done += [k for k, n in optimized.totals.items() if n != before.get(k, 0)]
    assert done == ["refresh", "reuse", "reuse", "refresh", "reuse"]


def test_explain_counts_the_step_that_usually_runs() -> None:
    """ToMeSD matches at every step, so the matching belongs to its FLOPs."""
    every = toma_fx.explain(model(), inputs(), method="tomesd")
    once = toma_fx.explain(model(), inputs(), method="tomesd", destinations_every=5)
    assert every.flops_after == every.flops_refresh == once.flops_refresh > once.flops_after
    down = toma_fx.explain(model(), inputs(), method="todo")
    assert down.flops_refresh == down.flops_after < down.flops_before


def test_keys_that_cannot_be_told_from_queries_are_refused() -> None:
    """ToDo needs keys of their own: attention of x to itself without projections has none."""

    class Bare(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            x = hidden_states
            return x + nn.functional.scaled_dot_product_attention(x, x, x)

    with pytest.raises(NoMergeSites, match="keys are its queries"):
        toma_fx.explain(
            Bare().eval(), {"hidden_states": randn(1, 2, 16, 8)}, method="todo", grid=(4, 4)
        )


# -- the dynamic form -----------------------------------------------------------------------------


@torch.no_grad()
def test_dynamic_form_is_refused_where_shapes_must_be_static() -> None:
    optimized = toma_fx.optimize(model(), method="ca-tome", threshold=0.3)
    for use in (
        optimized.compile,
        lambda: toma_fx.export.export_programs(optimized, inputs()),
        lambda: torch.compile(
            model(), backend="toma_fx", options={"method": "ca-tome", "threshold": 0.3}
        )(**inputs()),
    ):
        with pytest.raises((DynamicError, torch._dynamo.exc.BackendCompilerFailed)) as caught:
            use()
        assert "calibrate" in str(caught.value)


@torch.no_grad()
def test_dynamic_form_runs_eagerly_inside_torch_compile() -> None:
    """Compiled, it would keep the shapes of the first step."""
    config = make_config(
        method="ca-tome", options={"threshold": 0.5, "checkpoints": None, "destinations_every": 1}
    )
    eager = toma_fx.optimize(model(), method=config)
    compiled = torch.compile(toma_fx.optimize(model(), method=config), backend="eager")
    shapes = set()
    for seed in range(4):
        call = inputs(seed, 800.0 - seed)
        assert torch.equal(compiled(**call), eager(**call))
        shapes.add(next(iter(eager.states[0].buffers.values())).shape)
    assert len(shapes) > 1, "the number of tokens follows the data"


@torch.no_grad()
def test_calibration() -> None:
    calls = [inputs(seed) for seed in range(3)]
    fields: dict[str, Any] = {"threshold": 0.5, "checkpoints": None}
    low, mean, high = (
        dict(toma_fx.calibrate(model(), calls, statistic=s, **fields).ratios)
        for s in ("min", "mean", "max")
    )
    (path,) = mean
    assert 0 < low[path] < mean[path] < high[path] < 0.75
    stricter = toma_fx.calibrate(model(), calls, 0.7, checkpoints=None)
    assert dict(stricter.ratios)[path] < mean[path]
    with toma_fx.record_calls(model()) as recorded:
        for call in calls:
            model()(**call)
    assert dict(toma_fx.calibrate(model(), recorded, **fields).ratios) == mean


@pytest.mark.parametrize("placement", [{"share": "stream"}, {"scope": "stack"}])
@torch.no_grad()
def test_calibration_of_blocks_that_share_a_pattern(placement: dict[str, Any]) -> None:
    """Every block of the group gets the ratio, so that the group stays together."""
    torch.manual_seed(0)
    deep = lively(load_example("own_model").PictureDenoiser(GRID, width=16, heads=2, depth=3))
    fields = {"checkpoints": None, "branches": ("attention", "mlp"), **placement}
    dynamic = toma_fx.optimize(deep, method="ca-tome", threshold=0.5, **fields)
    config = toma_fx.calibrate(deep, inputs(), 0.5, **fields)
    assert len(config.ratios) == 3
    want = dynamic(**inputs())
    assert relative(want, deep(**inputs())) > 1e-3
    assert relative(toma_fx.optimize(deep, method=config)(**inputs()), want) < 1e-5


@pytest.mark.parametrize(
    ("given", "fields", "error"),
    [
        ([], {}, ConfigError),
        ({"sampel": torch.zeros(1)}, {}, SignatureError),
        (inputs(), {"threshold": 1.5}, ConfigError),
        (inputs(), {"threshold": 0.999}, ConfigError),
        (inputs(), {"statistic": "median"}, UnknownNameError),
        (inputs(), {"tile": 4}, UnknownNameError),
        (3, {}, ConfigError),
    ],
)
def test_bad_calibration(given: Any, fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        toma_fx.calibrate(model(), given, **fields)


def test_export_needs_an_optimized_model() -> None:
    with pytest.raises(ModelTypeError, match="not optimized"):
        toma_fx.export.export_programs(model(), inputs())


# -- a method of one's own ------------------------------------------------------------------------


def test_own_method_is_short_and_the_page_shows_it() -> None:
    source = (ROOT / "examples" / "own_method.py").read_text()
    classes = source[source.index("@dataclass(frozen=True)\nclass Salient(") :]
    setting = classes[: classes.index("@dataclass(frozen=True, kw_only=True)")]
    assert len([line for line in setting.splitlines() if line.strip()]) < 50
    config = classes[len(setting) : classes.index("def main(")]
    shown = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    for part in (setting, config):
        assert any(part.strip() in block for block in shown), "docs/methods.md shows another class"


def test_the_page_says_what_a_setting_must_have() -> None:
    for name in toma_fx.Setting.__abstractmethods__:
        assert re.search(rf"^\|.*`{name}\b", PAGE.read_text(), re.M), name


def test_example_of_an_own_method_runs() -> None:
    path = ROOT / "examples" / "own_method.py"
    out = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    errors = dict(re.findall(r"(\w+) +squared error ([\d.]+)", out.stdout))
    assert set(errors) == {"salient", "tomesd", "random"}
    assert all(0 < float(e) < 0.1 for e in errors.values())


def test_a_method_that_makes_constants_is_refused() -> None:
    class Constant(own_method.Salient):
        def positions(self, pattern: Pattern) -> Tensor:
            return super().positions(pattern)

        def select(self, x: Tensor) -> tuple[Tensor, ...]:
            idx, joins = super().select(x)
            return idx + torch.tensor([0]), joins

    class ConstantConfig(own_method.SalientConfig):
        name = "constant"

        def setting(self, place: toma_fx.Place) -> Any:
            found = super().setting(place)
            return Constant(found.grid, found.tile, found.keep)

    optimized = toma_fx.optimize(model(), method=ConstantConfig())
    with pytest.raises(RewriteError, match=r"torch\.arange"):
        optimized(**inputs())


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_whole_models_through_inductor(name: str) -> None:
    for make, call in (
        (denoisers.sdxl, denoisers.sdxl_inputs),
        (denoisers.flux, denoisers.flux_inputs),
    ):
        whole = make()
        fields: dict[str, Any] = {"min_tokens": 60}
        if name == "ca-tome":
            config = toma_fx.calibrate(whole, call(), 0.2, **fields)
        else:
            config = make_config(method=CLASSES[name], options=fields)
        eager = toma_fx.optimize(whole, method=config)
        compiled = toma_fx.optimize(whole, method=config).compile()
        for step in range(3):
            given = call(seed=step, timestep=0.5 - 0.01 * step)
            assert relative(compiled(**given)[0], eager(**given)[0]) < 1e-4
