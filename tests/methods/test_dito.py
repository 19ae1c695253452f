"""DiTo and IBTM: selections that see what the step before gave, against loops over whole steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests import denoisers, reference
from tests.export.in_process import InProcess, opened
from tests.methods.test_methods import inputs, model
from tests.tracing import Program, check_onnx, check_traces
from toma_fx.errors import ConfigError, StateError
from toma_fx.export.builder import export
from toma_fx.methods.dito import DiTo, DiToConfig
from toma_fx.methods.ibtm import IBTM, IBTMConfig
from toma_fx.methods.setting import Place
from toma_fx.methods.toma import ToMA

PENALTY = 0.3
CALLS = [inputs(seed=i, timestep=900.0 - 100 * i) for i in range(6)]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dito(grid: tuple[int, ...], tile: tuple[int, ...], keep: int, penalty: float = PENALTY) -> DiTo:
    return DiTo(grid, tile, keep, 20.0, penalty=penalty)


# -- the selections -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [3, 8])
def test_often_chosen_tokens_are_less_similar(keep: int) -> None:
    """Three selections in a row, each token's similarities divided by exp(penalty) a time."""
    setting, counts = dito((8, 4), (4, 4), keep), [[[0] * 16, [0] * 16] for _ in range(2)]
    chosen = setting.select(noise(2, 32, 6))
    for turn in range(3):
        x = noise(2, 32, 6, seed=turn)
        if turn:
            chosen = setting.select_again(x, {"times": chosen[1]})
        windows = reference.windows_of([(8, 4)], (4, 4))
        for b in range(2):
            for t, members in enumerate(windows):
                unit = x[b, members] / x[b, members].norm(dim=1, keepdim=True)
                count = counts[b][t]
                weight = torch.tensor([math.exp(-PENALTY * (n - min(count))) for n in count])
                want = reference.greedy(weight[:, None] * (unit @ unit.T) * weight, keep)
                assert chosen[0][b, t].tolist() == want
                for i in want:
                    count[i] += 1
        assert chosen[1].tolist() == counts


def test_without_a_penalty_it_is_toma() -> None:
    x, toma = noise(2, 64, 6), ToMA((8, 8), (4, 4), 8, 20.0)
    free = dito((8, 8), (4, 4), 8, penalty=0.0)
    chosen = free.select(x)
    assert torch.equal(chosen[0], toma.select(x)[0])
    assert torch.equal(free.select_again(x, {"times": chosen[1]})[0], chosen[0])
    again = dito((8, 8), (4, 4), 8).select_again(x, {"times": chosen[1]})
    assert not torch.equal(again[0], chosen[0]), "the same tokens again would be penalized"


def test_importance_is_what_guidance_changes() -> None:
    x = noise(4, 32, 6)
    setting = IBTM((8, 4), (4, 4), 5, 20.0)
    (idx,) = setting.select(x)
    for row in range(2):
        for t, members in enumerate(reference.windows_of([(8, 4)], (4, 4))):
            size = [float((x[2 + row, i] - x[row, i]).norm()) for i in members]
            want = sorted(range(16), key=lambda i: -size[i])[:5]
            assert idx[row, t].tolist() == idx[2 + row, t].tolist() == want
    assert torch.equal(setting.select(x.flip(0))[0], idx.flip(0)), "halves and rows may be swapped"
    same = torch.cat([x[:2], x[:2]])
    assert setting.select(same)[0][0, 0].tolist() == [0, 1, 2, 3, 4], "ties go to the first"
    with pytest.raises(ConfigError, match="two halves"):
        setting.select(x[:3])


