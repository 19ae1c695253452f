"""Greedy facility location as one Triton kernel, equal to `facility.facility_location` bit by bit.

    S [n, n] --sum_i max(S[j, i] - m[i], floor)--> gain of each j --largest, lowest index--> next j

The loop in PyTorch launches some six kernels a round, each too small for a GPU; here one program
does all rounds of one window. Importing this file imports Triton, so `ops` does it when needed.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from toma_fx.methods.facility import quantize

TILE = 16384
"""Similarities that a program holds in registers at a time: 64 KiB."""
_PER_THREAD = 32
_WARP = 32
_ALIGNED = 16
"""Rows begin at multiples of it, so that threads load four numbers at a time."""


def facility_location(similarity: Tensor, keep: int) -> Tensor:
    """Choose `keep` rows of each symmetric matrix greedily: [..., n, n] -> [..., keep] int64.

    Args:
        similarity: float32 in [-1, 1], on a GPU; n at most `ops.MOST_TOKENS`. keep: 1 to n.
    """
    *batch, n, _ = similarity.shape
    stride = triton.cdiv(n, _ALIGNED) * _ALIGNED
    steps = F.pad(quantize(similarity), (0, stride - n)).contiguous()
    chosen = similarity.new_empty((*batch, keep), dtype=torch.int64)
    with torch.cuda.device_of(similarity):
        facility_location_kernel[(math.prod(batch),)](
            steps, chosen, n, stride, keep, **launch_options(n)
        )
    return chosen


def launch_options(n: int) -> dict[str, int]:
    """Constants of the kernel for windows of n tokens.

    Up to 128 tokens all rows are one tile, which is read once; of more, each round reads all tiles
    again, because 256 x 256 numbers of 18 bits fit neither registers nor shared memory.
    """
    columns = max(16, triton.next_power_of_2(n))
    rows = min(columns, TILE // columns)
    warps = max(1, rows * columns // (_PER_THREAD * _WARP))
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


@triton.jit(do_not_specialize=["keep"])
def facility_location_kernel(
    similarity: tl.tensor,
    chosen: tl.tensor,
    n: tl.tensor,
    stride: tl.tensor,
    keep: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One window: [n, stride] whole numbers as float32 -> [keep] int64.

    Row r of tile t is row t * ROWS + r. For each r the best tile so far is kept, so that a round
    compares rows of different r only once, at its end; bit t of `taken[r]` says that the row was
    chosen. As in torch, NaN is more than any number.
    """
    tl.static_assert(COLUMNS <= 32 * ROWS, "bits of an int32")
    window = tl.program_id(0).to(tl.int64)
    similarity += window * n * stride
    chosen += window * keep
    slots, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    taken = tl.zeros([ROWS], tl.int32)
    covered = tl.zeros([COLUMNS], tl.float32)
    if ROWS == COLUMNS:
        inside = (slots[:, None] < n) & (columns[None, :] < stride)
        tile = tl.load(similarity + slots[:, None] * stride + columns[None, :], inside, other=0.0)
    for step in range(keep):
        # the first choice has the largest sum, negative terms included
        floor = tl.where(step == 0, float("-inf"), 0.0)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        row_of_most = tl.zeros([ROWS], tl.int32)
        for t in range(tl.cdiv(n, ROWS)):
            rows = t * ROWS + slots
            if ROWS < COLUMNS:
                inside = (rows[:, None] < n) & (columns[None, :] < stride)
                tile = tl.load(
                    similarity + rows[:, None] * stride + columns[None, :], inside, other=0.0
                )
            rise = tl.maximum(tile - covered[None, :], floor, propagate_nan=tl.PropagateNan.ALL)
            gain = tl.sum(rise, 1)
            gain = tl.where(gain != gain, float("inf"), gain)
            is_free = (rows < n) & (((taken >> t) & 1) == 0)
            gain = tl.where(is_free, gain, float("-inf"))
            row_of_most = tl.where(gain > most, rows, row_of_most)
            most = tl.maximum(most, gain)
        best = tl.min(tl.where(most == tl.max(most, 0), row_of_most, COLUMNS), 0)
        tl.store(chosen + step, best.to(tl.int64))
        taken |= tl.where(slots == best % ROWS, 1 << (best // ROWS), 0)
        row = tl.load(similarity + best * stride + columns, columns < stride, other=0.0)
        rise = tl.maximum(covered, row, propagate_nan=tl.PropagateNan.ALL)
        covered = tl.where(step == 0, row, rise)
