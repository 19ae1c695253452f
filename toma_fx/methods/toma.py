"""ToMA: token merge with attention (Lu et al., ICML 2025, arXiv 2509.10918) as pure functions.

    x [B, N, C] --select--> idx [B, T, k]      greedy facility location inside each window
    x, idx      --weights--> pattern           softmax over destinations, merge and unmerge matrices
    x           --merge--> y [B, T*k, C]       y = A_norm x
    y           --unmerge--> x' [B, N, C]      x' = A^T y, or the pseudo-inverse of A_norm

T windows of n tokens tile the grid, (H, W) or (frames, H, W); k are kept in each. All shapes are
static, nothing depends on a global, and everything traces: the rewrite splices these functions
into the denoiser's graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import toma_fx.ops  # noqa: F401 - registers the operator
from toma_fx.errors import TileError
from toma_fx.methods.facility import facility_location
from toma_fx.methods.windows import (
    Size,
    merge_windows,
    size_text,
    to_windows,
    unmerge_windows,
    window_count,
)


@dataclass(frozen=True)
class Pattern:
    """Who merges into whom, for one batch of token sequences.

    Attributes:
        idx: destinations in greedy order, local to their window, [B, T, k] int64.
        merge: row-normalised merge matrices, [B, T, k, n], dtype of the tokens.
        unmerge: unmerge matrices, [B, T, n, k], dtype of the tokens.
        grid: token grid (H, W), or (frames, H, W), of N tokens.
        tile: window of as many sides, of n tokens.
    """

    idx: Tensor
    merge: Tensor
    unmerge: Tensor
    grid: Size
    tile: Size


def check_tile(grid: Size, tile: Size, *, where: str = "") -> None:
    """Raise `TileError` unless `tile` fits and divides `grid`."""
    sides = list(zip(tile, grid, strict=False))
    if len(tile) != len(grid) or any(t > g or t < 1 for t, g in sides):
        raise TileError(
            "the tile is larger than the token grid",
            where=where,
            expected=f"a tile of at most {size_text(grid)} tokens",
            got=size_text(tile),
            hint="lower tile=, or raise min_tokens= so that this site is left alone",
        )
    if any(g % t for t, g in sides):
        raise TileError(
            "the tile does not divide the token grid",
            where=where,
            expected=f"a divisor of {size_text(grid)}",
            got=size_text(tile),
        )


def cosine_similarity(x: Tensor) -> Tensor:
    """Pairwise cosine similarity in float32: [..., n, C] -> [..., n, n]."""
    unit = F.normalize(x.float(), dim=-1)
    return unit @ unit.transpose(-1, -2)


def select(x: Tensor, grid: Size, tile: Size, keep: int, *, opaque: bool = False) -> Tensor:
    """Greedy facility location inside each window (arXiv 2509.10918; the published code's
    `batched_facility_location`).

    The first destination has the largest row sum of the cosine similarity S; each next one is the
    token j with the largest gain sum_i max(0, S[j, i] - m[i]), m being the running maximum of the
    chosen rows. Similarity is float32 whatever the dtype of `x`; of gains equal to within
    `facility.TIE` the lowest index wins; a token is never chosen twice. Cost: keep * n^2
    comparisons a window.

    Args:
        x: tokens [B, N, C], any float dtype.
        grid: (H, W), or (frames, H, W).
        tile: window of as many sides, dividing the grid.
        keep: destinations a window, at least 1 and at most its tokens.
        opaque: for tracing: emit one `toma_fx::facility_location` node instead of `keep` unrolled
            steps. Same result.

    Returns:
        Window-local indices [B, T, keep], int64, in the order of choice.

    Raises:
        TileError: the tile does not fit the grid, or `keep` does not fit the tile.
    """
    check_tile(grid, tile, where="select")
    tokens = window_count(grid, tile)[1]
    if not 1 <= keep <= tokens:
        raise TileError(
            "the number of destinations does not fit the window",
            where="select",
            expected=f"1 to {tokens}",
            got=str(keep),
        )
    similarity = cosine_similarity(to_windows(x, grid, tile))
    if opaque:
        chosen: Tensor = torch.ops.toma_fx.facility_location(similarity, keep)
        return chosen
    return facility_location(similarity, keep)


def weights(
    x: Tensor, idx: Tensor, grid: Size, tile: Size, scale: float, *, unmerge: str = "transpose"
) -> Pattern:
    """Merge and unmerge matrices for chosen destinations (arXiv 2509.10918; the published
    code's `tile_attention_merge`).

    A[d, i] = softmax over d of scale * cos(x[d], x[i]); merge is A with rows normalised to sum 1,
    unmerge is A transposed. `unmerge="pinv"` takes the pseudo-inverse of the merge matrix instead,
    the least-squares inverse that the transpose approximates.

    Args:
        x: tokens [B, N, C]; idx: destinations [B, T, k] from `select`.
        grid, tile: as in `select`.
        scale: sharpness of the softmax; 1000 is the published code's, near one-hot.
        unmerge: "transpose" or "pinv".

    Returns:
        `Pattern`, its matrices in the dtype of `x` (computed in float32).
    """
    unit = F.normalize(to_windows(x, grid, tile).float(), dim=-1)
    destinations = torch.take_along_dim(unit, idx.unsqueeze(-1), dim=-2)
    share = torch.softmax(scale * (destinations @ unit.transpose(-1, -2)), dim=-2)
    merge_matrix = share / share.sum(-1, keepdim=True)
    if unmerge == "pinv":
        gram = merge_matrix @ merge_matrix.transpose(-1, -2)
        # solve_ex never raises, so that NaN tokens come out as NaN, as in the original
        inverse = torch.linalg.solve_ex(gram, merge_matrix)[0].transpose(-1, -2)
    else:
        inverse = share.transpose(-1, -2)
    return Pattern(idx, merge_matrix.to(x.dtype), inverse.to(x.dtype).contiguous(), grid, tile)


def merge(x: Tensor, pattern: Pattern) -> Tensor:
    """Tokens [B, N, C] -> merged tokens [B, T*k, C], window by window: y = A_norm x."""
    return merge_windows(x, pattern.merge, pattern.grid, pattern.tile)


def unmerge(y: Tensor, pattern: Pattern) -> Tensor:
    """Merged tokens [B, T*k, C] -> tokens [B, N, C]: x' = A^T y, or pinv(A_norm) y."""
    return unmerge_windows(y, pattern.unmerge, pattern.grid, pattern.tile)
