"""Processes that share the tokens of every step: who they are, and that they agree.

A process that runs another program than the others raises no error by itself: what it sends is
taken for keys and values. So they compare a hash of what each is about to do, when a graph is
captured and before each step, and what differs is an error in all of them. Hashes go through gloo,
so that no GPU is waited for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, distributed

from toma_fx.compat.collectives import group_name
from toma_fx.compat.compilers import disable_dynamo
from toma_fx.errors import ParallelError, RankLostError, RankMismatchError
from toma_fx.methods.checks import is_count
from toma_fx.methods.sharded import Rank

HASH, TEXT = 32, 480
"""Bytes that processes exchange: a hash, and where these differ, what it is of."""
_BROKEN = ("gloo", "nccl", "connection closed", "pair closure", "timed out waiting")
"""Words in errors of a collective whose other side is gone, in lower case."""


@dataclass(frozen=True)
class Parallel:
    """Processes that share the tokens of a model: `parallel=` of `toma_fx.optimize`.

    Attributes:
        group: a DeviceMesh of one dimension, or a process group, in which this process is.
        check_steps: whether they compare before each step what they are about to run. Without it,
            processes that differ compute nonsense, or wait until the time-out of their group.
    """

    group: Any
    check_steps: bool = True


class Ranks:
    """This process among those that share the tokens.

    Attributes:
        group: their process group. rank: which one it is. check_steps: as in `Parallel`.
        lost: what was wrong when the others did not answer; "" while they do.
    """

    def __init__(self, parallel: Any) -> None:
        """`parallel`: a `Parallel`, or its `group`.

        Raises:
            ParallelError: there are no such processes, or this one is none of them.
        """
        options = parallel if isinstance(parallel, Parallel) else Parallel(parallel)
        group = _group_of(options.group)
        index, count = distributed.get_rank(group), distributed.get_world_size(group)
        if index < 0:
            raise _refusal("a group that this process is in", "one of other processes")
        self.rank = Rank(index, count, group_name(group))
        self.check_steps = options.check_steps
        self.lost = ""
        self.group = group
        self._talk: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranks) and self.rank == other.rank

    def __hash__(self) -> int:
        return hash(self.rank)

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        raise ParallelError(
            "a model that shares its work with other processes can't be pickled",
            where="parallel",
            expected="a model without a process group",
            got=f"process {self.rank.index} of {self.rank.count}",
            hint="pickle toma_fx.restore(model), and optimize it in each process; where only "
            "guidance is shared, disable_guidance_parallel() before",
        )

    # -- agreeing -------------------------------------------------------------------------------

    @disable_dynamo
    def agree(self, text: str) -> None:
        """Raise in all processes unless all are about to do the same.

        Args:
            text: what this one is about to do. Its beginning is shown where they differ.

        Raises:
            RankMismatchError: they differ. RankLostError: one does not answer.
        """
        own = hashlib.sha256(text.encode()).digest()
        hashes = self._exchange(own)
        if set(hashes) == {own}:
            return
        texts = [t.rstrip(b"\0").decode(errors="replace") for t in self._exchange(_padded(text))]
        raise RankMismatchError(
            "processes that share the tokens are not about to do the same",
            where=f"process {self.rank.index} of {self.rank.count}",
            expected="the same versions, configuration, calls and steps in all",
            got="; ".join(f"{i}: {text}" for i, text in enumerate(texts)),
            hint="call the model in all processes with the same inputs, as often and in the same "
            "order (docs/parallel.md)",
        )

    def agree_on(self, what: str, hashes: Mapping[str, str]) -> None:
        """As `agree`, on hashes by what they are of, and on the versions of packages."""
        versions = " ".join(f"{p} {metadata.version(p)}" for p in ("toma-fx", "torch"))
        shown = ", ".join(f"{name} {value[:10]}" for name, value in hashes.items())
        self.agree(f"{what}: {shown}, {versions}")

    def agree_step(self, text: str) -> None:
        """As `agree`, before a step, unless that was turned off."""
        if self.check_steps:
            self.agree(text)
        elif self.lost:
            raise self._loss(self.lost)

    def _exchange(self, own: bytes) -> list[bytes]:
        """The bytes of every process, as many of each."""
        if self.lost:
            raise self._loss(self.lost)
        mine = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.rank.count)]
        try:
            distributed.all_gather(every, mine, group=self._channel())
        except RuntimeError as error:
            raise self._loss(str(error)) from error
        return [bytes(each.tolist()) for each in every]

    def _channel(self) -> Any:
        """The group that tensors of the CPU go through: the processes' own, or one of gloo."""
        if self._talk is None:
            known = str(distributed.get_backend_config(self.group))
            ranks = distributed.get_process_group_ranks(self.group)
            self._talk = self.group if "cpu:" in known else distributed.new_group(
                ranks, backend="gloo", use_local_synchronization=True
            )  # fmt: skip
        return self._talk

    # -- losing each other ----------------------------------------------------------------------

    def loss_of(self, error: RuntimeError) -> RankLostError | None:
        """The error to raise for one of torch, if that is about another process."""
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, distributed.DistError) or any(w in text.lower() for w in _BROKEN):
            return self._loss(text)
        return None

    def _loss(self, text: str) -> RankLostError:
        self.lost = text
        return RankLostError(
            "a process that shares the tokens does not answer",
            where=f"process {self.rank.index} of {self.rank.count}",
            expected=f"{self.rank.count} processes",
            got=text,
            hint="its own log says why; start all of them again (a group that lost one can't go "
            "on); a longer timeout= of init_process_group, if it was only late",
        )


