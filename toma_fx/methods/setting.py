"""A method at one token grid: functions on tensors, and their static facts.

    x [B, N, C] --select, weights--> pattern            who merges into whom, named tensors
    x --merge--> y [B, M, C] --...--> --unmerge--> x' [B, N, C]

A setting is a frozen value. Its functions take and return tensors of static shapes and hold no
state: the rewrite traces them and inserts their nodes into the denoiser's graph, so that any method
compiles and exports as the rest of the graph does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from toma_fx.errors import ConfigError
from toma_fx.methods.windows import Size

Pattern = Mapping[str, Tensor]
"""Tensors of one pattern by the names of its parts; the first dimension of each is the batch."""


@dataclass(frozen=True)
class Place:
    """Where in a model tokens are to be merged.

    Attributes:
        grid: tokens (H, W), or (T, H, W) of a video. unit: what windows and cells must not cross:
            the grid, or one of several equal images that lie below each other in it.
        level: 0 where the model has the most tokens, 1 at the next smaller grid, and so on.
        downsample: how many times coarser than level 0 a side of the grid is, rounded up.
        depth: share of the model's transformer blocks that come before, in [0, 1).
        module: path of the branch. group: path of the block's first branch.
        heights: rows of each image, where a sequence holds several of one width.
    """

    grid: Size
    unit: Size
    level: int = 0
    downsample: int = 1
    depth: float = 0.0
    module: str = ""
    group: str = ""
    heights: tuple[int, ...] = ()


@dataclass(frozen=True)
class Setting(ABC):
    """A method with its options at one token grid: functions on tensors, and their static facts.

    Equal settings may share a pattern; everything that a pattern depends on is a field.

    Attributes:
        grid: tokens (H, W) or (T, H, W), N in all.

    Class attributes:
        chosen: names of what `select` returns. weighed: names of what `weights` returns.
        linear: whether `merge` is a linear map of the tokens.
        feature: what `select` and `weights` see: the segment's normalized "entry", the residual
            "stream" where the block begins, or the "output", what the stream was behind the
            segment in the step before; where there is none yet, the entry.
        recalled: names of `chosen` parts of the former pattern that `select_again` sees.
        dynamic: whether the number of merged tokens depends on the data. Such a setting runs
            eagerly; `merged_count` is what its functions return for fake tensors.
    """

    grid: Size
    chosen: ClassVar[tuple[str, ...]] = ()
    weighed: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = True
    feature: ClassVar[Literal["entry", "stream", "output"]] = "entry"
    recalled: ClassVar[tuple[str, ...]] = ()
    dynamic: ClassVar[bool] = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors of a pattern."""
        return self.chosen + self.weighed

    @property
    @abstractmethod
    def merged_count(self) -> int:
        """M, the number of tokens after merging."""

    def count_merged(self, pattern: Pattern) -> int:
        """M for a pattern; a dynamic setting reads it off the pattern's shapes."""
        return self.merged_count

    @abstractmethod
    def describe(self) -> str:
        """How it merges, in a few words for a table."""

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """The `chosen` parts of the pattern, for tokens [B, N, C]."""
        return ()

    def select_again(self, x: Tensor, before: Pattern) -> tuple[Tensor, ...]:
        """As `select`, for the "output" of the step before and the `recalled` parts."""
        return self.select(x)

    def weights(self, x: Tensor, chosen: Pattern) -> tuple[Tensor, ...]:
        """The `weighed` parts of the pattern, for tokens [B, N, C] and the `chosen` parts."""
        return ()

    @abstractmethod
    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """Tokens [B, N, C] -> [B, M, C]."""

    @abstractmethod
    def unmerge(self, y: Tensor, pattern: Pattern) -> Tensor:
        """Tokens [B, M, C] -> [B, N, C]."""

    @abstractmethod
    def positions(self, pattern: Pattern) -> Tensor:
        """The position in the grid that each merged token has: [B, M] or [1, M] int64 in [0, N).

        Positional operands (rotary tables, masks) are gathered at these.
        """

    def share(self, count: int) -> tuple[Setting, Size] | str:
        """How `count` processes share the tokens (docs/parallel.md); or why they can't.

        Only a method that works in each window by itself may say how: what it makes of a window
        must not depend on where that lies in the grid. A class does not inherit it: one made of
        another says so anew, `share = Other.share`, or is refused.

        Returns:
            The same method on the windows of one process, in the grid of `windows.share_grid`, and
            the shape of a window.
        """
        return "it matches tokens over the whole picture"

    def sizes(self, pattern: Pattern) -> Tensor:
        """How many tokens each merged token stands for: [B, M] or [1, M] float32, positive.

        Asked for with `proportional=True` alone.

        Raises:
            ConfigError: the method does not say.
        """
        raise ConfigError(
            "the method does not say how many tokens a merged token stands for",
            where=f"{type(self).__name__}.sizes",
            hint="leave out proportional=True, or write the function `sizes` of the setting",
        )
