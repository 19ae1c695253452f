"""Runs: what they find and write, how they go on, and what they refuse."""

from __future__ import annotations

import builtins
import json
import logging
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import toma_fx
from tests.logs import logged
from tests.measure.fake import FakeSubject, run
from toma_fx.cli.main import main
from toma_fx.errors import ConfigError, ResultsError, UnknownNameError
from toma_fx.measure import records
from toma_fx.measure.results import Quality
from toma_fx.measure.scores import score_pairs


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


def kept(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255


def test_scores_are_those_of_the_pictures_that_are_kept(tmp_path: Path) -> None:
    result = run(tmp_path)
    records = lines(tmp_path)
    assert [(r["index"], r["config"]) for r in records] == [
        (i, name) for i in range(4) for name in ("original", "toma", "tomesd")
    ]
    for record in (r for r in records if r["config"] == "tomesd"):
        name = f"{record['index']:05}.png"
        got, want = (kept(tmp_path / f"pictures/{d}" / name) for d in ("2-tomesd", "0-original"))
        for metric, (value,) in score_pairs(got, want).items():
            assert record["scores"][metric] == pytest.approx(value, abs=1e-4)
    own = [r["scores"]["psnr"] for r in records if r["config"] == "toma"]
    spread = result.configs[0].scores["psnr"]
    assert spread.mean == pytest.approx(fmean(own))
    assert spread.worst == min(own)
    assert spread.order == (3, 2, 1, 0), "the fake is worse at higher seeds"
    assert result.configs[0].scores["mean_abs"].order == (3, 2, 1, 0)
    assert result.folder == str(tmp_path)
    assert json.loads(result.to_json())["pictures"] == 4
    assert "tomesd" in str(result)


def test_every_difference_comes_with_an_interval() -> None:
    few = run(None, prompts=["a"] * 4)
    assert all("no difference" in c.verdict for c in few.comparisons)
    assert few.folder == ""
    many = run(None, prompts=["a"] * 40, metrics=["psnr", "mean_abs"])
    assert [(c.metric, c.verdict) for c in many.comparisons] == [
        ("psnr", "toma is better"), ("mean_abs", "toma is better")
    ]  # fmt: skip
    assert many.comparisons[0].interval.mean > 0 > many.comparisons[1].interval.mean


def test_a_run_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    class Killed(FakeSubject):
        def draw(self, cases: Any, config: Any = None) -> Any:
            if len(self.drawn) == 8:
                raise KeyboardInterrupt
            return super().draw(cases, config)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed())
    assert not (tmp_path / "report.json").exists()
    with open(tmp_path / "images.jsonl", "a") as file:
        file.write('{"index": 2, "config": "tome')  # a line that a kill broke off
    subject = FakeSubject()
    again = run(tmp_path, subject)
    assert subject.drawn == [
        ("c", "tomesd"), ("d", "original"), ("d", "toma"), ("d", "tomesd")
    ]  # fmt: skip
    assert again.configs == run(None).configs
    last = FakeSubject()
    assert run(tmp_path, last).configs == again.configs
    assert not last.drawn


