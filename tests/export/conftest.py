"""What tests of artifacts share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import toma_fx
from tests.export.in_process import InProcess
from tests.methods.test_methods import inputs, model
from toma_fx.compat.pytorch import tree_leaves
from toma_fx.export import builder
from toma_fx.export.programs import Programs, export_programs

EXPORTED: dict[Any, tuple[Any, Programs]] = {}


def export_once(optimized: Any, inputs: Any) -> Programs:
    """The programs of a call, of each model once for each size."""
    key = id(optimized), *map(_kind, tree_leaves(inputs)), str(inputs.get("img_ids"))
    if key not in EXPORTED:
        EXPORTED[key] = optimized, export_programs(optimized, inputs)
    return EXPORTED[key][1]


@pytest.fixture
def exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each optimized model is exported once for each size."""
    monkeypatch.setattr(builder, "export_programs", export_once)


def _kind(leaf: Any) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf


@pytest.fixture(scope="module")
def optimized() -> Any:
    """The smallest model, with every kind of step that merges."""
    return toma_fx.optimize(model(), method="toma", min_tokens=1, weights_every=2)


@pytest.fixture
def target() -> InProcess:
    return InProcess()


@pytest.fixture(scope="module")
def small_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the smallest model, of the in-process target."""
    folder = tmp_path_factory.mktemp("small") / "a"
    optimized = toma_fx.optimize(model(), method="toma", min_tokens=1, weights_every=2)
    builder.export(optimized, inputs(), folder, InProcess())
    return folder


@pytest.fixture
def copy(small_artifact: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(small_artifact, tmp_path / "a"))
