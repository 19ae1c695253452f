"""Processes that share the tokens give what one process gives, or an error in all of them."""

from __future__ import annotations

import copy
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import toma_fx
from examples.own_model import PictureDenoiser
from tests.run.processes import run_ranks
from toma_fx.compat.pytorch import tree_leaves
from toma_fx.errors import ParallelError, RankLostError, RankMismatchError, TomaError
from toma_fx.methods.toma import ToMA, ToMAConfig
from toma_fx.passes import merge_segments
from toma_fx.passes.gather_keys import key_runs

GRID = (8, 8)
SMALL: dict[str, Any] = {"min_tokens": 16, "tile": 2, "destinations_every": 3, "weights_every": 2}
"""Refresh, reuse and reweigh in the first four steps."""
TIMES = (900.0, 700.0, 500.0, 300.0)


def picture_model() -> nn.Module:
    torch.manual_seed(0)
    return PictureDenoiser(GRID, width=32, depth=1).eval().requires_grad_(False)


class Scaled(nn.Module):
    """A model with a number that is no weight."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = picture_model(), scale

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """As the model, times the number."""
        return self.inner(sample, timestep) * self.scale


def picture_inputs(seed: int = 1) -> dict[str, Any]:
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"sample": sample, "timestep": torch.full((2,), TIMES[0])}


def steps(model: Any, inputs: dict[str, Any], times: Any = TIMES) -> list[Tensor]:
    """The outputs of a generation whose picture changes from step to step."""
    name = next(n for n in ("sample", "hidden_states") if n in inputs)
    noise = torch.randn(inputs[name].shape, generator=torch.Generator().manual_seed(7))
    outputs = []
    for i, moment in enumerate(times):
        call = {**inputs, name: inputs[name] + 0.1 * i * noise}
        call["timestep"] = torch.full_like(inputs["timestep"], moment)
        outputs.append(tree_leaves(model(**call))[0])
    return outputs


def apart(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    pairs = zip(some, others, strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def error_of(call: Callable[[], Any]) -> str:
    """The error that a call raises, as text."""
    try:
        call()
    except TomaError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


# -- two small processes --------------------------------------------------------------------------


def share_pictures(rank: int) -> dict[str, Any]:
    """What one process finds out."""
    model, inputs, group = picture_model(), picture_inputs(), distributed.group.WORLD
    alone = toma_fx.optimize(model, **SMALL)
    shared = toma_fx.optimize(model, parallel=group, **SMALL)
    expected, found = steps(alone, inputs), {}
    found["apart"] = apart(steps(shared, inputs), expected)
    found["kinds"] = shared.totals
    found["flops"] = [m.specializations[0].program("reuse").flops for m in (alone, shared)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_segments, "gather_keys", lambda *_, **__: None)
        blind = toma_fx.optimize(model, parallel=group, **SMALL)
        found["blind apart"] = apart(steps(blind, inputs), expected)
    other = toma_fx.optimize(model, parallel=group, **SMALL)
    found["other noise"] = error_of(lambda: other(**picture_inputs(seed=rank)))
    heavier = picture_model()
    with torch.no_grad():
        next(heavier.parameters()).mul_(1 + rank)
    other = toma_fx.optimize(heavier, parallel=group, **SMALL)
    found["other weights"] = error_of(lambda: other(**inputs))
    other = toma_fx.optimize(Scaled(1.0 + rank).eval(), parallel=group, **SMALL)
    found["other scale"] = error_of(lambda: other(**inputs))
    if rank:
        shared.reset()  # here a generation begins, there the old one goes on
    late = {**inputs, "timestep": torch.full((2,), 50.0)}
    found["other step"] = error_of(lambda: shared(**late))
    found["after it"] = apart(steps(shared, inputs), expected)
    return found


def test_two_processes_share_the_tokens_or_disagree_in_both() -> None:
    for found in run_ranks(2, share_pictures):
        assert found["kinds"] == {"refresh": 2, "reweigh": 1, "reuse": 1}
        assert found["apart"] <= 1e-5
        assert found["flops"][1] < 0.7 * found["flops"][0]
        assert found["blind apart"] > 1e-3, "without the others' keys attention is another one"
        for case, word in (("noise", "inputs"), ("step", "runs refresh"), ("weights", "weights")):
            assert found[f"other {case}"].startswith("RankMismatchError")
            assert word in found[f"other {case}"]
        assert found["other scale"].startswith("RankMismatchError")
        assert found["after it"] <= 1e-5


# -- whole models ---------------------------------------------------------------------------------

SCOPES = ("stack", "block", "sublayer")
WHOLE: dict[str, Any] = {"min_tokens": 16, "destinations_every": 3, "weights_every": 2}


def named(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A denoiser, a call of it, and windows that four processes can share."""
    from tests import denoisers  # which the small processes can do without

    if name == "flux":
        return denoisers.flux(), denoisers.flux_inputs(), {}
    if name == "sdxl":
        return denoisers.sdxl(), denoisers.sdxl_inputs(), {}
    from tests.zoo import CASES

    case = next(case for case in CASES if case.name == name)
    return case.build(), case.inputs(1), {**case.config, "tile": (3, 2), "min_tokens": 4}


