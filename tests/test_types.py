"""What type checkers know of the public names."""

from __future__ import annotations

from pathlib import Path

from mypy import api

CODE = """
import toma_fx
from torch import nn

denoiser = toma_fx.optimize(nn.Linear(2, 2), ratio=0.5)
reveal_type(denoiser)
reveal_type(denoiser.compile())
reveal_type(denoiser.is_merging_enabled)
outputs, state = denoiser.step({}, toma_fx.State())
denoiser.reset()
with denoiser.using(0.3):
    denoiser.disable_merging()
with denoiser.generation(steps=3) as run:
    run.step(0)

class Pipeline:
    unet: nn.Module

reveal_type(toma_fx.optimize(Pipeline()))
reveal_type(toma_fx.example_inputs(Pipeline()))
reveal_type(toma_fx.ToMAConfig.from_dict({}))
reveal_type(toma_fx.explain(denoiser, {}).to_json())
"""


def test_optimized_denoisers_are_known(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    file.write_text(CODE)
    found, _, status = api.run([str(file), "--ignore-missing-imports", "--follow-imports=silent"])
    revealed = [line.split('"')[1] for line in found.splitlines() if "Revealed type" in line]
    assert revealed == [
        "toma_fx.run.denoiser.OptimizedDenoiser",
        "toma_fx.run.denoiser.OptimizedDenoiser",
        "bool",
        "user.Pipeline",
        "dict[str, Any]",
        "toma_fx.methods.toma.ToMAConfig",
        "str",
    ], found
    assert status == 0, found
