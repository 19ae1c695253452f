"""Forms that torch.export does not follow are captured as equal ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toma_fx
from toma_fx.capture.model import capture

X = torch.arange(24.0).view(2, 3, 4)


class Model(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.function(x, lengths)


def table_by_data(x: Tensor, lengths: Tensor) -> Tensor:
    """A table that is written through `.data`, also into its memory seen from elsewhere."""
    table = x.new_zeros(3, 4)
    view = table[1:]
    table.data[1:].copy_(x[0, 1:])
    return x + table + view.sum()


def rows_by_length(x: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for i in range(2):
        mask[i, : lengths[i]] = True
    return torch.where(mask[..., None], x, -x)


def inner_dimension(x: Tensor, lengths: Tensor) -> Tensor:
    y = x * 2
    y[:, : lengths[0]] = 7
    y[:, 0:2, : lengths[1] : 1] = 0.5
    return y


FORMS = {f.__name__: f for f in (table_by_data, rows_by_length, inner_dimension)}


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_captured_as_in_eager_mode(name: str) -> None:
    model = Model(FORMS[name]).eval()
    captured = capture(model, (X, torch.tensor([1, 2])), {})
    for lengths in ([1, 2], [0, 3], [3, 9], [-1, -9]):
        inputs = (X + 1, torch.tensor(lengths))
        assert torch.equal(captured.graph_module(*inputs)[0], model(*inputs))


OTHERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a tensor": lambda y, n: y.__setitem__((0, slice(None, n)), y[1, :n]),
    "a step": lambda y, n: y.__setitem__((0, slice(None, n, 2)), 1.0),
    "from a place": lambda y, n: y.__setitem__((0, slice(1, n)), 1.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_writes_are_refused_as_before(name: str) -> None:
    def write(x: Tensor, lengths: Tensor) -> Tensor:
        y = x + 1
        OTHERS[name](y, lengths[0])
        return y

    with pytest.raises(toma_fx.CaptureError):
        capture(Model(write).eval(), (X, torch.tensor([1, 2])), {})