def share_model(rank: int, name: str, variants: list[dict[str, Any]]) -> list[Any]:
    """How far apart the outputs are, the kinds of steps, and how many text tokens of how many a
    process has, for each variant."""
    model, inputs, fields = named(name)
    found = []
    for variant in variants:
        options = {**WHOLE, **fields, **variant}
        alone = toma_fx.optimize(model, **options)
        shared = toma_fx.optimize(model, parallel=distributed.group.WORLD, **options)
        distance = apart(steps(shared, inputs), steps(alone, inputs))
        text = shared.specializations[0].plan.text
        own = () if text is None else [(text.lengths[s.name], s.length) for s in text.segments]
        found.append((distance, shared.totals, list(own)))
    return found


@pytest.mark.parametrize(
    ("name", "count"), [("flux", 2), ("flux", 4), ("sdxl", 2), ("sdxl", 4), ("wan", 2), ("wan", 3)]
)
def test_models_give_what_one_process_gives(name: str, count: int) -> None:
    variants: list[dict[str, Any]] = [{"scope": scope} for scope in SCOPES]
    variants += [{"cache": 2, "scope": "block"}, {"proportional": True}]
    variants += [{"method": "dito"}, {"first_step": 1, "last_step": 2}]
    expected = {"refresh", "reuse", "reweigh", "cached", "match", "plain"}
    if count > 2:  # than this machine may have processors
        variants, expected = [{"cache": 2}], {"refresh", "reweigh", "cached"}
    # 5 text tokens: 2 and the one left, or 1 and the one left; only attention reads those of others
    texts = {("flux", 2): [(3, 5)], ("flux", 4): [(2, 5)]}.get((name, count), [])
    for found in run_ranks(count, share_model, name, variants):
        assert max(distance for distance, *_ in found) <= 1e-5, found
        assert set().union(*(totals for _, totals, _ in found)) >= expected
        assert all(text == texts for *_, text in found)


MASKED = (
    "chroma", "bria_fibo", "hunyuan_dit", "qwen_image_layered", "ltx2", "wan_vace", "svd",
    "controlnet_xs", "sd3_controlled", "hunyuan_video", "nucleus_image", "latte",
)  # fmt: skip
"""Masks, rotary tables, skips, sound beside pictures, frames as rows, pictures to follow."""
JOINT = {
    "chroma", "bria_fibo", "qwen_image_layered", "sd3_controlled", "hunyuan_video", "nucleus_image",
}  # fmt: skip
"""Those that join text to the image, masked or not."""


@pytest.mark.parametrize("name", MASKED)
def test_what_lines_up_with_tokens_is_shared_with_them(name: str) -> None:
    for found in run_ranks(2, share_model, name, [{}, {"scope": "block", "proportional": True}]):
        assert max(distance for distance, *_ in found) <= 1e-5, found
        assert [bool(text) for *_, text in found] == [name in JOINT] * 2


