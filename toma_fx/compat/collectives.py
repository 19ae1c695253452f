"""Private names of torch: collectives that are nodes of a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toma_fx.compat.lookup import attribute, lookup

if TYPE_CHECKING:
    from torch import Tensor

GATHER = "_c10d_functional.all_gather_into_tensor.default"
WAIT = "_c10d_functional.wait_tensor.default"
"""The operator that waits for a collective; torch takes it for one with a side effect."""


def gather(x: Tensor, count: int, group: str) -> Tensor:
    """`x` of all processes of a group, end to end along the first dimension.

    Args:
        count: of processes. group: its name, as `group_name` gives it.
    """
    operators = _operators()
    pending = operators.all_gather_into_tensor(x, count, group)
    result: Tensor = operators.wait_tensor(pending)
    return result


def broadcast(x: Tensor, source: int, group: Any) -> Tensor:
    """`x` of one process of a group, in all of them; whoever uses it first waits for it.

    Args:
        source: the process that sends, by its number among all processes.
    """
    send = lookup("torch.distributed._functional_collectives", "broadcast")
    result: Tensor = send(x, source, group)
    return result


def finish(x: Tensor) -> None:
    """Wait for what `broadcast` gave."""
    if isinstance(x, lookup("torch.distributed._functional_collectives", "AsyncCollectiveTensor")):
        attribute("torch", x, "trigger_wait")()


def is_wait(target: Any) -> bool:
    """Whether a node's target waits for a collective, and does nothing else."""
    return str(target) == WAIT


def is_gather(target: Any) -> bool:
    """Whether a node's target sends a value to all processes of a group, and gets theirs."""
    return str(target) == GATHER


def group_name(group: Any) -> str:
    """The name of a process group, by which collectives in a graph find it."""
    return str(attribute("torch", group, "group_name"))


def _operators() -> Any:
    # their shapes are known to torch's tracer only when this module is imported
    lookup("torch.distributed._functional_collectives", "all_gather_tensor")
    return lookup("torch", "ops._c10d_functional")
