"""Operators that toma_fx registers with torch; importing this file is all the set-up there is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Literal
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from toma_fx.errors import StatefulModelError
from toma_fx.methods.facility import facility_location

MOST_TOKENS = 512
"""Tokens a window up to which the Triton kernel is used."""
_log = logging.getLogger("toma_fx.methods")


@torch.library.custom_op("toma_fx::facility_location", mutates_args=())
def facility_location_op(similarity: Tensor, keep: int) -> Tensor:
    """`facility_location` as one opaque node: [B, T, n, n] -> [B, T, keep] int64.

    Compilers see a call instead of `keep` unrolled steps: with 32 steps Inductor took 21 s to
    compile a selection that runs once in ten steps. Exports hold the steps (`export.selection`).
    On NVIDIA GPUs a Triton kernel computes the same; see `choose_implementation`.
    """
    choice = choose_implementation(
        similarity.device, similarity.dtype, similarity.shape[-1], keep, kernel_problem
    )
    _report(choice)
    if choice.name == "reference":
        return facility_location(similarity, keep)
    from toma_fx.methods import facility_triton

    return facility_triton.facility_location(similarity, keep)


@facility_location_op.register_fake
def _(similarity: Tensor, keep: int) -> Tensor:
    return similarity.new_empty((*similarity.shape[:-2], keep), dtype=torch.int64)


class Layers:
    """Layers that an operator runs, by number; none is kept alive."""

    def __init__(self) -> None:
        self._numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._layers: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
        self._next = count()

    def number_of(self, layer: nn.Module) -> int:
        """The number of a layer, the same whenever it is asked for."""
        number = self._numbers.setdefault(layer, next(self._next))
        self._layers[number] = layer
        return number

    def __getitem__(self, number: int) -> nn.Module:
        layer = self._layers.get(number)
        if layer is None:
            raise StatefulModelError(
                "a quantized layer of the captured model is gone",
                where=f"toma_fx.layer {number}",
                expected="the model that was captured, in the process that captured it",
                hint="keep the model, and optimize it again",
            )
        return layer


LAYERS = Layers()
"""Graphs hold numbers and tensors alone, so what a number means is kept beside them."""


@torch.library.custom_op("toma_fx::layer", mutates_args=())
def layer_op(x: Tensor, number: int, features: int, dtype: torch.dtype) -> Tensor:
    """A layer of `LAYERS` as one opaque, token-wise node: [..., C] -> [..., features]."""
    outputs: Tensor = LAYERS[number](x)
    return outputs.contiguous()


@layer_op.register_fake
def _(x: Tensor, number: int, features: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], features), dtype=dtype)


@dataclass(frozen=True)
class Choice:
    """What computes a selection: PyTorch ("reference") or the kernel ("triton"), and why."""

    name: Literal["reference", "triton"]
    reason: str


def choose_implementation(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    keep: int,
    problem: Callable[[torch.device], str],
) -> Choice:
    """What computes facility location of such similarities.

    Args:
        tokens: of a window. problem: as `kernel_problem`; asked only if all else fits the kernel.
    """
    if device.type != "cuda":
        reason = f"similarities are on the device {device.type}"
    elif dtype != torch.float32:
        reason = f"similarities are {dtype}"
    elif not 1 <= keep <= tokens <= MOST_TOKENS:
        reason = f"{keep} of {tokens} tokens a window; the kernel takes up to {MOST_TOKENS}"
    else:
        reason = problem(device)
    return Choice("reference", reason) if reason else Choice("triton", f"{device} runs it")


@cache
def kernel_problem(device: torch.device) -> str:
    """Why the Triton kernel can't run on a GPU; "" if it can.

    Runs it on one window to find out: Triton compiles at the first call, for which it needs a C
    compiler and a GPU that it knows.
    """
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    try:
        from toma_fx.methods import facility_triton
    except ImportError as error:
        return f"Triton can't be imported ({error})"
    try:
        facility_triton.facility_location(torch.eye(16, device=device), 1)
    except Exception as error:  # of Triton, the C compiler or the driver; what it says is logged
        _log.warning("the Triton kernel for selection does not run on %s", device, exc_info=error)
        return f"the Triton kernel fails on {device} ({type(error).__name__})"
    return ""


@cache
def _report(choice: Choice) -> None:
    """Log a choice once."""
    _log.info("facility location is computed by: %s, because %s", choice.name, choice.reason)
