"""Several processes give the result of one, also after some of them were killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.measure.fake import FakeSubject, run

ROOT = Path(__file__).parents[2]
PROMPTS = [f"prompt {i}" for i in range(6)]


def launch(out: Path, mode: str) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [sys.executable, "-m", *launcher, "--nproc-per-node", "2", "-m"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command += ["tests.measure.test_processes", str(out), mode]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_two_processes_share_the_pictures_and_survive_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "two"
    killed = launch(out, "kill")
    assert killed.returncode != 0
    assert not (out / "report.json").exists()
    before = [p.read_text() for p in sorted(out.glob("images*.jsonl"))]
    assert any(before), "what was drawn is kept"
    done = launch(out, "go on")
    assert done.returncode == 0, done.stderr[-2000:]
    one = run(tmp_path / "one", prompts=PROMPTS)
    assert (out / "images.jsonl").read_text() == (tmp_path / "one/images.jsonl").read_text()
    assert not list(out.glob("images-*.jsonl"))
    report = json.loads((out / "report.json").read_text())
    assert report["configs"] == json.loads(one.to_json())["configs"]
    drawn = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("drawn-*"))]
    assert len(drawn) == 2
    recorded = sum(text.count("\n") for text in before)
    assert sum(map(len, drawn)) <= 3 * len(PROMPTS) - recorded
    (out / "run.json").write_text("{")
    failed = launch(out, "go on")
    assert failed.returncode != 0
    assert "ResultsError" in failed.stderr


def main(out: Path, mode: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])

    class Killed(FakeSubject):
        def draw(self, cases, config=None):  # type: ignore[no-untyped-def]
            if mode == "kill" and rank == 1 and len(self.drawn) == 4:
                os.kill(os.getpid(), 9)
            return super().draw(cases, config)

    subject = Killed()
    result = run(out, subject, prompts=PROMPTS)
    assert result.pictures == len(PROMPTS)
    (out.parent / f"drawn-{rank}").write_text(json.dumps(subject.drawn))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