def read_text_alone(tokens: Any, text: Any, lengths: Any) -> Any:
    """`key_runs`, but of the text each process has its own part alone."""
    runs = key_runs(tokens, text, lengths)
    joined = text is not None and len(runs) > len(tokens.segments)
    return [replace(run, shared=False) if joined and i == 0 else run for i, run in enumerate(runs)]


def share_text(rank: int, names: tuple[str, ...], inductor: bool) -> dict[str, Any]:
    """A model of joint attention whose text goes on to a later block, in several ways."""
    from tests.denoisers import flux_inputs, small_flux

    model, found, outputs = small_flux(), {}, {}
    variants: dict[str, dict[str, Any]] = {
        "merged": {},
        "cached": {"cache": {"every": 2, "order": 1, "include": ("transformer_blocks.*",)}},
    }
    for name in names:
        alone, shared = (
            toma_fx.optimize(model, parallel=group, **{**WHOLE, **variants[name]})
            for group in (None, distributed.group.WORLD)
        )
        inputs = flux_inputs(8, 8)
        runs = [m.compile() if inductor else m for m in (shared, alone)]
        outputs[name] = [steps(run, inputs) for run in runs]
        found[name] = apart(*outputs[name])
        found[f"{name} text"] = shared.specializations[0].plan.text
    if not inductor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merge_segments, "key_runs", read_text_alone)
            blind = toma_fx.optimize(model, parallel=distributed.group.WORLD, **WHOLE)
            found["blind"] = apart(steps(blind, inputs), outputs["merged"][1])
    return found


@pytest.mark.parametrize(
    ("count", "names", "inductor"),
    [(2, ("merged", "cached"), False), (4, ("merged",), False), (2, ("merged",), True)],
)
def test_text_that_attention_joins_is_shared(
    count: int, names: tuple[str, ...], inductor: bool
) -> None:
    for found in run_ranks(count, share_text, names, inductor, patience=300 if inductor else 60):
        assert max(found[name] for name in names) <= 1e-5
        assert found["merged text"].inner
        assert not found["merged text"].whole, "only attention reads text of other processes"
        assert inductor or found["blind"] > 1e-3
        if "cached" in names:
            assert found["cached text"].whole, "what is kept over steps has all of it"


def share_compiled(rank: int, outer: bool) -> float:
    """How far apart compiled programs are, shared or not."""
    torch.manual_seed(0)
    model = PictureDenoiser(GRID, width=32, depth=3).eval().requires_grad_(False)
    inputs, outputs = picture_inputs(), []
    for group in (None, distributed.group.WORLD):
        optimized = toma_fx.optimize(model, parallel=group, **SMALL)
        outputs.append(steps(torch.compile(optimized) if outer else optimized.compile(), inputs))
    return apart(*outputs)


@pytest.mark.parametrize("outer", [False, True])
def test_compiled_programs_share_tokens(outer: bool) -> None:
    assert max(run_ranks(2, share_compiled, outer, patience=300)) <= 1e-5


def package(rank: int, folder: str) -> list[float]:
    """How far an exported program, and one of AOTInductor, are from what they were made of."""
    model, inputs = picture_model(), picture_inputs()
    shared = toma_fx.optimize(model, parallel=distributed.group.WORLD, **SMALL)
    (expected,) = steps(shared, inputs, TIMES[:1])
    program = shared.specializations[0].program("refresh").graph_module
    call = (inputs["sample"], inputs["timestep"])
    exported = torch.export.export(program, call, strict=False)
    path = str(Path(folder) / f"{rank}")
    torch.export.save(exported, f"{path}-exported.pt2")
    loaded = torch.export.load(f"{path}-exported.pt2").module()
    aoti = torch._inductor.aoti_compile_and_package(exported, package_path=f"{path}.pt2")
    runs = (loaded, torch._inductor.aoti_load_package(aoti))
    return [apart([run(*call)[0]], [expected]) for run in runs]


