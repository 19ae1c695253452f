"""Pictures of many prompts: shards, kills, what is refused, and that nothing depends on them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests.measure.fake import FakeSubject
from toma_fx.cli.main import main
from toma_fx.errors import ConfigError, ResultsError
from toma_fx.measure.subjects import Case
from toma_fx.offline.generate import Generated
from toma_fx.offline.shards import Shard

ROOT = Path(__file__).parents[2]
PROMPTS = [f"prompt {i}" for i in range(7)]


def draw(out: Path, subject: Any = None, **changes: Any) -> Generated:
    arguments = {"prompts": PROMPTS, "recipe": "toma", "shard": "0/1", **changes}
    return toma_fx.generate(subject or FakeSubject(batch=2), out=out, **arguments)


def files(folder: Path) -> dict[str, str]:
    """Digests of the pictures, read from the disk."""
    found = folder.rglob("*.png")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Killed(FakeSubject):
    """Stops in the middle of its second batch's pictures."""

    def draw(self, cases: Any, config: Any = None) -> Any:
        if len(self.drawn) == 4:
            raise KeyboardInterrupt
        return super().draw(cases, config)


def test_the_folder_says_what_it_holds(tmp_path: Path) -> None:
    result = draw(tmp_path, seed=5)
    assert (result.present, result.drawn, result.complete) == (7, 7, True)
    listed = lines(tmp_path / "pictures.jsonl")
    assert [(p["index"], p["prompt"], p["seed"]) for p in listed] == [
        (i, f"prompt {i}", 5 + i) for i in range(7)
    ]
    assert {p["file"]: p["sha256"] for p in listed} == files(tmp_path)
    text = (tmp_path / "pictures.jsonl").read_bytes()
    assert result.digest == hashlib.sha256(text).hexdigest()
    manifest = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert manifest["recipe"]["ratio"] == 0.5
    assert manifest["settings"]["steps"] == 20
    # the installed package's, which leaves out what the build is for ("+cpu")
    assert torch.__version__.startswith(manifest["versions"]["torch"])
    assert manifest["denoisers"]["denoiser"]["weights"]
    assert (manifest["seed"], manifest["pictures"]) == (5, 7)
    again = FakeSubject(batch=2)
    assert draw(tmp_path, again, seed=5).digest == result.digest
    assert not again.drawn


@pytest.mark.parametrize("count", [2, 3])
def test_shards_share_the_pictures(tmp_path: Path, count: int) -> None:
    one, subjects = draw(tmp_path / "one"), [FakeSubject(batch=2) for _ in range(count)]
    out = tmp_path / "many"
    results = [draw(out, s, shard=(i, count)) for i, s in enumerate(subjects)]
    assert [r.complete for r in results] == [False] * (count - 1) + [True]
    assert not results[0].digest
    assert results[-1].digest == one.digest
    assert files(out) == files(tmp_path / "one")
    assert sorted(p for s in subjects for p, _ in s.drawn) == PROMPTS, "each is drawn once"


