"""Models that keep state in Python are refused before anything is traced; what changed is named."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests.methods.test_methods import inputs, model
from toma_fx.capture.model import capture
from toma_fx.capture.parity import Expected
from toma_fx.compat.pytorch import is_fake
from toma_fx.errors import StatefulModelError

CALLS = 0


class Processor:
    """Acts for a module, as attention processors do."""

    total = 0

    def __init__(self) -> None:
        self.map: Any = None
        self.seen: dict[str, Any] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return x


class Model(nn.Module):
    """Two layers and a processor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.processor = Processor()
        self.array = np.zeros(2)
        self.tables: dict[Any, Tensor] = {}
        self.register_buffer("last", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.processor(self.first(x)))


def stores_a_feature(m: Model) -> None:
    m.first.register_forward_hook(lambda module, _, out: setattr(module, "feature", out))


def appends_in_a_closure(m: Model) -> None:
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, out: Tensor) -> None:
        kept.append(out)

    m.first.register_forward_hook(keep)


def counts_in_a_closure(m: Model) -> None:
    inner, seen = m.first.forward, {"n": 0}

    def forward(x: Tensor) -> Tensor:
        seen["n"] += 1
        return inner(x)

    m.first.forward = forward  # type: ignore[method-assign]


def counts_in_a_global(m: Model) -> None:
    def count(_: Any, __: Any) -> None:
        global CALLS
        CALLS += 1

    m.second.register_forward_pre_hook(count)


def counts_in_a_default(m: Model) -> None:
    def count(_: Any, __: Any, seen: list[int] = [0]) -> None:  # noqa: B006
        seen[0] += 1

    m.second.register_forward_pre_hook(count)


def counts_in_a_function(m: Model) -> None:
    def count(_: Any, __: Any) -> None:
        count.n += 1  # type: ignore[attr-defined]

    count.n = 0  # type: ignore[attr-defined]
    m.second.register_forward_pre_hook(count)


def processor_of(m: Model, act: Callable[[Processor, Tensor], None]) -> None:
    class Own(Processor):
        def __call__(self, x: Tensor) -> Tensor:
            act(self, x)
            return x

    m.processor = Own()


def stores_a_map(m: Model) -> None:
    processor_of(m, lambda own, x: setattr(own, "map", x))


def stores_in_a_dictionary(m: Model) -> None:
    processor_of(m, lambda own, x: own.seen.update(last=x))


def counts_in_a_class(m: Model) -> None:
    processor_of(m, lambda own, _: setattr(type(own), "total", type(own).total + 1))


def counts_in_what_a_class_closes_over(m: Model) -> None:
    seen = {"n": 0}
    processor_of(m, lambda *_: seen.update(n=seen["n"] + 1))


def writes_an_array(m: Model) -> None:
    def write(*_: Any) -> None:
        m.array[0] += 1

    m.register_forward_hook(write)


def writes_a_buffer(m: Model) -> None:
    def write(_: Any, args: Any) -> None:
        m.get_buffer("last").copy_(args[0])

    m.register_forward_pre_hook(write)


@pytest.mark.parametrize(
    ("keep", "name"),
    [
        (stores_a_feature, "first.feature"),
        (appends_in_a_closure, "closure variable 'kept' of hook keep of first"),
        (counts_in_a_closure, "closure variable 'seen' of first.forward"),
        (counts_in_a_global, "global 'CALLS' of hook count of second"),
        (counts_in_a_default, "defaults of hook count of second"),
        (counts_in_a_function, "hook count of second.n"),
        (stores_a_map, "processor.map"),
        (stores_in_a_dictionary, "processor.seen"),
        (counts_in_a_class, ".total"),
        (counts_in_what_a_class_closes_over, "closure variable 'seen'"),
        (writes_an_array, "array"),
        (writes_a_buffer, "last"),
    ],
)
def test_what_changed_is_named(keep: Callable[[Model], None], name: str) -> None:
    m = Model().eval()
    Expected.compute(m, (torch.randn(2, 3),), {})
    keep(m)
    with pytest.raises(StatefulModelError) as caught:
        Expected.compute(m, (torch.randn(2, 3),), {})
    assert name in caught.value.got


class Lazy(Model):
    """Makes tables when it first needs them."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(3)
        if x.shape not in self.tables:
            self.tables[x.shape] = torch.ones(x.shape)
        return super().forward(x) * self.table + self.tables[x.shape]


class Replacing(Model):
    """Puts an equal buffer in the place of one."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.get_buffer("last").clone()
        return super().forward(x)


class Noisy(Model):
    """Draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x)


class Opaque(Model):
    """Counts where nobody can look."""

    def __init__(self) -> None:
        super().__init__()
        self.count = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * next(self.count)


@pytest.mark.parametrize("cls", [Model, Lazy, Noisy])
def test_tables_and_random_numbers_are_no_state(cls: type[Model]) -> None:
    m, call = cls().eval(), (torch.randn(2, 3),)
    before = torch.get_rng_state()
    expected = Expected.compute(m, call, {})
    assert expected is not None
    expected.check(capture(m, call, {}))
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers go on"


def test_a_buffer_that_is_replaced_by_an_equal_one_is_no_state() -> None:
    assert Expected.compute(Replacing().eval(), (torch.randn(2, 3),), {}) is not None


def test_hidden_state_is_no_random_number() -> None:
    m, call = Opaque().eval(), (torch.randn(2, 3),)
    expected = Expected.compute(m, call, {})
    assert expected is not None
    with pytest.raises(StatefulModelError, match="equal inputs and random seed"):
        expected.check(capture(m, call, {}))


@pytest.mark.parametrize("ratio", [0, 0.5])
@torch.no_grad()
def test_a_hook_that_comes_later_is_refused_once_and_finds_no_fake_tensors(ratio: float) -> None:
    own = copy.deepcopy(model())
    optimized = toma_fx.optimize(own, ratio=ratio, min_tokens=60, tile=4)
    optimized(**inputs())
    name, part = next((n, m) for n, m in own.named_modules() if isinstance(m, nn.Linear))
    hook = part.register_forward_hook(lambda m, _, out: setattr(m, "feature", out))
    for _ in range(2):
        with pytest.raises(StatefulModelError) as caught:
            optimized(**inputs())
        assert caught.value.where == f"{name}.feature"
        assert "remove the hook" in caught.value.hint
        assert not is_fake(part.feature)
        assert type(part.feature) is Tensor
    assert optimized.cache.captures == 1
    hook.remove()
    optimized(**inputs())
