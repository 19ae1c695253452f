"""benchmarks/gpu.py: what a run goes on with, what does not fit, tables; all parts, in small."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
VERSIONS = {"torch": "1"}
NAMES = {"a": "measure a", "b": "measure b"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a file of benchmarks/, as its neighbors do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def run_all(
    ledger: ModuleType,
    path: Path,
    measure: Callable[[str], Any],
    versions: dict[str, str] = VERSIONS,
    deadline: Any = None,
    device: str = "x",
) -> list[str]:
    book = ledger.Ledger(path, {"device": device}, same=("device",))
    deadline = deadline or ledger.Deadline(None, 0.0)
    failed: list[str] = ledger.measure_all(book, deadline, NAMES, versions, measure)
    return failed


def entries(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())["measurements"]
    return found


def test_a_run_goes_on_with_what_is_there(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    ledger, path, measured = load("ledger"), tmp_path / "results.json", []

    def measure(name: str) -> int:
        measured.append(name)
        assert list(entries(path)) == (["a"] if name == "b" else []) or len(measured) > 2
        if len(measured) == 2:
            raise KeyboardInterrupt
        return len(measured)

    path.write_text('{"device": "x", "measurements": {}}')
    with pytest.raises(KeyboardInterrupt):
        run_all(ledger, path, measure)
    assert entries(path)["a"]["result"] == 1
    assert run_all(ledger, path, measure) == []
    assert measured == ["a", "b", "b"]
    run_all(ledger, path, measure, {"torch": "2"})
    assert measured == ["a", "b", "b", "a", "b"]
    assert entries(path)["a"]["versions"] == {"torch": "2"}


def test_what_fails_is_noted_and_tried_again(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    ledger, path, broken = load("ledger"), tmp_path / "results.json", ["a"]

    def measure(name: str) -> str:
        if name in broken:
            raise ValueError("no such kernel\nand more")
        return name

    assert run_all(ledger, path, measure) == ["a"]
    assert entries(path)["a"]["error"] == "ValueError: no such kernel"
    assert entries(path)["b"]["result"] == "b"
    broken.clear()
    assert run_all(ledger, path, measure) == []
    assert entries(path)["a"]["result"] == "a"


def test_a_file_of_another_device_is_refused(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    ledger, path = load("ledger"), tmp_path / "results.json"
    run_all(ledger, path, str)
    before = path.read_text()
    with pytest.raises(SystemExit, match="device is 'x' there, 'y' here"):
        run_all(ledger, path, str, device="y")
    assert path.read_text() == before


def test_what_no_longer_fits_is_listed(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    ledger, path, now = load("ledger"), tmp_path / "results.json", [0.0]
    deadline = ledger.Deadline(1.0, 0.0, lambda: now[0])

    def measure(name: str) -> str:
        now[0] += 60.0
        return name

    assert deadline.left() == 60.0
    assert run_all(ledger, path, measure, deadline=deadline) == []
    assert entries(path)["a"]["result"] == "a"
    assert entries(path)["b"] == {"skipped": "no time left"}
    assert run_all(ledger, path, str) == []
    assert entries(path)["b"]["result"] == "b"


def test_what_runs_when_the_time_is_over_is_stopped(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    ledger, path, start = load("ledger"), tmp_path / "results.json", time.monotonic()
    caught = []

    def measure(name: str) -> str:
        try:
            while time.monotonic() < start + 20:
                time.sleep(0.01)
        except Exception as error:  # as compilers do
            caught.append(error)
        return name

    assert run_all(ledger, path, measure, deadline=ledger.Deadline(0.3 / 60, start)) == []
    assert time.monotonic() < start + 10
    assert not caught
    assert {name: entry["skipped"] for name, entry in entries(path).items()} == dict.fromkeys(
        NAMES, "no time left"
    )
    time.sleep(0.01)  # nothing is raised any more


def test_every_measurement_is_planned_once_and_can_be_run_alone(
    load: Callable[[str], ModuleType],
) -> None:
    gpu, models = load("gpu"), load("gpu_models")
    keys = list(gpu.order(("sdxl", "flux"), (1024, 2048)))
    assert len(keys) == len(set(keys))
    whole = {(part, variant) for part, _, _, variant in keys}
    assert whole == {
        ("attention", ""), ("selection", ""), ("host", "merged"), ("profile", "merged"),
        *(("steps", v) for v in gpu.VARIANTS if v != "flat" or models.can_compile_flat()),
    }  # fmt: skip
    assert len(keys) == len(whole) * 4
    for key in keys:
        command = gpu.command_of(key, models.Options(device="cpu", toy=True))
        arguments = command.removeprefix("python benchmarks/gpu.py ").split()
        args = gpu.parse(arguments)
        assert gpu.chosen(args) == [key]
        assert models.Options(**{n: getattr(args, n) for n in vars(models.Options())}).toy


def test_the_nine_minutes_begin_with_what_is_worth_most(load: Callable[[str], ModuleType]) -> None:
    names = [key.name for key in load("gpu").order(("sdxl", "flux"), (1024, 2048))]
    place = names.index
    assert place("selection flux 2048") < place("steps sdxl 1024 eager")
    assert place("profile flux 1024 merged") < place("steps sdxl 2048 merged")
    assert place("steps flux 2048 merged") < place("steps sdxl 1024 both")


def test_without_a_result_the_table_says_so(load: Callable[[str], ModuleType]) -> None:
    table = load("gpu_table")
    rows = table.summary_rows([])
    assert [row[:3] for row in rows] == [
        [f"{model} {size}", "GPU", "not measured"]
        for model in ("SDXL", "Flux")
        for size in (1024, 2048)
    ]
    cpu = {"device_kind": "cpu", "toy": False, "measurements": {}, "options": table.STANDARD}
    toy = {**cpu, "device_kind": "cuda", "toy": True}
    assert table.summary_rows([cpu, toy]) == rows


def test_the_table_shows_what_was_measured(load: Callable[[str], ModuleType]) -> None:
    table, models = load("gpu_table"), load("gpu_models")
    usual = vars(models.Options())
    assert {name: usual[name] for name in table.STANDARD} == table.STANDARD
    assert set(usual) - set(table.STANDARD) == {"device", "toy", "rounds"}
    merged = {
        "original_ms": {"median": 40.0}, "mean_ms": 25.0, "speedup": 1.6, "ideal": 1.7,
        "kinds_ms": {"refresh": {"median": 30.0}, "reuse": {"median": 24.0}},
        "counts": {"refresh": 6, "reuse": 22}, "compile_s": {"refresh": 50.0, "reuse": 9.0},
        "original_compile_s": 60.0, "original_peak_mib": 7000.0, "peak_mib": 6000.0,
    }  # fmt: skip
    run = {
        "device": "NVIDIA H100", "device_kind": "cuda", "toy": False, "options": table.STANDARD,
        "measurements": {
            "steps sdxl 1024 merged": {"result": merged},
            "steps sdxl 1024 both": {"skipped": "no time left"},
        },
    }  # fmt: skip
    first, *others = table.summary_rows([run])
    absent = "not measured"
    assert first == ["SDXL 1024", "H100", absent, "40.0 ms", "25.0 ms, 1.60x", absent, absent]
    assert all(row[2:] == [absent] * 5 for row in others)
    rows = [row for _, _, make_rows in table.TABLES for row in make_rows(run, table.WANTED)]
    assert len(rows) == 1
    assert "refresh 30.0 ms x 6, reuse 24.0 ms x 22" in rows[0]
    other = {**run, "options": {**table.STANDARD, "batch": 2}}
    assert table.summary_rows([other]) == table.summary_rows([])


def test_the_pages_show_the_results_that_are_there() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tokens_that_merge_and_names_of_places(load: Callable[[str], ModuleType]) -> None:
    parts = load("gpu_parts")
    assert parts.merged_tokens(4096 + 512, [4096], 512, 0.5) == 2048 + 512
    assert parts.merged_tokens(1024, [4096, 1024], 77, 0.75) == 256
    assert parts.merged_tokens(77, [4096, 1024], 77, 0.5) == 77
    assert parts.short_path("/x/site-packages/torch/nn/f.py") == "torch/nn/f.py"
    assert parts.short_path("/toma_fx/y/toma_fx/run/f.py") == "toma_fx/run/f.py"
    assert parts.short_path("/elsewhere/f.py") == "f.py"


def small(out: Path, *arguments: str) -> list[str]:
    return ["--device", "cpu", "--toy", "--rounds", "5", "--out", str(out), *arguments]


def test_every_part_runs_in_small(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, out = load("gpu"), tmp_path / "gpu.json"
    arguments = small(out, "--models", "flux")
    assert gpu.main(arguments) == 0
    found = entries(out)
    assert list(found) == [key.name for key in gpu.order(["flux"], [256])]
    for variant, kinds in {
        "eager": {"step": 28},
        "merged": {"refresh": 6, "reuse": 22},
        "cached": {"plain": 10, "cached_plain": 18},
    }.items():
        result = found[f"steps flux 256 {variant}"]["result"]
        assert result["counts"] == kinds
        assert set(result["kinds_ms"]) == set(kinds)
        assert result["mean_ms"] > 0
        assert result["peak_mib"] > 0
        assert result.get("finite", True)
    both = found["steps flux 256 both"]["result"]
    assert sum(both["counts"].values()) == 28
    assert {"refresh", "cached"} < set(both["compile_s"])
    assert found["host flux 256 merged"]["result"]["synchronizations"]["merged"] == (
        "counted by torch.cuda.set_sync_debug_mode, which the CPU does not have"
    )
    text = (tmp_path / found["profile flux 256 merged"]["result"]["text"]).read_text()
    assert "attention" in text
    default, paper = found["selection flux 256"]["result"]["rows"]
    assert default["equal"]
    assert default["us"]["operator"]["median"] > 0
    assert "merges no token" in paper["left_alone"]  # windows of a token each
    (row,) = found["attention flux 256"]["result"]["rows"]
    assert (row["query"][-2], row["merged_key"][-2]) == (256 + 16, 128 + 16)
    before = out.read_text()
    capsys.readouterr()
    assert gpu.main(arguments) == 0
    assert entries(out) == json.loads(before)["measurements"]
    assert capsys.readouterr().out.count("measured before") == len(found)


def test_sdxl_in_inference_mode(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    gpu, out = load("gpu"), tmp_path / "gpu.json"
    arguments = ["--models", "sdxl", "--variants", "merged", "--inference-mode"]
    assert gpu.main(small(out, *arguments)) == 0
    result = entries(out)["steps sdxl 256 merged"]["result"]
    assert result["finite"]
    assert result["tokens"] == [[256, 128]]