def test_a_run_goes_on_with_other_shards(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        draw(out, Killed(batch=2))
    with open(out / "ledger-0-of-1.jsonl", "a") as file:
        file.write('{"index": 4, "prom')  # a line that a kill broke off
    assert len(lines_of_ledgers := files(out)) == 4
    lost = out / "pictures/00001.png"
    lost.unlink()
    subjects = [FakeSubject(batch=2), FakeSubject(batch=2)]
    first = draw(out, subjects[0], shard="0/2")
    assert first.present == 6
    last = draw(out, subjects[1], shard="1/2")
    assert last.digest == draw(tmp_path / "one").digest
    assert lines_of_ledgers.items() <= files(out).items(), "the lost picture is what it was"
    drawn = [p for s in subjects for p, _ in s.drawn]
    assert drawn == [f"prompt {i}" for i in (0, 1, 4, 5, 6)], "a batch is drawn as it was before"
    recorded = [line for path in out.glob("ledger-*") for line in path.read_text().split("\n")]
    assert sum('"index": 0,' in line for line in recorded) == 1, "what was there is not written"


def test_what_another_process_drew_meanwhile_is_not_drawn_again(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []

    class Beside(FakeSubject):
        def draw(self, cases: Any, config: Any = None) -> Any:
            if not self.drawn:
                draw(tmp_path, shard="1/2")
            return super().draw(cases, config)

    subject = Beside(batch=2)
    result = draw(tmp_path, subject, progress=lambda what, count: told.append((what, count)))
    assert [p for p, _ in subject.drawn] == [f"prompt {i}" for i in (0, 1, 4, 5)]
    assert result.complete
    assert told[0] == ("draw", 7)
    assert sum(count for what, count in told if not what) == 7, "pictures of all processes"


def test_one_process_for_each_shard(tmp_path: Path) -> None:
    class Beside(FakeSubject):
        def draw(self, cases: Any, config: Any = None) -> Any:
            with pytest.raises(ResultsError, match="0/1 twice"):
                draw(tmp_path)
            return super().draw(cases, config)

    assert draw(tmp_path, Beside(batch=2)).complete


def test_the_launcher_names_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Shard.of(None) == Shard(0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert draw(tmp_path, shard=None).shard == "1/4"
    assert Shard.of("2/3") == Shard.of((2, 3)) == Shard(2, 3)
    for wrong in ("3/3", "-1/3", "1", "a/b", "0/0", (1.0, 2), 1, "0/2/3", "1/²"):
        with pytest.raises(ConfigError, match="no shard"):
            Shard.of(wrong)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"recipe": "toma:ratio=0.25"}, r"recipe\.ratio 0\.25"),
        ({"recipe": "original"}, "recipe"),
        ({"prompts": PROMPTS[1:]}, "pictures 6"),
        ({"seed": 1}, "seed 1"),
        ({"seeds": 2}, "seeds 2"),
        ({"subject": {"batch": 3}}, r"settings\.batch 3"),
        ({"subject": {"batch": 2, "steps": 7}}, r"settings\.steps 7"),
        ({"version": "9.9"}, r"versions\.torch"),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path)
    before = files(tmp_path)
    if changes.pop("version", None):
        monkeypatch.setattr("toma_fx.offline.generate.versions", lambda _: {"torch": "9.9"})
    subject = FakeSubject(**changes.pop("subject", {"batch": 2}))
    with pytest.raises(ResultsError, match=match):
        draw(tmp_path, subject, **changes)
    assert not subject.drawn
    assert files(tmp_path) == before


def test_what_a_recipe_measured_is_no_setting(tmp_path: Path) -> None:
    class Named(FakeSubject):
        def draw(self, cases: Any, config: Any = None) -> Any:
            return super().draw(cases, config.config)

    for speed in (1.5, 1.6):
        recipe = toma_fx.Recipe(toma_fx.ToMAConfig(), measured={"speedup": speed})
        assert draw(tmp_path, Named(batch=2), recipe=recipe).complete


@pytest.mark.parametrize(
    "line", ['{"index": 0', "[]", '{"index": 9, "file": "pictures/00009.png"}']
)
def test_damaged_lines_are_named(tmp_path: Path, line: str) -> None:
    draw(tmp_path)
    path = tmp_path / "ledger-0-of-1.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ResultsError, match="line 8"):
        draw(tmp_path)


def test_pictures_that_differ_count_as_the_file_is(tmp_path: Path) -> None:
    digest = draw(tmp_path).digest
    other = lines(tmp_path / "ledger-0-of-1.jsonl")[0] | {"sha256": "0" * 64}
    for name in ("ledger-0-of-3.jsonl", "ledger-0-of-0.jsonl"):  # read after and before
        (tmp_path / name).write_text(json.dumps(other) + "\n")
    assert draw(tmp_path).digest == digest


def test_values_that_are_not_finite_are_told(tmp_path: Path) -> None:
    class Broken(FakeSubject):
        def draw(self, cases: Any, config: Any = None) -> Any:
            pictures = super().draw(cases, config)
            return pictures.where(pictures < 2 * (cases[0].seed != 2), torch.nan)

    result = draw(tmp_path, Broken())
    assert result.not_finite == 1
    assert [p["index"] for p in lines(tmp_path / "pictures.jsonl") if not p["finite"]] == [2]
    assert "1 pictures have values" in str(result)


def test_prompts_of_several_sizes(tmp_path: Path) -> None:
    prompts = [Case("a"), Case("b", 0, {"width": 8}), Case("c"), Case("d", 0, {"width": 8})]
    calls: list[list[str]] = []

    class Calls(FakeSubject):
        def draw(self, cases: Any, config: Any = None) -> Any:
            calls.append([case.prompt for case in cases])
            return super().draw(cases, config)

    assert draw(tmp_path, Calls(batch=2), prompts=prompts).complete
    assert calls == [["a", "c"], ["b", "d"]]