def test_configurations() -> None:
    place = Place((8, 8), (8, 8))
    setting = DiToConfig(tile=4, scale=20, penalty=PENALTY).setting(place)
    assert setting == dito((8, 8), (4, 4), 8)
    assert IBTMConfig(tile=4, scale=20).setting(place) == IBTM((8, 8), (4, 4), 8, 20.0)
    for config in (DiToConfig(destinations_every=3, weights_every=2), IBTMConfig(select_at=(0, 3))):
        assert [config.renewal(i) for i in (0, 1, 3)] == ["match", "reuse", "match"]
    with pytest.raises(ConfigError, match="0 or more"):
        DiToConfig(penalty=-1)


SETTINGS = [dito((8, 6), (4, 3), 3), IBTM((2, 4, 4), (1, 4, 2), 3, 20.0)]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_traces(setting: ToMA, dtype: torch.dtype) -> None:
    check_traces(Program(setting), noise(2, math.prod(setting.grid), 8).to(dtype))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_exports_to_onnx(setting: ToMA, tmp_path: Any) -> None:
    check_onnx(Program(setting), noise(2, math.prod(setting.grid), 8), tmp_path / "signal.onnx")


# -- whole steps ----------------------------------------------------------------------------------


def pattern_of(x: Tensor, source: Tensor, times: Tensor, method: str) -> reference.Pattern:
    """Destinations and weights of 8x8 tokens by `source`, windows of 4x4, by loops."""
    windows = reference.windows_of([(8, 8)], (4, 4))
    merge, unmerge = torch.zeros(len(x), 32, 64), torch.zeros(len(x), 64, 32)
    for b in range(len(x)):
        for t, members in enumerate(windows):
            unit = source[b, members] / source[b, members].norm(dim=1, keepdim=True)
            if method == "dito":
                weight = torch.exp(-PENALTY * (times[b, members] - times[b, members].min()))
                chosen = reference.greedy(weight[:, None] * (unit @ unit.T) * weight, 8)
            else:
                half = len(x) // 2
                size = (source[b % half, members] - source[b % half + half, members]).norm(dim=1)
                chosen = size.argsort(descending=True)[:8].tolist()
            times[b, [members[i] for i in chosen]] += 1
            share = torch.softmax(20.0 * (unit @ unit.T)[chosen], 0)
            rows = slice(t * 8, t * 8 + 8)
            merge[b, rows, members] = share / share.sum(1, keepdim=True)
            unmerge[b, members, rows] = share.T
    return reference.Pattern(merge, unmerge, torch.zeros(len(x), 32, dtype=torch.long))


