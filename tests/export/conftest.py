"""What tests of artifacts share."""

from __future__ import annotations

from typing import Any

import pytest

import toma_fx
from tests.export.in_process import InProcess
from tests.methods.test_methods import model
from toma_fx.export import builder
from toma_fx.export.programs import Programs, export_programs

EXPORTED: dict[int, tuple[Any, Programs]] = {}


@pytest.fixture
def exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each optimized model is exported once, for the inputs of its first build."""

    def export(optimized: Any, inputs: Any) -> Programs:
        if id(optimized) not in EXPORTED:
            EXPORTED[id(optimized)] = optimized, export_programs(optimized, inputs)
        return EXPORTED[id(optimized)][1]

    monkeypatch.setattr(builder, "export_programs", export)


@pytest.fixture(scope="module")
def optimized() -> Any:
    """The smallest model, with every kind of step that merges."""
    return toma_fx.optimize(model(), method="toma", min_tokens=1, weights_every=2)


@pytest.fixture
def target() -> InProcess:
    return InProcess()