# -- the command ------------------------------------------------------------------------------


def words(out: Path, recipe: str, prompts: str = "prompts.txt") -> list[str]:
    path = out.parent / prompts
    if prompts == "prompts.txt":
        path.write_text("# classes\ncat\nclock\ncoins\ncat\nflower\nrocket\n", encoding="utf-8")
    return ["generate", "--model", "tiny-sdxl", "--prompts", str(path), "--recipe", recipe,
            "--steps", "3", "--batch", "2", "--out", str(out)]  # fmt: skip


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = [*words(tmp_path / "out", "original"), "--steps", "1"]
    assert main([*out, "--limit", "2", "--shard", "0/2"]) == 0
    assert "2 of 2 pictures" in capsys.readouterr().out
    assert main([*out, "--limit", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["drawn"], found["complete"], found["shard"]) == (0, True, "0/1")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "cat"}\n{"prompt": "dog"}\n')
    bad = words(tmp_path / "b", "original", "bad.jsonl")
    for arguments, reason in (
        (out, "pictures 6"),
        (bad, "bad.jsonl, line 2"),
        ([*out, "--shard", "2/2"], "no shard"),
        (words(tmp_path / "b", "balance"), "nearest: balanced"),
        ([*out, "--dtype", "float16"], "dtype"),
    ):
        assert main(arguments) == 1
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """A process that runs code; it kills itself in the middle of the picture that KILL says."""
    code = f"from tests.offline import test_generate; test_generate.prepare(); {code}"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=env)


def command(arguments: list[str], **environment: str) -> subprocess.Popen[bytes]:
    """A process that runs the command."""
    code = "import sys; sys.exit(test_generate.main(sys.argv[1:]))"
    return start(code, *arguments, **environment)


def prepare() -> None:
    """What a process of a test does first."""
    torch.set_num_threads(1)
    kill, replace, count = os.environ.get("KILL"), os.replace, [0]

    def killing(part: Path, path: Path) -> None:
        count[0] += path.suffix == ".png"
        if count[0] == int(kill or 0):
            part.write_bytes(part.read_bytes()[:100])
            os.kill(os.getpid(), 9)
        replace(part, path)

    if kill:
        os.replace = killing


def test_processes_that_are_killed_draw_the_same(tmp_path: Path) -> None:
    """One process, two, and two of which each was killed (SIGKILL) in the middle of a picture."""
    recipe = "toma:ratio=0.5,cache=2"
    assert command(words(tmp_path / "one", recipe)).wait() == 0
    out = words(tmp_path / "two", recipe)
    pair = [command(out, RANK=str(i), WORLD_SIZE="2") for i in range(2)]
    assert [p.wait() for p in pair] == [0, 0]
    out = words(tmp_path / "killed", recipe)
    killed = [command([*out, "--shard", f"{i}/2"], KILL=str(2 - i)) for i in range(2)]
    assert [p.wait() for p in killed] == [-9, -9]
    assert not (tmp_path / "killed/pictures.jsonl").exists()
    assert len(files(tmp_path / "killed")) == 1
    pair = [command([*out, "--shard", f"{i}/2"]) for i in range(2)]
    assert [p.wait() for p in pair] == [0, 0]
    want = {p["file"]: p["sha256"] for p in lines(tmp_path / "one/pictures.jsonl")}
    assert len(want) == 6
    for name in ("one", "two", "killed"):
        assert files(tmp_path / name) == want, name
        index = tmp_path / name / "pictures.jsonl"
        assert index.read_bytes() == (tmp_path / "one/pictures.jsonl").read_bytes()
        recorded = [p["index"] for x in index.parent.glob("ledger-*") for p in lines(x)]
        assert sorted(recorded) == list(range(6)), "no picture twice"


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL, when half of a picture is written."""
    out = tmp_path / "out"
    code = f"test_generate.draw(test_generate.Path({str(out)!r}))"
    assert start(code, KILL="4").wait() == -9
    assert len(files(out)) == 3
    assert len(lines(out / "ledger-0-of-1.jsonl")) == 2, "the other of the batch does not count"
    subjects = [FakeSubject(batch=2), FakeSubject(batch=2)]
    digest = [draw(out, s, shard=(i, 2)) for i, s in enumerate(subjects)][-1].digest
    assert digest == draw(tmp_path / "one").digest
    assert sorted(p for s in subjects for p, _ in s.drawn) == PROMPTS[2:]
