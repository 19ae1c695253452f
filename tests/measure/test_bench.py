"""Speed of an embedded model in every mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import toma_fx
from tests.measure.fake import FakeSubject
from toma_fx.cli.main import main
from toma_fx.errors import ConfigError, UnknownNameError
from toma_fx.measure.bench import BenchRow
from toma_fx.measure.work import Times, Work
from toma_fx.models import tiny


def test_every_configuration_is_timed_in_every_mode() -> None:
    calls: list[int] = []
    result = toma_fx.bench(
        tiny.load("tiny-flux"), ["balanced"], rounds=2, on_run=calls.append, steps=2,
        compile_options={"backend": "eager"},
    )  # fmt: skip
    keys = [(row.config, row.mode) for row in result.rows]
    assert keys == [(n, m) for m in ("eager", "compiled") for n in ("original", "balanced")]
    assert calls == [16] * 16
    for row in result.rows:
        assert row.low_s <= row.median_s <= row.high_s
        base = next(r for r in result.rows if (r.config, r.mode) == ("original", row.mode))
        assert row.speedup == pytest.approx(base.median_s / row.median_s)
    assert result.rows[0].ideal_speedup == result.rows[0].speedup == 1
    assert result.rows[1].kept_bytes == result.rows[3].kept_bytes > 0
    data = json.loads(result.to_json())
    assert data["rows"][1]["quotient"] == pytest.approx(result.rows[1].quotient)
    assert "balanced" in str(result)


def test_noise_is_warned_of() -> None:
    steady, noisy = Times(2.0, (1.0,) * 5), Times(2.0, (1.0, 2.0, 1.5, 0.5, 1.2))
    row = BenchRow.of(("toma", "eager"), noisy, steady, Work(4, 2, {}, 10))
    assert row.noisy
    assert row.ideal_speedup == 2
    result = toma_fx.measure.bench.Bench("m", (row,), 5, {"steps": 1, "batch": 1}, {}, {})
    assert "too noisy" in result.warnings[0]
    assert "warning" in str(result)


def test_what_bench_refuses() -> None:
    with pytest.raises(ConfigError, match="chooses itself"):
        toma_fx.bench(FakeSubject(), ["balanced"])
    with pytest.raises(ConfigError, match="compile="):
        toma_fx.bench(tiny.load("tiny-sdxl"), ["balanced"], compile=True)
    with pytest.raises(UnknownNameError, match="eager"):
        toma_fx.bench(tiny.load("tiny-sdxl"), ["balanced"], modes=["eagre"])


def test_the_command_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--model", "tiny-sdxl", "--config", "toma:ratio=0.25", "--modes", "eager",
             "--rounds", "1", "--steps", "2"]  # fmt: skip
    assert main([*words, "--json", str(tmp_path / "bench.json")]) == 0
    assert "of ideal" in capsys.readouterr().out
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["configs"]["toma:ratio=0.25"]["ratio"] == 0.25
    assert main(["bench", "--model", "tiny", "--config", "balanced"]) == 1
    assert "tiny-sdxl" in capsys.readouterr().err
    assert main(["bench", "--model", "latent", "--config", "balanced"]) == 1
    assert "latent-sdxl" in capsys.readouterr().err
    assert main(["bench", "--pipeline", str(tmp_path), "--config", "balanced"]) == 1
    assert "can't be loaded" in capsys.readouterr().err