@pytest.mark.parametrize("method", ["dito", "ibtm"])
def test_steps_equal_an_eager_implementation(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selected on what each stage gave the step before, the first time on what comes in."""
    net = denoisers.small_sdxl()
    calls = [denoisers.at_step(denoisers.small_sdxl_inputs, i) for i in range(5)]
    fields: dict[str, Any] = {
        "scope": "stack", "tile": 4, "min_tokens": 60, "scale": 20.0,
        "destinations_every": 2, "weights_every": 2,
    }  # fmt: skip
    fields |= {"penalty": PENALTY} if method == "dito" else {}
    optimized = toma_fx.optimize(net, method=method, **fields)
    got = [optimized(**call)[0].clone() for call in calls]
    assert optimized.totals == {"refresh": 1, "reuse": 2, "match": 2}

    s = reference.Settings((4, 4), 8, scale=20.0, scope="stack")
    eager = reference.reference_unet(net, {64: s})
    outputs: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    stage = ""

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            nonlocal stage
            stage = name

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, result: Tensor) -> None:
            outputs[name] = result.clone()

        return hook

    for name, module in eager.named_modules():
        if type(module).__name__ == "Transformer2DModel":
            module.register_forward_pre_hook(enter(name))
        if type(module).__name__ == "BasicTransformerBlock":
            module.register_forward_hook(leave(name.partition(".transformer_blocks")[0]))

    def make(x: Tensor, *args: Any) -> reference.Pattern:
        counted = times.setdefault(stage, torch.zeros(x.shape[:2]))
        return pattern_of(x, outputs.get(stage, x), counted, method)

    monkeypatch.setattr(reference, "make_pattern", make)
    for i, (call, mine) in enumerate(zip(calls, got, strict=True)):
        s.refresh = i % 2 == 0
        want = eager(**call)[0]
        assert denoisers.relative(mine, want) < 1e-5, f"step {i}"
    on_entry = toma_fx.optimize(
        net, method="toma", **{k: fields[k] for k in fields if k != "penalty"}
    )
    others = [on_entry(**call)[0].clone() for call in calls]
    assert denoisers.relative(got[2], others[2]) > 1e-4, "it matters what is looked at"


@pytest.mark.parametrize("scope", ["sublayer", "block", "stack", "keys"])
def test_signals_in_every_scope(scope: Any) -> None:
    """Kept in every step that computes: image tokens of the stream, text left out."""
    net = denoisers.small_flux()
    optimized = toma_fx.optimize(
        net, method="dito", scope=scope, share="block", min_tokens=16, destinations_every=2
    )
    for i in range(3):
        optimized(**denoisers.at_step(denoisers.small_flux_inputs, i, 0.9))
    assert optimized.totals == {"refresh": 1, "reuse": 1, "match": 1}
    plan, buffers = optimized.specializations[0].plan, optimized.states[0].buffers
    assert [g.signal for g in plan.groups] == list(plan.signals)
    assert {tuple(buffers[name].shape) for name in plan.signals} == {(2, 64, 32)}


# -- around the steps -----------------------------------------------------------------------------

FIELDS: dict[str, Any] = {"scope": "block", "min_tokens": 1, "destinations_every": 2}


def optimized_model(**fields: Any) -> Any:
    return toma_fx.optimize(model(), method="dito", weights_every=2, **{**FIELDS, **fields})


def test_states_artifacts_and_compilation_agree(tmp_path: Path) -> None:
    optimized = optimized_model()
    want = [optimized(**call).clone() for call in CALLS]
    by_state, state = optimized_model(), toma_fx.State()
    for call, expected in zip(CALLS, want, strict=True):
        output, state = by_state.step(call, state)
        assert torch.equal(output, expected)
    assert {"signal_p0", "pattern_p0_times"} <= set(state.kept)
    compiled = optimized_model().compile(backend="aot_eager")
    target = InProcess()
    manifest = export(optimized_model(), inputs(), tmp_path / "a", target)
    assert list(manifest.calls[0].programs) == ["refresh", "match", "reuse"]
    assert manifest.calls[0].programs["match"].takes == ("signal_p0", "pattern_p0_times")
    assert manifest.calls[0].programs["match"].instead == "refresh"
    loaded = opened(target, tmp_path / "a")
    for call, expected in zip(CALLS, want, strict=True):
        assert denoisers.relative(loaded(**call), expected) < 1e-5
        assert denoisers.relative(compiled(**call), expected) < 1e-5


def test_requests_of_one_batch_must_match_together() -> None:
    optimized, early = optimized_model(), toma_fx.State()
    for call in CALLS[:2]:
        _, early = optimized.step({k: v[:1] for k, v in call.items()}, early)
    with pytest.raises(StateError, match="step 2: match"):
        optimized.step(CALLS[2], [early, toma_fx.State()])


@pytest.mark.parametrize("method", ["dito", "ibtm"])
def test_steps_without_merging_give_signals_too(method: str) -> None:
    """The first step that merges selects on them, unless it counts earlier selections."""
    optimized = toma_fx.optimize(model(), method=method, first_step=2, weights_every=2, **FIELDS)
    for call in CALLS[:4]:
        optimized(**call)
    first = "refresh" if method == "dito" else "match"
    assert optimized.totals == {"plain": 2, first: 1, "reuse": 1}


def test_an_odd_batch_has_no_halves() -> None:
    optimized = toma_fx.optimize(model(), method="ibtm", **FIELDS)
    with pytest.raises(ConfigError, match="two halves"):
        optimized(**inputs(batch=3))
