"""The stage for datasets: by itself, and inside Ray Data."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toma_fx
from tests.measure.fake import FakeSubject
from tests.network import without_network
from toma_fx.errors import ConfigError, UnknownNameError
from toma_fx.models.named import load_embedded

ROOT = Path(__file__).parents[2]
CLASSES = ["cat", "clock", "coins", "cat", "flower"]


def kept(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "pictures").iterdir())]


def test_pictures_are_those_of_generate(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(5)]
    toma_fx.generate(FakeSubject(), prompts, "toma", out=tmp_path, seed=7)
    stage = toma_fx.DrawPictures(FakeSubject(), "toma", seed=7)
    order = np.array([3, 0, 4])
    rows = {"index": order, "prompt": np.array(prompts, object)[order], "own": ["x", "y", "z"]}
    drawn = stage(rows)
    assert drawn["png"] == [kept(tmp_path)[i] for i in order]
    assert drawn["own"] == ["x", "y", "z"]
    assert set(drawn) == {"index", "prompt", "own", "png"}
    assert stage({"prompt": ["prompt 3"], "seed": [10]})["png"] == drawn["png"][:1]


def test_columns_in_which_rows_lack_a_value() -> None:
    seen: list[Any] = []

    class Seen(FakeSubject):
        def draw(self, cases: Any, config: Any = None) -> Any:
            seen.extend(cases)
            return super().draw(cases, config)

    rows = {
        "prompt": np.array(["a", "b"], object),
        "seed": np.array([2.0, np.nan]),
        "index": np.array([5, 6]),
        "width": np.array([np.nan, 64.0]),
        "negative_prompt": np.array([None, "x"], object),
    }
    assert len(toma_fx.DrawPictures(Seen(batch=2))(rows)["png"]) == 2
    assert [(c.prompt, c.seed, c.options) for c in seen] == [
        ("a", 2, {}), ("b", 6, {"negative_prompt": "x", "width": 64})
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({"prompt": ["a", "b"], "seed": [1, None]}, "no seed"),
        ({"prompt": ["a"]}, "no seed"),
        ({"prompt": ["a"], "index": ["x"]}, "no seed"),
        ({"prompt": ["a"], "seed": [2.0**60]}, "not a prompt"),
        ({"prompt": [3], "seed": [1]}, "not a prompt"),
        ({"seed": [1]}, "not a prompt"),
        ({"prompt": ["a"], "seed": [1], "width": [0.5]}, "width"),
    ],
)
def test_rows_that_can_not_be_drawn(rows: dict[str, Any], match: str) -> None:
    subject = FakeSubject()
    with pytest.raises(ConfigError, match=match) as caught:
        toma_fx.DrawPictures(subject)(rows)
    assert "of the batch" in caught.value.where
    assert not subject.drawn


def test_models_by_name() -> None:
    with pytest.raises(UnknownNameError, match="nearest: cat"):
        toma_fx.DrawPictures("tiny-sdxl")({"prompt": ["cats"], "seed": [0]})
    with pytest.raises(ConfigError, match="dtype"):
        toma_fx.DrawPictures("tiny-sdxl", dtype="float16")
    with pytest.raises(ConfigError, match="device"):
        toma_fx.DrawPictures(FakeSubject(), device="cpu")
    with pytest.raises(UnknownNameError, match="balanced"):
        toma_fx.DrawPictures("tiny-sdxl", "balance")


def test_in_ray_data(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    toma_fx.generate(load_embedded("tiny-sdxl"), CLASSES, "toma", out=tmp_path / "one", steps=2)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    module = [sys.executable, "-m", "tests.offline.test_stage", str(tmp_path / "ray")]
    done = subprocess.run(
        [*without_network(), *module], env={**os.environ, **quiet}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept(tmp_path / "ray") == kept(tmp_path / "one")


def main(out: Path) -> None:
    """Draw in two actors of a cluster of this process's own."""
    import ray

    short = tempfile.mkdtemp(prefix="ray-")  # names of sockets may have some hundred characters
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20,
        _temp_dir=short, _node_ip_address="127.0.0.1",
    )  # fmt: skip
    rows = ray.data.from_items([{"index": i, "prompt": p} for i, p in enumerate(CLASSES)])
    drawn = rows.map_batches(
        toma_fx.DrawPictures, fn_constructor_args=("tiny-sdxl", "toma"),
        fn_constructor_kwargs={"steps": 2}, batch_size=2,
        compute=ray.data.ActorPoolStrategy(size=2),
    ).take_all()  # fmt: skip
    ray.shutdown()
    shutil.rmtree(short, ignore_errors=True)
    (out / "pictures").mkdir(parents=True)
    for row in drawn:
        (out / f"pictures/{row['index']:05}.png").write_bytes(row["png"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