def test_a_program_is_packaged_with_its_collectives(tmp_path: Path) -> None:
    for distances in run_ranks(2, package, str(tmp_path), patience=300):
        assert max(distances) <= 1e-5


# -- a process that is gone -----------------------------------------------------------------------


def lose(rank: int, how: str, check: bool) -> list[str]:
    """What the first process is told when the second one is gone after two steps."""
    group = toma_fx.Parallel(distributed.group.WORLD, check_steps=check)
    shared = toma_fx.optimize(picture_model(), parallel=group, **SMALL)
    steps(shared, picture_inputs(), TIMES[:2])
    if rank and how == "dies":
        os._exit(3)
    if rank:
        time.sleep(20)
        return []
    call = {**picture_inputs(), "timestep": torch.full((2,), TIMES[2])}
    start = time.monotonic()
    first = error_of(lambda: shared(**call))
    waited = time.monotonic() - start
    again = error_of(lambda: shared(**call))
    assert time.monotonic() - start < waited + 1, "the second time it is known"
    return [first, again]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_process_is_an_error_in_time(how: str, check: bool) -> None:
    start = time.monotonic()
    errors, other = run_ranks(2, lose, how, check, patience=8)
    assert time.monotonic() - start < 60
    assert not other
    assert [e.partition(":")[0] for e in errors] == ["RankLostError"] * 2, errors


# -- what is refused, before anything is exchanged ------------------------------------------------


@pytest.fixture
def silent() -> Iterator[Any]:
    """A group of three processes that never answer, of which this is the second."""
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    yield distributed.group.WORLD
    if distributed.is_initialized():
        distributed.destroy_process_group()


class Written(nn.Module):
    """Attention written out, between two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """[B, 4, H, W] -> the same."""
        x = sample.flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out((q @ k.mT).softmax(-1) @ v)
        return x.mT.unflatten(2, sample.shape[2:]) * timestep.mean()


@pytest.mark.parametrize(
    ("model", "options", "part"),
    [
        (picture_model, {}, "16 windows of 2x2 can't be shared evenly by 3 processes"),
        (picture_model, {"window": "global"}, "its window is the whole picture"),
        (picture_model, {"method": "tomesd"}, "it matches tokens over the whole picture"),
        (picture_model, {"method": "random"}, "by the position in the grid"),
        (picture_model, {"scope": "keys", "tile": (8, 1)}, "there is nothing to share"),
        (picture_model, {"toma": False}, "there is nothing to share"),
        (Written, {"tile": (8, 2), "grid": None}, "other than by one fused attention operator"),
    ],
)
def test_what_can_not_be_shared(silent: Any, model: Any, options: Any, part: str) -> None:
    torch.manual_seed(0)
    fields = {"min_tokens": 16, "tile": 2, **options}
    if "method" in fields and fields["method"] == "tomesd":
        del fields["tile"]
    grid = (24, 16) if model is Written else (16, 16)
    shared = toma_fx.optimize(model().eval(), parallel=silent, **fields)
    call = {"sample": torch.randn(2, 4, *grid), "timestep": torch.full((2,), 9.0)}
    with torch.no_grad(), pytest.raises(ParallelError) as error:
        shared(**call)
    assert part in str(error.value)
    assert not isinstance(error.value, (RankLostError, RankMismatchError))
    assert error.value.hint


def test_text_of_a_length_that_depends_on_the_data_is_not_shared(silent: Any) -> None:
    model, inputs, fields = named("mochi")
    shared = toma_fx.optimize(model, parallel=silent, **fields)
    with torch.no_grad(), pytest.raises(ParallelError) as error:
        shared(**inputs)
    assert "the number of its keys depends on the data" in str(error.value)
    assert "transformer_blocks" in error.value.got
    assert "a padded text" in (error.value.hint or "")


@dataclass(frozen=True)
class Slanted(ToMA):
    """A method of a user's own, which looks at the position in the grid."""

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """ToMA's destinations, of tokens that weigh more the later they are."""
        return super().select(x * torch.arange(x.shape[1], device=x.device)[:, None])