def rank_of(parallel: Any) -> Rank | None:
    """One process of those that share the tokens, to look at what it would run.

    Args:
        parallel: what `Ranks` takes, or a number of processes, which need not be there.

    Raises:
        ParallelError: there are no such processes.
    """
    if not is_count(parallel):
        return Ranks(parallel).rank
    return Rank(0, parallel, "") if parallel > 1 else None


def watched(
    kernel: Callable[[], AbstractContextManager[Any]], ranks: Ranks | None
) -> Callable[[], AbstractContextManager[Any]]:
    """The context that a program runs in, whose errors tell when another process is gone."""
    if ranks is None:
        return kernel

    @contextmanager
    def watching() -> Iterator[None]:
        try:
            with kernel():
                yield
        except RuntimeError as error:
            lost = ranks.loss_of(error)
            if lost is None:
                raise
            raise lost from error

    return watching


def hash_of(value: Any) -> str:
    """A hash of JSON-able values, the same in every process."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


def hash_of_inputs(leaves: Iterable[Any]) -> str:
    """A hash of the inputs of a call and their values; on a GPU it waits for them.

    Noise of another seed in each process is an easy mistake.
    """
    hashed = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            data = leaf.detach().to("cpu").contiguous()
            hashed.update(str((data.shape, data.dtype)).encode())
            hashed.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            hashed.update(repr(leaf).encode())
    return hashed.hexdigest()


def _padded(text: str) -> bytes:
    return text.encode()[:TEXT].ljust(TEXT, b"\0")


def _group_of(parallel: Any) -> Any:
    """The process group that is meant."""
    if not distributed.is_available() or not distributed.is_initialized():
        raise _refusal("an initialized process group", "none in this process")
    if isinstance(parallel, distributed.ProcessGroup):
        return parallel
    if not isinstance(parallel, distributed.device_mesh.DeviceMesh):
        raise _refusal("a DeviceMesh or a process group", type(parallel).__name__)
    if parallel.ndim != 1:
        names = ", ".join(parallel.mesh_dim_names or ()) or "without names"
        raise _refusal("a mesh of one dimension", f"{parallel.ndim} dimensions ({names})")
    if parallel.get_coordinate() is None:
        raise _refusal("a mesh that this process is in", "one of other processes")
    return parallel.get_group()


def _refusal(expected: str, got: str) -> ParallelError:
    return ParallelError(
        "there are no processes to share the tokens with",
        where="parallel",
        expected=expected,
        got=got,
        hint="torchrun starts them, torch.distributed.init_process_group() lets them find each "
        "other, and init_device_mesh(device, (n,)) is a mesh (docs/parallel.md)",
    )
