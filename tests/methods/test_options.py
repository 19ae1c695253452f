"""Options of any kind: every field of every configuration takes a value or refuses it, typed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch

import toma_fx
from tests.methods.test_methods import inputs, model
from toma_fx.errors import ConfigError, TomaError, UnknownNameError
from toma_fx.methods.checks import LARGEST, fits
from toma_fx.methods.config import METHODS, make_config
from toma_fx.methods.toma import MOST_SCALE

if TYPE_CHECKING:
    from collections import Counter

CONFIGS = (*METHODS, toma_fx.CacheConfig)
FIELDS = [(cls, field.name) for cls in CONFIGS for field in dataclasses.fields(cls)]
STRANGE = (
    None, True, 5, -1, 0.5, "x", "*", "", b"x", object(), int, len, (), [], {}, set(), [None], [5],
    (5,), ((5,),), ("x",), ("ab", "cd"), [object()], [[]], ({},), {"*"}, {"*": 5}, {"*": {}},
    {"*": {5: 5}}, {"*": {"order": "x"}}, {"*": {"ratio": None}}, {5: 5}, ((0.5, {5: 5}),),
    ((0.5, 5),), ((None, {}),), (((), {}),), ((0, 0.5), (object(), 0.25)), ((0, None),),
    ((1.0, (None,)),), torch.ones(2), iter(()),
)  # fmt: skip
BEYOND = (1e39, -1e39, math.inf, -math.inf, math.nan, 10**400, -(10**400), 10**5000)


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_a_value_of_any_kind_is_taken_or_refused(cls: Any, field: str) -> None:
    for value in STRANGE:
        try:
            config = cls(**{field: value})
        except ConfigError as error:
            assert error.what  # noqa: PT017 - that it is no other exception is what is tested
        else:
            hash(config), repr(config)
            assert cls.from_dict(config.to_dict()) == config
            assert cls.from_dict(json.loads(config.to_json())) == config


def test_plain_values_of_another_method() -> None:
    values = toma_fx.ToMeSDConfig(ratio=0.25).to_dict()
    for error, message in ((ConfigError, "got: 'tomesd'"), (UnknownNameError, "ratio")):
        with pytest.raises(error, match=message):
            toma_fx.ToMAConfig.from_dict(values)
        values = {"ration": 0.25}
    recipe = toma_fx.Recipe(toma_fx.ToDoConfig(), model="UNet")
    assert toma_fx.Recipe.from_dict(json.loads(recipe.to_json())) == recipe


@pytest.mark.parametrize(("cls", "field"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_numbers_beyond_float32_are_refused(cls: type, field: str) -> None:
    for number in BEYOND:
        for value in (number, (number,), ((0.5, number),), ((0, 0.5), (number, 0.25))):
            with pytest.raises(ConfigError):
                cls(**{field: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("branches", None), ("branches", 5), ("include", None), ("exclude", [object()]),
        ("overrides", "blocks.*"), ("overrides", {"*": 5}), ("phases", ((0.5, {5: 5}),)),
        ("scale", math.inf), ("cache", {5: 5}), ("cache", {"include": 5}),
        ("cache", {"overrides": {"*": {"order": "x"}}}), ("cache", {"steps": 10**12}),
        ("toma", {5: 5}), ("toma", 5), ("method", [5]), ("max_signatures", None), ("like", 5),
    ],
)  # fmt: skip
def test_optimize_and_explain_refuse_alike(option: str, value: Any) -> None:
    calls: list[Callable[..., Any]] = [lambda **o: toma_fx.optimize(model(), **o)]
    if option not in ("max_signatures", "like"):
        calls.append(lambda **o: toma_fx.explain(model(), inputs(), **o))
    for call in calls:
        with pytest.raises(ConfigError):
            call(**{option: value})


@pytest.mark.parametrize("value", [5, "x", object(), [object()], {}, ((), 5), (5, {})])
def test_examples_of_any_kind(value: Any) -> None:
    with pytest.raises(TomaError):
        toma_fx.explain(model(), value)
    with pytest.raises(TomaError):
        toma_fx.optimize(model(), example_inputs=value)


@pytest.mark.parametrize("value", [5, object(), [object()], {}])
def test_dumps_of_any_kind(value: Any) -> None:
    with pytest.raises(ConfigError, match="dump"):
        toma_fx.explain(model(), inputs(), dump=value)


@pytest.mark.parametrize("inverse", ["transpose", "pinv"])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3, 1.0])
def test_the_sharpest_weights_are_finite(inverse: Any, noise: float) -> None:
    """Also of equal tokens, whose cosines differ by rounding."""
    config = toma_fx.ToMAConfig(scale=MOST_SCALE, tile=4, inverse=inverse)
    setting = config.setting(toma_fx.Place((32, 32), (32, 32)))
    assert not isinstance(setting, str)
    for channels in (8, 1024):
        tokens = torch.randn(2, 1, channels) + noise * torch.randn(2, 1024, channels)
        weights = setting.weights(tokens, {"idx": setting.select(tokens)[0]})
        assert all(x.isfinite().all() for x in weights)
    with pytest.raises(ConfigError, match="scale"):
        toma_fx.ToMAConfig(scale=2 * MOST_SCALE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnConfig(toma_fx.ToMAConfig):
    """Fields of a user's own, which no `check` looks at."""

    side: int = 2
    form: Literal["a", "b"] = "a"
    table: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    other: Any = None


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"side": 2.5}, "side"), ({"side": True}, "side"), ({"form": "c"}, "form"),
        ({"table": {"a": (1.5,)}}, "table"), ({"table": {1: (1,)}}, "table"),
    ],
)  # fmt: skip
def test_annotations_of_a_method_of_a_users_own(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(True, OwnConfig, options)
    assert caught.value.where == field


@dataclasses.dataclass(frozen=True, kw_only=True)
class LooseConfig(toma_fx.ToMAConfig):
    """An annotation that can't be read at run time."""

    counts: Counter[str] | None = None


def test_an_annotation_that_cannot_be_read_checks_nothing() -> None:
    assert LooseConfig(counts=5).counts == 5  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tiles"):
        LooseConfig(tiles=2.5)  # type: ignore[arg-type]


def test_masks_of_other_whole_numbers() -> None:
    for flags in ([True, True, False], (1, 1, 0), list(np.array([1, 1, 0]))):
        assert toma_fx.CacheConfig(steps_mask=flags).steps_mask == (1, 1, 0)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True), (True, float, False), (LARGEST, float, True), (2 * LARGEST, float, False),
        (1, int, True), (1.0, int, False), (2**63, int, False), (True, bool, True),
        ([1, 2], tuple[int, ...], True), ((), tuple[int, ...], True),
        ((1,), tuple[int, int], False),
        ("a", str | None, True), (None, str | None, True), (1, str | None, False),
        ({"a": 1}, Mapping[str, int], True), ({1: 1}, Mapping[str, int], False),
        (object(), Any, True), (1, Literal["a"], False), ("a", Literal["a"], True),
    ],
)  # fmt: skip
def test_fits(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected
