"""The worker of the example server, and what it takes: without HTTP."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.examples import load_example
from toma_fx.errors import ConfigError, MissingPackageError, StateError
from toma_fx.models import tiny
from toma_fx.run import compiled

orders = load_example("orders", "examples/serve")
engines = load_example("engine", "examples/serve")

BUCKETS = (2,)
STEPS = {"cat": 3, "rocket": 4, "china": 2}


@pytest.fixture(scope="module", params=["tiny-flux-neither", "tiny-flux-both", "tiny-sdxl-merged"])
def engine(request: pytest.FixtureRequest) -> Any:
    model, _, method = request.param.rpartition("-")
    options: dict[str, Any] = {"toma": method != "neither"}
    if method == "both":
        options["cache"] = {"every": 2, "warmup_steps": 1}
    return engines.Engine(model, BUCKETS, **options)


def run(engine: Any) -> list[Any]:
    """All events until nothing is left; of a number of steps that has a bound."""
    events = []
    for _ in range(30):
        events += engine.step()
        if not engine.busy:
            return events
    raise AssertionError("does not end")


def alone(engine: Any, prompt: str, seed: int) -> Tensor:
    """What the model's own sampler draws with the same denoiser."""
    model, steps = engine.model, STEPS[prompt]
    with engine.denoiser.generation(steps=steps):
        image: Tensor = model.generate(
            [prompt] * 2, seed=[seed] * 2, steps=steps, denoiser=engine.denoiser
        )
    return image[0]


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def test_pictures_come_and_go_and_are_what_each_is_alone(engine: Any) -> None:
    """Three pictures share room for two; one ends early and another takes its place."""
    for seed, (prompt, steps) in enumerate(STEPS.items()):
        engine.add(prompt, prompt, seed=seed, steps=steps, preview_every=2)
    engine.add("left", "coins", steps=9)
    engine.step()
    engine.drop("left")
    events = run(engine)
    done = {e.picture: e for e in events if e.kind == "done"}
    assert {name: e.step for name, e in done.items()} == STEPS
    for seed, prompt in enumerate(STEPS):
        assert difference(done[prompt].image, alone(engine, prompt, seed)) < 1e-4
    assert difference(done["cat"].image, done["rocket"].image) > 0.1, "the comparison can fail"
    previews = [(e.picture, e.step) for e in events if e.kind == "preview"]
    assert previews == [("cat", 2), ("rocket", 2)]
    assert events[0].image.shape == (3, engines.PREVIEW, engines.PREVIEW)
    assert not engine.batcher.requests


def test_a_picture_that_fails_fails_alone(engine: Any) -> None:
    engine.add("good", "cat", steps=2)
    engine.add("bad", "cat", steps=2)
    engine.step()
    engine._drawing["bad"].x[0, 0, 0, 0] = torch.nan
    events = {e.picture: e for e in run(engine)}
    assert events["good"].kind == "done"
    assert events["bad"].kind == "failed"
    assert isinstance(events["bad"].error, StateError)
    assert not engine.batcher.requests


def test_files_hold_the_picture() -> None:
    image = torch.stack([torch.full((2, 4), x) for x in (-1.0, 0.0, 1.0)])
    with Image.open(io.BytesIO(engines.png(image))) as read:
        assert read.size == (4, 2)
        assert read.getpixel((3, 1)) == (0, 128, 255)


def read(**body: Any) -> Any:
    return orders.read_order(body, "tiny-sdxl", tiny.CLASSES, tiny.SIZE)


def test_orders() -> None:
    assert read(prompt="cat", user="x", size="64x64") == orders.Order("cat")
    order = read(prompt="cat", n=2, seed=7, steps=3, stream=True, response_format="b64_json")
    assert order == orders.Order("cat", 2, 3, 7, stream=True, preview_every=5)
    assert orders.Order(**json.loads(json.dumps(vars(order)))) == order


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "dog"), ("prompt", None), ("prompt", ["cat"]), ("n", 0), ("n", 9), ("n", "1"),
        ("n", True), ("size", "512x512"), ("response_format", "url"), ("model", "dall-e-3"),
        ("steps", 1000), ("steps", 2.0), ("seed", -1), ("stream", "yes"), ("quality", "hd"),
        ("preview_every", 2),
    ],
)  # fmt: skip
def test_orders_that_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as info:
        read(**{"prompt": "cat", field: value})
    assert info.value.where == field


def test_a_body_that_is_no_object() -> None:
    with pytest.raises(ConfigError, match="not a JSON object"):
        orders.read_order(["cat"], "tiny-sdxl", tiny.CLASSES, tiny.SIZE)


def test_without_litserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litserve", None)
    with pytest.raises(MissingPackageError, match=r"pip install toma-fx\[serve\]"):
        load_example("server", "examples/serve")
    del sys.modules["examples/serve.server"]


def test_pictures_of_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by a stand-in for Inductor: for what the warm-up showed, an expanded row."""
    programs: list[Any] = []

    def compile_graph(graph: Any, values: Any, patches: Any) -> Any:
        programs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "compile_graph", compile_graph)
    pictures = []
    for options in ({}, {"compiled": True}):
        engine = engines.Engine("tiny-flux", BUCKETS, toma=True, **options)
        engine.warmup()
        engine.add("a", "cat", seed=1, steps=2)
        engine.add("b", "rocket", seed=2, steps=2)
        events = run(engine)
        assert [e.kind for e in events] == ["done", "done"], events
        pictures.append(torch.stack([e.image for e in events]))
    assert programs
    assert difference(*pictures) <= 1e-4
    assert difference(*pictures[0]) > 0.1, "the comparison can fail"
