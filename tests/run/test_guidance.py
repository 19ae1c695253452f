"""Guidance in two processes: what each returns is what one process would."""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.testing._internal.distributed.fake_pg import FakeStore

import toma_fx
from tests import denoisers
from toma_fx.errors import ParallelError, RankLostError, RankMismatchError
from toma_fx.run.ranks import Ranks

STEPS = 4
SECONDS = 60
OPTIONS: dict[str, dict[str, Any]] = {
    "merged": {"min_tokens": 16, "destinations_every": 3},
    "cached": {"toma": False, "cache": {"every": 2}},
}


def halves(denoiser: Any) -> list[Tensor]:
    """SDXL: both sides in one call, and at last one side alone."""
    call, outputs = denoisers.sdxl_inputs(), []
    with denoiser.generation(STEPS) as run:
        for i in range(STEPS):
            run.step(i)
            torch.manual_seed(i)
            sample, t = torch.randn_like(call["sample"]), torch.tensor(900.0 - 100 * i)
            outputs.append(denoiser(**{**call, "sample": sample, "timestep": t})[0])
    return outputs


def sides(denoiser: Any) -> list[Tensor]:
    """Flux with true CFG: a call for each side, with texts of different lengths."""
    outputs = []
    texts = {
        "cond": denoisers.flux_inputs(8, 8, seed=1, batch=1),
        "uncond": denoisers.flux_inputs(8, 8, seed=2, batch=1),
    }
    with denoiser.generation(STEPS) as run:
        for i in range(STEPS):
            run.step(i)
            torch.manual_seed(i)
            latents = torch.randn_like(texts["cond"]["hidden_states"])
            found = []
            for name, text in texts.items():
                call = {**text, "hidden_states": latents, "timestep": torch.tensor([0.9 - 0.1 * i])}
                with denoiser.cache_context(name):
                    found.append(denoiser(**call)[0][:, :60])  # pipelines slice it
            outputs.append(found[1] + 2.0 * (found[0] - found[1]))
    return outputs


def three(denoiser: Any) -> list[Tensor]:
    """Rows that can't be halved."""
    return [denoiser(**denoisers.flux_inputs(8, 8, batch=3))[0]]


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], list[Tensor]]]] = {
    "sdxl": (denoisers.sdxl, halves),
    "flux": (lambda: denoisers.small_flux(num_single_layers=0), sides),
    "three": (lambda: denoisers.small_flux(num_single_layers=0), three),
}


def optimized(name: str, options: str) -> Any:
    return toma_fx.optimize(MODELS[name][0](), **OPTIONS[options])


def draw(rank: int, group: Any, name: str, options: str) -> tuple[list[Tensor], dict[str, int]]:
    """In each process."""
    denoiser = optimized(name, options)
    denoiser.enable_guidance_parallel(group)
    assert denoiser.is_guidance_parallel_enabled
    outputs = MODELS[name][1](denoiser)
    return outputs, denoiser.totals


def disagree(rank: int, group: Any) -> str:
    denoiser = optimized("sdxl", "merged")
    denoiser.enable_guidance_parallel(group)
    call = denoisers.sdxl_inputs()
    if rank:  # twice as many pictures
        call = {
            k: torch.cat([v, v]) if isinstance(v, Tensor) and v.dim() else v
            for k, v in call.items()
        }
        call["added_cond_kwargs"] = {
            k: torch.cat([v, v]) for k, v in call["added_cond_kwargs"].items()
        }
    try:
        denoiser(**call)
    except RankMismatchError as error:
        return str(error)
    return ""


def enable(rank: int, group: Any, what: str) -> str:
    """Enable it for other weights, or settings, in each process."""
    model = MODELS["flux"][0]()
    if what == "weights":
        next(model.parameters()).add_(rank)
    ratio = 0.25 if rank and what == "settings" else 0.5
    denoiser = toma_fx.optimize(model, **OPTIONS["merged"], ratio=ratio)
    try:
        denoiser.enable_guidance_parallel(group)
    except RankMismatchError as error:
        assert not denoiser.is_guidance_parallel_enabled
        return str(error)
    return ""


