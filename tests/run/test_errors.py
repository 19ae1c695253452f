"""Bad input: typed errors that say what, where, expected and got, and what to do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests.examples import load_example
from tests.methods.test_methods import inputs, model
from toma_fx.errors import (
    CaptureError,
    ConfigError,
    ModelTypeError,
    NoMergeSites,
    SignatureError,
    TileError,
    TomaError,
    TrainingModeError,
    UnknownNameError,
)
from toma_fx.methods.config import PRESETS, make_config
from toma_fx.methods.toma import ToMAConfig
from toma_fx.methods.tomesd import ToMeSDConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", 1.0), ("ratio", -0.1), ("ratio", float("nan")), ("ratio", "half"),
        ("ratio", True), ("scale", 0.0), ("tiles", 0), ("tile", 0), ("tile", (4, 0)),
        ("tile", (1, 2, 3, 4)), ("tile", 2.5), ("grid", (4,)), ("grid", 4),
        ("destinations_every", 0),
        ("weights_every", 1.5), ("min_tokens", 0), ("first_step", -1), ("branches", ()),
    ],
)  # fmt: skip
def test_fields_out_of_their_domain(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ToMAConfig(**{field: value})
    assert caught.value.where == field
    assert caught.value.expected


def test_last_step_before_first() -> None:
    with pytest.raises(ConfigError, match="last_step"):
        ToMAConfig(first_step=5, last_step=4)


@pytest.mark.parametrize(
    ("make", "nearest"),
    [
        (lambda: make_config("paper-sxdl"), "paper-sdxl"),
        (lambda: make_config("default", options={"ration": 0.5}), "ratio"),
        (lambda: ToMAConfig(scope="blok"), "block"),
        (lambda: ToMAConfig(window="tiles"), "tile"),
        (lambda: ToMAConfig(branches=("attn",)), "attention"),
        (lambda: ToMAConfig(overrides={"*": {"ratios": 0.1}}), "ratio"),
    ],
)
def test_unknown_names_come_with_the_nearest(make: Any, nearest: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        make()
    assert nearest in caught.value.hint


def test_overrides_are_validated_when_made() -> None:
    with pytest.raises(ConfigError, match="ratio"):
        ToMAConfig(overrides={"mid_block.*": {"ratio": 2}})
    with pytest.raises(UnknownNameError, match="per path"):
        ToMAConfig(overrides={"mid_block.*": {"scope": "block"}})


def test_configurations_are_values() -> None:
    config = ToMAConfig(overrides={"a.*": {"ratio": 0.25}}, include="a.*")
    assert config == ToMAConfig(overrides={"a.*": {"ratio": 0.25}}, include=["a.*"])
    assert hash(config) == hash(ToMAConfig(overrides={"a.*": {"ratio": 0.25}}, include=["a.*"]))
    assert config.at("a.b").ratio == 0.25
    assert config.at("c").ratio == 0.5
    assert set(config.to_dict()["overrides"]["a.*"]) <= set(ToMAConfig.overridable)
    assert make_config(config, options={"ratio": 0.1}).ratio == 0.1
    assert make_config({"ratio": 0.3}).ratio == 0.3
    assert all(isinstance(p, ToMAConfig) for p in PRESETS.values())


class Levels(nn.Module):
    """Attention at two resolutions, as in UNets: on 16x16 tokens and, pooled, on 8x8."""

    def __init__(self) -> None:
        super().__init__()
        make = load_example("own_model").PictureDenoiser
        self.large, self.small = (make(grid, width=8, depth=1) for grid in ((16, 16), (8, 8)))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool2d(sample, 2)
        coarse = nn.functional.interpolate(self.small(pooled, timestep), scale_factor=2.0)
        return self.large(sample, timestep) + coarse


def test_tile_larger_than_the_grid_names_site_and_size() -> None:
    two, call = Levels().eval(), {"sample": torch.randn(1, 4, 32, 32), "timestep": torch.ones(1)}
    with pytest.raises(TileError) as caught:
        toma_fx.explain(two, call, tile=12, min_tokens=60)
    assert "8x8" in caught.value.expected
    assert caught.value.got == "12x12"
    assert "small.blocks.0" in caught.value.where
    only_large = toma_fx.explain(two, call, tile=12, min_tokens=200)
    assert {row.grid for row in only_large.rows} == {(16, 16)}
    assert {row.window for row in only_large.rows} == {"8x16"}, "nearest size that divides"


@pytest.mark.parametrize(
    "options", [{"include": "block.*"}, {"overrides": {"block.*": {"ratio": 0.1}}}]
)
def test_path_pattern_that_matches_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        toma_fx.optimize(model(), example_inputs=inputs(), min_tokens=1, **options)
    assert "blocks.0.attention" in caught.value.hint


@pytest.mark.parametrize("overrides", [{"x": 0.3}, {3: {"ratio": 0.3}}, 0.3, "x", ("x", "y")])
def test_overrides_that_are_no_table(overrides: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ToMAConfig(overrides=overrides)
    assert caught.value.where == "overrides"
    assert "field: value" in caught.value.expected


@pytest.mark.parametrize(
    ("method", "options", "error"),
    [
        ("tomesd", {"rubbish": 3}, UnknownNameError),
        ("tomsd", {}, UnknownNameError),
        (None, {"ratio": 7}, ConfigError),
        (None, {"ratio": 0.5}, ConfigError),
        ("ca-tome", {"threshold": 0.5}, ConfigError),
        (None, {"overrides": {"mid_block.*": {"ratio": 0.5}}}, ConfigError),
        (ToMeSDConfig(), {}, ConfigError),
    ],
)
def test_merging_off_checks_what_comes_with_it(
    method: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        make_config(False, method, options)


@pytest.mark.parametrize(
    ("method", "options"),
    [(None, {}), (None, {"ratio": 0}), ("tomesd", {"min_tokens": 9}), (ToMeSDConfig(ratio=0), {})],
)
def test_merging_off_takes_what_does_not_contradict(method: Any, options: dict[str, Any]) -> None:
    assert not make_config(False, method, options).merges


@pytest.mark.parametrize(
    ("thing", "hint"),
    [
        (object(), "the denoiser itself"),
        ("unet", "from_pretrained"),
        (Path("unet"), "from_pretrained"),
        (None, "None"),
        (nn.Linear, "Linear.from_pretrained"),
        (lambda x: x, "the denoiser itself"),
    ],
)
def test_wrong_model_type(thing: Any, hint: str) -> None:
    with pytest.raises(ModelTypeError) as caught:
        toma_fx.optimize(thing)
    assert hint in caught.value.hint


def test_a_module_whose_work_bypasses_forward() -> None:
    class Autoencoder(nn.Linear):
        def encode(self, x: Tensor) -> Tensor:
            return self(x)

        def decode(self, x: Tensor) -> Tensor:
            return self(x)

    for use in (toma_fx.optimize, lambda m: toma_fx.explain(m, (torch.ones(3),))):
        with pytest.raises(ModelTypeError, match="autoencoder"):
            use(Autoencoder(3, 3).eval())


def test_training_mode() -> None:
    own = copy.deepcopy(model())
    with pytest.raises(TrainingModeError, match="evaluation"):
        toma_fx.optimize(own.train())
    optimized = toma_fx.optimize(own.eval())
    own.train()
    with pytest.raises(TrainingModeError):
        optimized(**inputs())


class DataDependent(nn.Module):
    """Its Python depends on tensor values inside a submodule."""

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_capture_failure_names_module_and_line() -> None:
    with pytest.raises(CaptureError) as caught:
        toma_fx.optimize(DataDependent().eval(), example_inputs=(torch.randn(2, 3),))
    assert caught.value.where.startswith("inner at ")
    assert "test_errors.py" in caught.value.where
    assert "x.sum() > 0" in caught.value.where


def test_no_sites_lists_reasons() -> None:
    with pytest.raises(NoMergeSites) as caught:
        toma_fx.optimize(model(), min_tokens=5000, example_inputs=inputs())
    assert any("fewer than min_tokens=5000" in r for r in caught.value.reasons)
    assert "min_tokens" in caught.value.hint
    assert "blocks.0.attention" in str(caught.value)
    with pytest.raises(NoMergeSites) as caught:
        toma_fx.optimize(nn.Linear(3, 3).eval(), example_inputs=(torch.randn(2, 3),))
    assert "no attention at all" in str(caught.value)


def test_a_model_without_sites_fails_at_its_first_call_not_silently() -> None:
    optimized = toma_fx.optimize(model(), min_tokens=5000)
    with pytest.raises(NoMergeSites):
        optimized(**inputs())


def test_bad_calls_and_bad_example_inputs() -> None:
    optimized = toma_fx.optimize(model())
    with pytest.raises(SignatureError, match="does not fit"):
        optimized(latents=1)
    with pytest.raises(ConfigError, match="example_inputs"):
        toma_fx.optimize(model(), example_inputs=3)
    with pytest.raises(ConfigError, match="toma="):
        toma_fx.optimize(model(), toma=0.5)


def test_every_error_is_a_toma_error_with_fields() -> None:
    error = TileError("what", where="here", expected="this", got="that", hint="do")
    assert isinstance(error, TomaError)
    assert (error.what, error.where, error.expected, error.got, error.hint) == (
        "what", "here", "this", "that", "do",
    )  # fmt: skip
    assert str(error) == "what\n  where: here\n  expected: this\n  got: that\n  try: do"
