"""Which generation, step and pass a call is that nobody tells, on the calls alone."""

from __future__ import annotations

import gc
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.logs import logged
from tests.run.loops import CONFIG, call, optimized, same, text_of, truth
from tests.run.loops import denoiser as texted
from toma_fx.run.generation import CALLS, PASSES, Buffers, PassState
from toma_fx.run.guess import GENERATIONS, Facts, Guesses
from toma_fx.run.marks import Likeness, Mark
from toma_fx.run.scopes import Flow

A, B, C = (torch.full((2, 3), float(i)) for i in range(3))
IDS = torch.zeros(4)


class Caller:
    """Calls that guesses place: (timestep, text, ids) -> (step, pass or "new")."""

    def __init__(self) -> None:
        self.guesses = Guesses(Buffers())
        self.states: list[PassState] = []
        self.unsure = 0

    def __call__(
        self,
        timestep: float | None,
        text: Tensor,
        ids: Tensor = IDS,
        key: str = "",
        frames: Any = (),
    ) -> tuple[int, str]:
        flow = Flow(threading.get_ident(), frozenset(frames))
        marks = [Mark.of(text), Mark.of(ids)]
        generation, state = self.guesses.place(Facts(None, key, marks, 0, timestep, flow))
        fresh = not state.kept
        self.unsure += state.unsure
        state.unsure = False
        state.kept, state.caller = {"idx"}, None
        if state not in self.states:
            self.states.append(state)
        name = f"p{self.states.index(state)}"
        return generation.step, f"{name} anew" if fresh else name


def placed(*calls: Any) -> list[tuple[int, str]]:
    caller = Caller()
    return [caller(*call) for call in calls]


def test_one_call_a_step() -> None:
    assert placed((9, A), (8, A), (7, A)) == [(0, "p0 anew"), (1, "p0"), (2, "p0")]


def test_two_passes() -> None:
    calls = placed((9, A), (9, B), (8, A), (8, B))
    assert calls == [(0, "p0 anew"), (0, "p1 anew"), (1, "p0"), (1, "p1")]
    swapped = placed((9, A), (9, B), (8, B), (8, A))
    assert swapped[2:] == [(1, "p1"), (1, "p0")], "inputs tell, not the order"


@pytest.mark.parametrize("count", [2, 3, 6, 20])
@pytest.mark.parametrize("again", ["same", "equal"])
def test_tiles_are_told_by_their_order(count: int, again: str) -> None:
    caller = Caller()
    for step, timestep in enumerate((9, 8, 7)):
        for tile in range(count):
            text = A if again == "same" else A.clone()
            ids = IDS if again == "same" else IDS.clone()
            anew = " anew" if step == 0 else ""
            assert caller(timestep, text, ids) == (step, f"p{tile}{anew}")
    assert caller.unsure == 0


def test_another_number_of_tiles_selects_anew() -> None:
    """Nobody knows which of them were left out: none may use what another has selected."""
    caller = Caller()
    for timestep, count in ((9, 4), (8, 4), (7, 2)):
        for _ in range(count):
            caller(timestep, A)
    assert all("anew" in caller(6, A)[1] for _ in range(2))
    assert caller.unsure == 2
    assert not any("anew" in caller(5, A)[1] for _ in range(2))


def test_more_passes_than_are_kept() -> None:
    """The order of those that are left tells nothing any more."""
    caller = Caller()
    with logged(logging.WARNING) as messages:
        for timestep in (9, 8, 7):
            for _ in range(PASSES + 1):
                assert "anew" in caller(timestep, A)[1]
    assert len(messages) == 1


def test_a_second_call_at_some_steps() -> None:
    """Second-order solvers call twice at the later timesteps."""
    calls = placed((9, A), (8, A), (8, A), (7, A), (7, A), (6, A), (6, A))
    assert calls[1:3] == [(1, "p0"), (1, "p1 anew")]
    assert [name for _, name in calls[3:5]] == ["p0 anew", "p1 anew"], "not seen before"
    assert calls[5:] == [(3, "p0"), (3, "p1")]


def test_a_timestep_that_turns_back_begins() -> None:
    assert placed((5, A), (5, B), (9, A), (8, A))[2:] == [(0, "p2 anew"), (1, "p2")]


def test_one_step_generations() -> None:
    """Pictures of one step, from one prompt or several."""
    for texts in ([A] * 5, [A, B, C]):
        assert all("anew" in name for _, name in placed(*((9, text) for text in texts)))


@pytest.mark.parametrize("texts", ["one", "many"])
def test_one_step_generations_forever(texts: str) -> None:
    """A server with a model of one step: nothing grows, and no picture uses another's patterns."""
    caller, sizes = Caller(), []
    with logged(logging.WARNING):
        for _ in range(6 * PASSES):
            text = A if texts == "one" else torch.rand(2, 3)
            assert "anew" in caller(9, text)[1]
            generation = caller.guesses.of(threading.get_ident())[-1]
            sizes.append(len(generation.called))
        assert max(sizes) <= CALLS * PASSES + 1
        assert "anew" in caller(8, A)[1], "calls that were forgotten may have been alike"


def test_another_text_begins() -> None:
    caller = Caller()
    caller(9, A)
    caller(8, A)
    assert caller(7, B) == (0, "p1 anew")
    assert caller.unsure == 1
    assert caller(6, B) == (1, "p1")


def test_an_equal_text_in_another_tensor_begins_where_it_was_the_same_before() -> None:
    caller = Caller()
    caller(9, A)
    caller(8, A)
    assert caller(7, A.clone()) == (0, "p1 anew")
    caller = Caller()
    caller(9, A, IDS)
    assert caller(8, A, IDS.clone()) == (0, "p1 anew"), "ids made anew, the text not: a new picture"


def test_a_text_that_is_overwritten_begins() -> None:
    """Also where torch counts no write: through NumPy, or `.data`."""
    for write in (lambda x: x.add_(1), lambda x: x.numpy().fill(9), lambda x: x.data.add_(1)):
        text, caller = A.clone(), Caller()
        caller(9, text)
        write(text)
        assert "anew" in caller(8, text)[1]


def test_inputs_that_change_at_every_step_are_learned() -> None:
    """A residual of another network comes anew; the text says that it is the same picture."""
    caller = Caller()
    got = [caller(9 - i, A, torch.randn(4)) for i in range(5)]
    assert got[:2] == [(0, "p0 anew"), (0, "p1 anew")]
    assert got[2:] == [(1, "p1"), (2, "p1"), (3, "p1")]
    assert caller.unsure == 1


def test_timesteps_that_rise() -> None:
    """Known by the second rise in a row; the next generation knows it from the start."""
    caller = Caller()
    assert [caller(t, A)[0] for t in (1, 2, 3, 4)] == [0, 0, 1, 2]
    assert [caller(t, A)[0] for t in (1, 2, 3)] == [0, 1, 2]
    assert [caller(t, A)[0] for t in (1, 2)] == [0, 1]
    assert [caller(t, B)[0] for t in (9, 8, 7, 6)] == [0, 0, 1, 2]


def test_generations_that_take_turns() -> None:
    """Requests of different texts, each where it is."""
    caller = Caller()
    caller(9, A)
    caller(8, A)
    assert caller(9, B) == (0, "p1 anew")
    assert caller(7, A) == (2, "p0")
    assert caller(8, B) == (1, "p1")
    assert caller(6, A) == (3, "p0")
    assert caller.unsure == 0


def test_a_text_that_pictures_share_leads_back_to_none() -> None:
    """The negative prompt of a picture that was broken off, in one whose guidance begins late."""
    caller = Caller()
    for timestep, text in ((9, A), (9, B), (8, A)):
        caller(timestep, text)
    for timestep in (9, 8, 7):
        caller(timestep, C)
    assert caller(7, B) == (2, "p3 anew")
    caller = Caller()
    for timestep, text in ((9, A), (9, B), (8, A)):
        caller(timestep, text)
    for timestep in (9, 8):
        caller(timestep, C)
    assert caller(8, B) == (1, "p3 anew"), "it was not called at this step there"


def test_another_picture_of_a_text_ends_all_before_it() -> None:
    caller = Caller()
    for timestep, text in ((9, A), (8, A), (9, B), (9, A), (9, B)):
        caller(timestep, text)
    caller(8, B)
    assert caller(7, A) != (2, "p0"), "it was over when the text began again"


def test_few_generations_are_kept() -> None:
    caller, texts = Caller(), [torch.full((2, 3), float(i)) for i in range(GENERATIONS + 1)]
    for i, text in enumerate(texts):
        caller(9 + i, text)
    assert "anew" in caller(99, texts[0])[1], "its generation made room"
    assert caller(8, texts[-1])[1] == f"p{GENERATIONS}"


def test_tiles_whose_generation_made_room_in_the_middle_of_a_step() -> None:
    """The rest of the step is no whole step: its order tells nothing."""
    caller, texts = Caller(), [torch.full((2, 3), float(i)) for i in range(GENERATIONS)]
    caller(9, A)
    for i, text in enumerate(texts):
        caller(10 + i, text + 5)
    assert "anew" in caller(9, A)[1]
    for _ in range(2):
        assert "anew" in caller(8, A)[1]
    assert all("anew" in caller(7, A)[1] for _ in range(2)), "two calls, not one as before"
    assert not any("anew" in caller(6, A)[1] for _ in range(2))


def test_tiles_that_go_on_after_an_error() -> None:
    """As after a call that ran out of memory, and was tried again."""
    caller = Caller()
    for timestep in (9, 8):
        for _ in range(4):
            caller(timestep, A)
    for _ in range(2):
        caller(7, A)
    flow = Flow(threading.get_ident(), frozenset())
    caller.guesses.drop_those_of(flow, broken_off=True)
    for timestep, count in ((7, 2), (6, 4), (5, 4)):
        assert all("anew" in caller(timestep, A)[1] for _ in range(count)), timestep
    assert not any("anew" in caller(4, A)[1] for _ in range(4))


def test_the_batch_halves() -> None:
    caller = Caller()
    caller(9, A, key="two rows")
    assert caller(8, B, key="one row") == (1, "p1 anew")
    assert caller.unsure == 1
    assert caller(7, B, key="one row") == (2, "p1")


def test_without_a_timestep_every_call_selects() -> None:
    caller = Caller()
    assert [caller(None, A)[1] for _ in range(3)] == ["p0 anew", "p1 anew", "p2 anew"]
    assert caller.unsure == 3


def test_coroutines_are_told_apart() -> None:
    """One thread, one text: the frames around the calls differ."""
    caller = Caller()
    assert caller(9, A, frames={1, 2})[1] == "p0 anew"
    assert caller(9, A, frames={3})[1] == "p1 anew"
    assert caller(8, A, frames={3}) == (1, "p1")
    assert caller(8, A, frames={1, 2}) == (1, "p0")
    assert caller(7, A, frames={1, 4}) == (2, "p0"), "a helper of the first"
    assert "anew" in caller(6, A)[1]


def in_thread(work: Any) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def test_threads_are_told_apart_and_generators_followed() -> None:
    caller = Caller()
    caller(9, A)
    assert "anew" in in_thread(lambda: caller(8, A))[1]
    assert caller(8, A) == (1, "p0")
    caller(9, B, frames={7})
    assert in_thread(lambda: caller(8, B, frames={7})) == (1, "p2")


def test_buffers_keep_their_addresses_and_their_owners() -> None:
    buffers = Buffers()
    first, second = PassState(), PassState()
    for state in (first, second):
        state.bind("graph", buffers)
        state.keep({"idx": torch.ones(2)}, {})
    addresses = [s.buffers["idx"].data_ptr() for s in (first, second)]
    buffers.give_back([first, second])
    assert not first.kept
    again = PassState()
    again.bind("graph", buffers)
    assert again.buffers["idx"].data_ptr() == addresses[0]
    assert not again.kept
    again.keep({"idx": torch.ones(2)}, {})
    again.bind("another", buffers)
    assert not again.kept
    assert not again.buffers


def test_an_interrupt_between_two_copies_leaves_nothing_to_trust() -> None:
    state = PassState()
    state.keep({"a": torch.ones(2), "b": torch.ones(2)}, {"a": "b"})

    class Broken(dict[str, Tensor]):
        def items(self) -> Iterator[Any]:  # type: ignore[override]
            yield "a", torch.zeros(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state.keep(Broken(a=torch.zeros(2), b=torch.zeros(2)), {"a": "b"})
    assert not state.kept


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3), torch.zeros(0), torch.tensor(True), torch.arange(5),
        torch.randn(3, dtype=torch.complex64).conj(), torch.randn(4).to(torch.bfloat16),
        torch.ones(3).to(torch.float8_e4m3fn), torch._neg_view(torch.randn(3)),
        torch.randn(2, 3).expand(4, 2, 3), torch.full((3,), float("nan")),
    ],
)  # fmt: skip
def test_marks(tensor: Tensor) -> None:
    mark = Mark.of(tensor)
    assert mark.compare(Mark.of(tensor)) is Likeness.SAME
    assert mark.compare(Mark.of(tensor.clone())) is Likeness.EQUAL
    assert mark.compare(Mark.of(torch.cat([tensor.reshape(-1), tensor.reshape(-1)]))) is (
        Likeness.EQUAL if tensor.numel() == 0 and tensor.dim() == 1 else Likeness.DIFFERENT
    )


def test_a_mark_keeps_no_tensor_alive_and_sees_order() -> None:
    tensor = torch.arange(8.0)
    mark = Mark.of(tensor)
    assert mark.compare(Mark.of(tensor.flip(0))) is Likeness.DIFFERENT
    ids = torch.zeros(2, 12, 3)
    ids[0, :, 1], ids[1, :, 1] = torch.arange(12) % 3, torch.arange(12) % 4
    assert Mark.of(ids[0]).compare(Mark.of(ids[1])) is Likeness.DIFFERENT
    copy = tensor.clone()
    del tensor
    gc.collect()
    assert mark.tensor() is None
    assert mark.compare(Mark.of(copy)) is Likeness.EQUAL


# -- whole calls ----------------------------------------------------------------------------------


PLANS = {
    "always": [2] * 6,
    "late": [1, 1, 2, 2, 2, 2],
    "late, the other side first": [1, 1, -2, -2, -2],
    "interval": [1, 2, 2, 1, 1],
    "early": [2, 2, 1, 1],
}


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_guidance_that_comes_and_goes(plan: str) -> None:
    """Each side keeps its own tokens, and both are at one step: they merge alike."""
    for options in ({}, {"last_step": 2}, {"first_step": 2}):
        denoiser, calls, kinds = optimized(destinations_every=6, **options), [], []
        got = []
        for step, sides in enumerate(PLANS[plan]):
            names = ["uncond", "cond"] if sides < 0 else ["cond", "uncond"][:sides]
            row = []
            for name in names:
                before = denoiser.totals
                made = call(1, step, text_of(5 if name == "cond" else 6))
                got.append(denoiser(**made))
                calls.append((name, made))
                row += [k for k, n in denoiser.totals.items() if n != before.get(k, 0)]
            kinds.append({kind == "plain" for kind in row})
        assert all(len(kind) == 1 for kind in kinds), kinds
        if not options and plan != "late, the other side first":
            assert same(got, truth(denoiser, calls))
            assert denoiser.unsure == 0


@torch.no_grad()
@pytest.mark.parametrize("shape", ["number", "rows", "tokens"])
def test_timesteps_of_rows_and_tokens(shape: str) -> None:
    """Wan 2.2 gives clean tokens 0, at every step."""

    class PerToken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = texted()

        def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
            largest = timestep.reshape(len(sample) if timestep.dim() else 1, -1).amax(1)
            return self.inner(sample, largest.expand(len(sample)), encoder_hidden_states)

    denoiser = toma_fx.optimize(PerToken().eval(), **CONFIG, last_step=2)
    for step in range(5):
        made = call(1, step)
        number = made["timestep"][0]
        shapes = {
            "number": number,
            "rows": made["timestep"],
            "tokens": torch.stack([torch.zeros(2, 8), number.expand(2, 8)], -1).flatten(1),
        }
        denoiser(**{**made, "timestep": shapes[shape]})
    assert denoiser.totals == {"refresh": 1, "reuse": 2, "plain": 2}


def test_every_way_in_the_docs_has_its_test() -> None:
    root = Path(__file__).parents[2]
    names = re.findall(r"`(test_\w+)` \|$", (root / "docs" / "generations.md").read_text(), re.M)
    assert len(names) > 15
    code = "".join(file.read_text() for file in (root / "tests").rglob("test_*.py"))
    missing = [name for name in names if f"def {name}(" not in code]
    assert not missing