def lose(rank: int, group: Any) -> str:
    denoiser = optimized("flux", "merged")
    denoiser.enable_guidance_parallel(group)
    if rank == 1:
        os._exit(0)
    try:
        sides(denoiser)
    except RankLostError as error:
        return str(error)
    return ""


def work(
    rank: int, port: int, folder: Path, job: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )  # fmt: skip
    with torch.no_grad():
        result = job(rank, distributed.group.WORLD, *args)
    (folder / str(rank)).write_bytes(pickle.dumps(result))
    if job is not lose:
        distributed.destroy_process_group()


def in_two(folder: Path, job: Callable[..., Any], *args: Any) -> list[Any]:
    """What a job returns in each of two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=work, args=(rank, port, folder, job, args)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(2 * SECONDS)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    files = [folder / str(rank) for rank in range(2)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["sdxl", "flux"])
@torch.no_grad()
def test_both_processes_get_what_one_gets(name: str, options: str, tmp_path: Path) -> None:
    denoiser = optimized(name, options)
    want = MODELS[name][1](denoiser)
    for outputs, totals in in_two(tmp_path, draw, name, options):
        assert all(denoisers.relative(a, b) < 1e-5 for a, b in zip(outputs, want, strict=True))
        calls = STEPS if name == "sdxl" else STEPS + 1  # its side, and once the other
        assert sum(totals.values()) == calls
    assert sum(denoiser.totals.values()) == (STEPS if name == "sdxl" else 2 * STEPS)


@torch.no_grad()
def test_rows_that_cant_be_halved_are_computed_by_both(tmp_path: Path) -> None:
    want = three(optimized("three", "merged"))
    for outputs, totals in in_two(tmp_path, draw, "three", "merged"):
        assert denoisers.relative(outputs[0], want[0]) < 1e-5
        assert totals == {"refresh": 1}


def test_processes_that_disagree_both_say_so(tmp_path: Path) -> None:
    for message in in_two(tmp_path, disagree):
        assert "a call of 2 rows" in message
        assert "a call of 4 rows" in message


@pytest.mark.parametrize(("what", "differs"), [("weights", 1), ("settings", 0), ("nothing", None)])
def test_processes_with_other_models_both_say_so(
    what: str, differs: int | None, tmp_path: Path
) -> None:
    for message in in_two(tmp_path, enable, what):
        found = re.findall(r"configuration (\w+), weights (\w+)", message)
        if differs is None:
            assert not message
            continue
        assert found[0][differs] != found[1][differs]
        assert found[0][1 - differs] == found[1][1 - differs]


@pytest.fixture
def silent() -> Iterator[Any]:
    """A group of two processes of which the other one never answers."""
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_copies_go_on_with_the_same_processes(silent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "agree", lambda *_: None)
    denoiser = optimized("flux", "merged")
    for copied in (
        copy.copy(denoiser),
        copy.deepcopy(denoiser),
        pickle.loads(pickle.dumps(denoiser)),
    ):
        assert not copied.is_guidance_parallel_enabled
    denoiser.enable_guidance_parallel(silent)
    for copied in (copy.copy(denoiser), copy.deepcopy(denoiser)):
        assert copied._guidance.ranks == denoiser._guidance.ranks
        assert copied._guidance is not denoiser._guidance, "what it knows of sides is its own"
        copied.disable_guidance_parallel()
    assert denoiser.is_guidance_parallel_enabled
    with pytest.raises(ParallelError, match="can't be pickled") as error:
        pickle.dumps(denoiser)
    assert "disable_guidance_parallel()" in (error.value.hint or "")
    denoiser.disable_guidance_parallel()
    assert not pickle.loads(pickle.dumps(denoiser)).is_guidance_parallel_enabled


def test_a_lost_process_is_an_error(tmp_path: Path) -> None:
    message, _ = in_two(tmp_path, lose)
    assert "does not answer" in message


def test_without_processes() -> None:
    denoiser = optimized("flux", "merged")
    with pytest.raises(ParallelError, match="init_process_group"):
        denoiser.enable_guidance_parallel(None)
    assert not denoiser.is_guidance_parallel_enabled