def test_a_picture_that_is_damaged_is_drawn_again(tmp_path: Path) -> None:
    before = run(tmp_path)
    (tmp_path / "pictures/1-toma/00002.png").write_bytes(b"\x89PNG")
    text = (tmp_path / "images.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "images.jsonl").write_text("".join(x for i, x in enumerate(text) if i != 7))
    subject = FakeSubject()
    assert run(tmp_path, subject).configs == before.configs
    assert subject.drawn == [("c", "toma")]


def test_another_metric_is_added_without_drawing(tmp_path: Path) -> None:
    run(tmp_path, metrics=["psnr"])
    subject = FakeSubject()
    result = run(tmp_path, subject, metrics=["psnr", "ssim"])
    assert not subject.drawn
    assert result.metrics == ("psnr", "ssim")
    assert all(
        set(r["scores"]) == {"psnr", "ssim"} for r in lines(tmp_path) if r["config"] == "toma"
    )
    assert len(lines(tmp_path)) == 12


@pytest.mark.parametrize(
    "changes",
    [{"prompts": ["a", "b"]}, {"configs": ["toma"]}, {"seed": 1}, {"subject": {"steps": 3}}],
)
def test_results_of_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    run(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    subject = FakeSubject(**changes.pop("subject", {}))
    with pytest.raises(ResultsError, match="other settings"):
        run(tmp_path, subject, **changes)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not subject.drawn


def test_a_refusal_names_what_differs(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ResultsError) as caught:
        run(tmp_path, FakeSubject(steps=3), configs={"toma": "toma:ratio=0.25", "b": "tomesd"})
    assert caught.value.expected.startswith("settings.steps 20; configs.toma.ratio 0.5; ")
    assert caught.value.got.startswith("settings.steps 3; configs.toma.ratio 0.25; ")
    assert caught.value.got.count("configs.b") == 1


@pytest.mark.parametrize("other", [20, 30])
def test_processes_may_open_a_folder_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: int
) -> None:
    """Another process writes its `run.json` after this one has looked for it."""
    (tmp_path / ".0123.part").write_text("half of a file that another process writes")
    written = records.write_new_file

    def late(path: Path, data: str) -> None:
        monkeypatch.setattr(records, "write_new_file", written)
        records.open_folder(tmp_path, {"steps": other})
        written(path, data)

    monkeypatch.setattr(records, "write_new_file", late)
    if other == 20:
        records.open_folder(tmp_path, {"steps": 20})
    else:
        with pytest.raises(ResultsError, match="steps 30"):
            records.open_folder(tmp_path, {"steps": 20})


def test_other_weights_are_another_run(tmp_path: Path) -> None:
    run(tmp_path)
    subject = FakeSubject()
    torch.nn.init.zeros_(subject.denoisers["denoiser"].weight)
    with pytest.raises(ResultsError, match="denoisers"):
        run(tmp_path, subject)


@pytest.mark.parametrize("what", ["something else", "a file", "damaged line", "run.json", "edited"])
def test_folders_that_are_no_run_of_this_kind(tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    if what in ("damaged line", "run.json", "edited"):
        run(out)
    if what == "something else":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    elif what == "a file":
        out.write_text("mine")
    elif what == "damaged line":
        text = (out / "images.jsonl").read_text()
        (out / "images.jsonl").write_text(text.replace('"psnr"', "psnr", 1))
    elif what == "run.json":
        (out / "run.json").write_text("{")
    else:
        text = (out / "run.json").read_text()
        (out / "run.json").write_text(text.replace('"pictures": 4', '"pictures": 5'))
    match = {"something else": "thesis.txt", "a file": "a file", "damaged line": "line 2",
             "run.json": "can't be read", "edited": "was changed"}[what]  # fmt: skip
    with pytest.raises(ResultsError, match=match):
        run(out)


def test_thresholds_are_of_the_mean_unless_they_say_otherwise() -> None:
    result = run(None)
    mean, worst = (getattr(result.configs[0].scores["psnr"], k) for k in ("mean", "worst"))
    assert worst < mean
    between = (mean + worst) / 2
    assert run(None, configs=["toma"], require=[f"psnr={between}", "mean_abs=100"]).passes
    assert not run(None, configs=["toma"], require=[f"psnr:worst={between}"]).passes
    assert not run(None, configs=["toma"], require=["mean_abs=0.5"]).passes


def test_a_threshold_on_what_was_not_measured_fails() -> None:
    with logged(logging.WARNING, "toma_fx.measure") as warnings:
        result = run(None, require=["clip=0.9"], metrics={"clip": "no/such/folder/at/all"})
    assert not result.passes
    assert result.checks[0].value is None
    assert set(result.skipped) == {"clip"}
    assert "clip" not in result.metrics
    assert any("clip is skipped" in text for text in warnings)
    assert "not measured" in str(result)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"metrics": ["sim"]}, UnknownNameError, "ssim"),
        ({"require": ["psn=3"]}, UnknownNameError, "psnr"),
        ({"require": ["psnr:men=3"]}, UnknownNameError, "mean"),
        ({"require": ["psnr=x"]}, ConfigError, "no number"),
        ({"configs": ["toma", "toma"]}, ConfigError, "twice"),
        ({"configs": {"original": "toma"}}, ConfigError, "original"),
        ({"configs": []}, ConfigError, "nothing to compare"),
        ({"configs": ["balance"]}, UnknownNameError, "balanced"),
        ({"configs": ["toma:ration=0.5"]}, UnknownNameError, "ratio"),
        ({"prompts": ["a"]}, ConfigError, "too few"),
        ({"prompts": ["a", 3]}, ConfigError, "not a prompt"),
        ({"steps": 3}, ConfigError, "settings already"),
        ({"stps": 3}, UnknownNameError, "steps"),
    ],
)
def test_what_is_refused_before_anything_is_drawn(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    subject = FakeSubject()
    with pytest.raises(error, match=match):
        run(tmp_path / "out", subject, **changes)
    assert not subject.drawn
    assert not (tmp_path / "out").exists()


def test_the_page_holds_everything_and_needs_nothing(tmp_path: Path) -> None:
    prompts = [f"a <b> & {i}" for i in range(3)]
    result = run(tmp_path, prompts=prompts, require=["psnr=90"])
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in page
    assert "a &lt;b&gt; &amp; 2" in page
    assert "<b> &" not in page
    assert page.count("data:image/png") >= 3 * (1 + 2 * 2)
    assert page.index("picture 2") < page.index("picture 0"), "worst first"
    assert 'class="fail">fail' in page
    assert isinstance(result, Quality)


def test_without_matplotlib_the_page_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with logged(logging.WARNING, "toma_fx.measure") as warnings:
        run(tmp_path)
    assert any("PNG plots are left out" in text for text in warnings)
    assert not list(tmp_path.glob("*.png"))
    assert (tmp_path / "index.html").exists()


def test_with_matplotlib_there_are_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(tmp_path)
    assert {p.name for p in tmp_path.glob("*.png")} == {
        f"spread-{m}.png" for m in ("psnr", "ssim", "mean_abs")
    }


def test_the_command_compares_an_embedded_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("# two classes\ncat\n\nclock\n", encoding="utf-8")
    words = ["quality", "--model", "tiny-sdxl", "--prompts", str(tmp_path / "prompts.txt"),
             "--config", "toma:ratio=0.25", "--steps", "2", "--rounds", "1", "--batch", "2",
             "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(words) == 0
    assert main([*words, "--require", "psnr=99"]) == 3, "drawn and timed before"
    assert "FAIL" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    (config,) = report["configs"]
    assert config["config"]["ratio"] == 0.25
    assert config["speed"]["steps"] == {"refresh": 1, "reuse": 1}
    assert config["speed"]["kept_bytes"] > 0
    assert config["speed"]["ideal_speedup"] > 1
    assert "<svg" in (tmp_path / "out/index.html").read_text()
    assert main([*words, "--dtype", "float16"]) == 1
    assert "dtype" in capsys.readouterr().err


def test_one_configuration_of_python_has_a_name() -> None:
    names = [r.name for r in run(None, configs=toma_fx.ToMAConfig(ratio=0.25)).configs]
    assert names == ["toma:ratio=0.25"]