@dataclass(frozen=True, kw_only=True)
class SlantedConfig(ToMAConfig):
    """What users write."""

    name = "slanted"
    made: ClassVar[type[ToMA]] = Slanted

    def make_setting(self, **fields: Any) -> ToMA:
        """Its setting."""
        return self.made(**fields)


class Declared(Slanted):
    """One that says how windows are shared."""

    share = ToMA.share


class DeclaredConfig(SlantedConfig):
    """What users write."""

    made = Declared


def test_how_a_method_is_shared_is_not_inherited(silent: Any) -> None:
    options: dict[str, Any] = {"min_tokens": 16, "tile": (4, 8), "parallel": 2}
    model, inputs = picture_model(), picture_inputs()
    with pytest.raises(ParallelError, match="Slanted does not say itself how") as error:
        toma_fx.explain(model, inputs, method=SlantedConfig, **options)
    assert "share = ToMA.share in class Slanted" in (error.value.hint or "")
    assert toma_fx.explain(model, inputs, method=DeclaredConfig, **options).processes == 2
    shared = toma_fx.optimize(model, parallel=silent, method=SlantedConfig, min_tokens=16, tile=2)
    with torch.no_grad(), pytest.raises(ParallelError, match="does not say itself how"):
        shared(**inputs)


def test_a_report_is_of_one_process(silent: Any) -> None:
    model, inputs = picture_model(), picture_inputs()
    alone, shared = (
        toma_fx.explain(model, inputs, parallel=count, scope="stack", **SMALL) for count in (1, 2)
    )
    assert (alone.processes, alone.exchanges, alone.sent_bytes) == (1, 0, 0)
    assert "processes" not in str(alone)
    assert [r.merged for r in shared.rows] == [r.merged // 2 for r in alone.rows]
    assert shared.flops_before == alone.flops_before
    assert shared.flops_after < 0.7 * alone.flops_after
    # two rows of 16 of the 32 merged tokens, 32 keys and values wide; 32 tokens at the exit
    assert (shared.exchanges, shared.sent_bytes) == (2, 4 * (2 * 16 * 64 + 2 * 32 * 32))
    assert "1 of 2 processes" in str(shared)
    optimized = toma_fx.optimize(model, parallel=silent)
    options = {**SMALL, "tile": (8, 1), "window": "tile"}
    with pytest.raises(ParallelError, match="shared evenly by 3"):
        toma_fx.explain(optimized, inputs, **options)
    assert toma_fx.explain(optimized, inputs, parallel=1, **options).processes == 1


def test_processes_must_be_there(silent: Any) -> None:
    model = picture_model()
    mesh = init_device_mesh("cpu", (3, 1), mesh_dim_names=("rows", "columns"))
    elsewhere = distributed.device_mesh.DeviceMesh("cpu", [0, 2])
    for parallel, part in (
        (mesh, "2 dimensions (rows, columns)"),
        (elsewhere, "other processes"),
        (3, "int"),
    ):
        with pytest.raises(ParallelError, match="no processes to share") as error:
            toma_fx.optimize(model, parallel=parallel)
        assert part in error.value.got
    rows = mesh["rows"]
    shared = toma_fx.optimize(model, parallel=rows)
    assert toma_fx.optimize(model, parallel=silent)._ranks == shared._ranks, "the same processes"
    distributed.destroy_process_group()
    with pytest.raises(ParallelError, match="none in this process"):
        toma_fx.optimize(model, parallel=rows)


def test_copies_share_with_the_same_processes(silent: Any) -> None:
    shared = toma_fx.optimize(picture_model(), parallel=silent)
    assert copy.deepcopy(shared)._ranks == shared._ranks
    with pytest.raises(ParallelError, match="can't be pickled"):
        pickle.dumps(shared)


def test_an_artifact_has_no_other_processes(silent: Any, tmp_path: Path) -> None:
    shared = toma_fx.optimize(picture_model(), parallel=silent, min_tokens=16, tile=(4, 1))
    with pytest.raises(ParallelError, match="artifact"):
        toma_fx.export.aoti(shared, picture_inputs(), tmp_path / "out")
