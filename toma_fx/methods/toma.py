"""ToMA: token merge with attention (Lu et al., ICML 2025, arXiv 2509.10918).

    x [B, N, C] --select--> idx [B, T, k]      greedy facility location inside each window
    x, idx      --weights--> merge, unmerge    softmax over destinations, as matrices
    x           --merge--> y [B, T*k, C]       y = A_norm x
    y           --unmerge--> x' [B, N, C]      x' = A^T y, or the pseudo-inverse of A_norm

T windows of n tokens tile the grid, (H, W) or (frames, H, W); k are kept in each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

import toma_fx.methods.ops  # noqa: F401 - registers the operator
from toma_fx.errors import TileError
from toma_fx.methods.base import BRANCHES, MethodConfig, Scope, Share
from toma_fx.methods.checks import is_count, is_number, is_size
from toma_fx.methods.facility import facility_location
from toma_fx.methods.setting import Pattern, Place, Setting
from toma_fx.methods.windows import (
    Size,
    dividing_tile,
    merge_windows,
    nearest_divisor,
    share_grid,
    size_text,
    to_windows,
    token_index,
    unmerge_windows,
    window_count,
)

UNROLL = 4
"""Destinations a window up to which the greedy loop is unrolled into the graph."""
WINDOW_TOKENS = 16
"""Tokens a window when the configuration does not say."""
MOST_SCALE = 1e7
"""Cosines of equal tokens differ by rounding, some 1e-6: sharpened more than this, a destination
might get no weight at all, not even its own, and its mean would be 0 / 0."""
Window = Literal["tile", "stripe", "global"]
Inverse = Literal["transpose", "pinv"]


@dataclass(frozen=True)
class ToMA(Setting):
    """ToMA at one grid.

    Attributes:
        tile: window of as many sides as the grid, which they divide. keep: destinations of a
            window, at least 1 and at most its tokens.
        scale, inverse: as in `ToMAConfig`.

    Raises:
        TileError: the tile does not divide the grid, or `keep` does not fit the tile.
    """

    tile: Size
    keep: int
    scale: float
    inverse: Inverse = "transpose"

    chosen: ClassVar[tuple[str, ...]] = ("idx",)
    weighed: ClassVar[tuple[str, ...]] = ("merge", "unmerge")

    def __post_init__(self) -> None:
        sides = list(zip(self.tile, self.grid, strict=False))
        if len(self.tile) != len(self.grid) or any(t > g or t < 1 for t, g in sides):
            raise _too_large(self.tile, self.grid)
        if any(g % t for t, g in sides):
            raise TileError(
                "the tile does not divide the token grid",
                where="tile",
                expected=f"a divisor of {size_text(self.grid)}",
                got=size_text(self.tile),
            )
        if not 1 <= self.keep <= math.prod(self.tile):
            raise TileError(
                "the number of destinations does not fit the window",
                where="keep",
                expected=f"1 to {math.prod(self.tile)}",
                got=str(self.keep),
            )

    @property
    def windows(self) -> int:
        """Number of windows."""
        return window_count(self.grid, self.tile)[0]

    @property
    def merged_count(self) -> int:
        """Tokens after merging."""
        return self.windows * self.keep

    def describe(self) -> str:
        """The window."""
        return size_text(self.tile)

    def share(self, count: int) -> tuple[Setting, Size] | str:
        """Some windows for each process."""
        grid = share_grid(self.grid, self.tile, count)
        return grid if isinstance(grid, str) else (replace(self, grid=grid), self.tile)

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """Greedy facility location inside each window (the published code's
        `batched_facility_location`).

        The first destination has the largest row sum of the cosine similarity S; each next one is
        the token j with the largest gain sum_i max(0, S[j, i] - m[i]), m being the running maximum
        of the chosen rows. Similarity is float32 whatever the dtype of `x`, in steps of
        2^-`facility.BITS`; of equal gains the lowest index wins; a token is never chosen twice.
        Cost: keep * n^2 comparisons a window.

        Returns:
            `idx`: window-local indices [B, T, keep], int64, in the order of choice.
        """
        similarity = cosine_similarity(to_windows(x, self.grid, self.tile))
        if self.keep > UNROLL:
            return (torch.ops.toma_fx.facility_location(similarity, self.keep),)
        return (facility_location(similarity, self.keep),)

    def weights(self, x: Tensor, chosen: Pattern) -> tuple[Tensor, ...]:
        """Merge and unmerge matrices (the published code's `tile_attention_merge`).

        A[d, i] = softmax over d of scale * cos(x[d], x[i]); merge is A with rows normalized to sum
        1, unmerge is A transposed. With `inverse="pinv"` unmerge is the pseudo-inverse of the merge
        matrix, the least-squares inverse that the transpose approximates; see `pseudo_inverse`.

        Returns:
            `merge` [B, T, keep, n] and `unmerge` [B, T, n, keep] in the dtype of `x`, computed in
            float32.
        """
        unit = F.normalize(to_windows(x, self.grid, self.tile).float(), dim=-1)
        destinations = torch.take_along_dim(unit, chosen["idx"].unsqueeze(-1), dim=-2)
        share = torch.softmax(self.scale * (destinations @ unit.transpose(-1, -2)), dim=-2)
        merge = share / share.sum(-1, keepdim=True)
        transposed = share.transpose(-1, -2)
        unmerge = pseudo_inverse(merge, x.dtype) if self.inverse == "pinv" else transposed
        return merge.to(x.dtype), unmerge.to(x.dtype).contiguous()

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """y = A_norm x in every window."""
        return merge_windows(x, pattern["merge"], self.grid, self.tile)

    def unmerge(self, y: Tensor, pattern: Pattern) -> Tensor:
        """x' = A^T y, or pinv(A_norm) y, in every window."""
        return unmerge_windows(y, pattern["unmerge"], self.grid, self.tile)

    def positions(self, pattern: Pattern) -> Tensor:
        """The destinations."""
        return token_index(pattern["idx"], self.grid, self.tile)

    def sizes(self, pattern: Pattern) -> Tensor:
        """Sums of the shares that tokens have in each destination: [B, T*k] float32.

        A token's shares sum to 1, so that the sizes of a window sum to its tokens.
        """
        return pattern["unmerge"].sum(-2, dtype=torch.float32).flatten(1)


def ridge_of(dtype: torch.dtype) -> float:
    """Share of the mean square of singular values that is taken for nothing: 1e-4, or in bfloat16
    what rounding makes of them."""
    return max(1e-4, (10 * torch.finfo(dtype).eps) ** 2)


def pseudo_inverse(merge: Tensor, dtype: torch.dtype) -> Tensor:
    """The pseudo-inverse of merge matrices, also of tokens that are nearly equal.

    The rows of equal tokens are equal, and those of nearly equal ones nearly: M M^T has no inverse,
    or a huge one. Iterated Tikhonov regularization with r = `ridge_of(dtype)` * mean(s^2), s being
    the singular values of M, replaces 1 / s by (1 - (r / (s^2 + r))^2) / s: the same where s is not
    small, but nowhere more than 0.8 / sqrt(r), by which the rounding of merged tokens grows.

    Args:
        merge: [..., k, n] float32. dtype: of the tokens.

    Returns:
        [..., n, k] float32.
    """
    gram = merge @ merge.transpose(-1, -2)
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    mean = (gram * one).sum((-2, -1), keepdim=True) / gram.shape[-1]
    ridge = ridge_of(dtype) * mean
    # solve_ex never raises, so that NaN tokens come out as NaN, as in the original
    first = torch.linalg.solve_ex(gram + ridge * one, merge)[0]
    second: Tensor = torch.linalg.solve_ex(gram + ridge * one, merge + ridge * first)[0]
    return second.transpose(-1, -2)


def cosine_similarity(x: Tensor) -> Tensor:
    """Pairwise cosine similarity in float32: [..., n, C] -> [..., n, n]."""
    unit = F.normalize(x.float(), dim=-1)
    return unit @ unit.transpose(-1, -2)


@dataclass(frozen=True, kw_only=True)
class ToMAConfig(MethodConfig):
    """ToMA: token merge with attention (Lu et al., ICML 2025, arXiv 2509.10918).

    Selects in every window the tokens that greedy facility location on cosine similarity chooses.
    Merges every token into all destinations of its window, by attention weights. Unmerges with the
    transpose of the weights. Cost: selection takes keep * n^2 comparisons a window of n tokens,
    merge and unmerge are one small matrix product each. The variants of the paper: `window` "tile",
    "stripe" or "global"; `scope="block"` merges once per block; `share` lets the layers of a block,
    or of a whole stage, have one pattern. The default is chosen by measurement (docs/default.md).

    Attributes:
        ratio: share of the tokens that is merged away, in [0, 1); 0 turns merging off.
        window: where similarity is searched: square "tile", "stripe" of whole rows, or "global".
        tile: window size in tokens: side, (height, width) or, in a video, (frames, height, width)
            of a tile, rows of a stripe. None chooses about 16 tokens a window, and windows of a
            video lie in one frame. A size that does not divide the grid is replaced by
            the nearest that does; the report shows which.
        tiles: number of windows instead of their size.
        scale: sharpness of the merge weights (softmax of scale * cosine similarity).
        inverse: what unmerges: the "transpose" of the weights, or "pinv", the pseudo-inverse of the
            merge matrix.
        weights_every: steps between recomputations of the weights for the current destinations.

    The other fields are those of `MethodConfig`.
    """

    ratio: float = 0.5
    window: Window = "tile"
    tile: int | tuple[int, ...] | None = None
    tiles: int | None = None
    scale: float = 1000.0
    inverse: Inverse = "transpose"
    destinations_every: int = 5
    weights_every: int = 5
    scope: Scope = "stack"
    share: Share = "stream"
    branches: tuple[str, ...] = BRANCHES
    min_tokens: int = 256

    name: ClassVar[str] = "toma"
    overridable: ClassVar[tuple[str, ...]] = (
        "ratio", "window", "tile", "tiles", "scale", "inverse", "min_tokens"
    )  # fmt: skip
    scheduling: ClassVar[frozenset[str]] = MethodConfig.scheduling | {"weights_every"}

    def check(self) -> None:
        """Check every field."""
        super().check()
        self.check_ratio()
        self.check_choice("window", get_args(Window))
        self.check_choice("inverse", get_args(Inverse))
        positive = is_number(self.scale) and 0 < self.scale <= MOST_SCALE
        self.require(positive, "scale", f"a positive number, at most {MOST_SCALE:g}")
        self.check_count("weights_every")
        sized = not self.proportional or self.inverse == "transpose"
        self.require(sized, "proportional", "False with inverse='pinv', which has no group sizes")
        if self.tiles is not None:
            self.check_count("tiles")
        self.require(
            self.tile is None or is_count(self.tile) or is_size(self.tile),
            "tile",
            "a side, (height, width) or (frames, height, width), whole numbers of at least 1",
            TileError,
        )

    @property
    def is_off(self) -> bool:
        """Whether the ratio is 0."""
        return self.ratio == 0

    def renewal(self, since: int) -> str:
        """Weights may be recomputed between two selections."""
        due = super().renewal(since)
        return "reweigh" if due == "reuse" and since % self.weights_every == 0 else due

    def setting(self, place: Place) -> ToMA | str:
        """Windows that divide the grid, and how many of their tokens stay."""
        if self.is_off:
            return "ratio is 0"
        tile = resolve_tile(self, place.unit, place.module)
        tokens = math.prod(tile)
        keep = tokens - int(tokens * self.ratio + 1e-9)
        if keep == tokens:
            return f"ratio {self.ratio} merges no token of a {size_text(tile)} window"
        return self.make_setting(
            grid=place.grid,
            tile=tile,
            keep=keep,
            scale=float(self.scale),
            inverse=self.inverse,
        )

    def make_setting(self, **fields: Any) -> ToMA:
        """The setting of these fields; methods that only select otherwise replace this."""
        return ToMA(**fields)


def resolve_tile(config: ToMAConfig, grid: Size, where: str) -> Size:
    """The window for a grid: as asked, or the nearest size that divides the grid.

    A window of a video is (t, h, w); it lies in one frame unless the configuration says otherwise.

    Raises:
        TileError: an explicit size larger than the grid, or three sides for a picture.
    """
    *frames, height, width = grid
    if config.window == "global":
        return grid
    area = _window_area(config, grid, where)
    asked = config.tile
    if config.window == "stripe":
        rows = asked[-2] if isinstance(asked, tuple) else asked
        if rows is not None and rows > height:
            raise _too_large((rows, width), grid, where)
        wanted = rows if rows is not None else max(1, area / width)
        return (*(1 for _ in frames), nearest_divisor(height, wanted), width)
    if asked is None or config.tiles is not None:
        return dividing_tile(grid, area)
    sides = asked if isinstance(asked, tuple) else (asked, asked)
    sides = (*(1 for _ in range(len(grid) - len(sides))), *sides)
    if len(sides) > len(grid) or any(t > g for t, g in zip(sides, grid, strict=True)):
        raise _too_large(sides, grid, where)
    if not any(g % t for t, g in zip(sides, grid, strict=True)):
        return sides
    *depth, h, w = sides
    time = (nearest_divisor(g, t) for t, g in zip(depth, frames, strict=True))
    return (*time, *dividing_tile((height, width), h * w))


def _window_area(config: ToMAConfig, grid: Size, where: str) -> float:
    """Tokens a window, if the sides are not given."""
    tokens = math.prod(grid)
    if config.tiles is None:
        return WINDOW_TOKENS
    if config.tiles > tokens:
        raise TileError(
            "more windows than tokens",
            where=where,
            expected=f"tiles of at most {tokens} for a {size_text(grid)} grid",
            got=str(config.tiles),
            hint="lower tiles=, or raise min_tokens=",
        )
    return tokens / config.tiles


def _too_large(tile: Size, grid: Size, where: str = "tile") -> TileError:
    return TileError(
        "the tile is larger than the token grid",
        where=where,
        expected=f"at most {size_text(grid)} tokens",
        got=size_text(tile),
        hint="lower tile=, override it for this path, "
        "or raise min_tokens= to leave this level alone",
    )
