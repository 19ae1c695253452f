"""Importance-based token merging (Wu et al., ICCV 2025, arXiv 2411.16720).

    x_b of the step before [uncond; cond] --|cond - uncond|--> importance of each token
                                          --most important of each window--> destinations

Classifier-free guidance tells which tokens the prompt is about: those whose prediction it changes
most. Only the paper's abstract was at hand: tokens of a large guidance magnitude are to be
preserved. All else here is our reading of it: the magnitude is that of the residual stream behind
the merged blocks in the step before (the paper's is of the model's predictions), the most important
tokens of every window are destinations in both halves, and they merge and unmerge as ToMA's.

The first step that merges reads the magnitude off what comes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from toma_fx.errors import ConfigError
from toma_fx.methods.kinds import MATCH, REFRESH
from toma_fx.methods.ranking import similarity_keys
from toma_fx.methods.toma import ToMA, ToMAConfig
from toma_fx.methods.windows import to_windows


@dataclass(frozen=True)
class IBTM(ToMA):
    """IBTM at one grid. Cost: a read of the tokens and a sort of each window."""

    feature = "output"
    share = ToMA.share

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """The `keep` most important tokens of every window, in falling order: [B, T, keep] int64.

        Of equal ones the first; the same for row i of both halves of the batch.

        Raises:
            ConfigError: the batch has no halves.
        """
        if x.shape[0] % 2:
            raise ConfigError(
                "the batch has no two halves to compare",
                where="IBTM",
                expected="[uncond; cond], both halves of guidance in one call",
                got=f"{x.shape[0]} rows",
                hint="another method where each half has a call of its own, or none is needed",
            )
        without, with_prompt = to_windows(x.float(), self.grid, self.tile).chunk(2)
        size = torch.linalg.vector_norm(with_prompt - without, dim=-1)
        size = size / size.amax(-1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
        tokens = size.shape[-1]
        keys = similarity_keys(size, torch.arange(tokens, device=x.device), tokens)
        idx = keys.topk(self.keep, dim=-1).indices
        return (torch.cat([idx, idx]),)


@dataclass(frozen=True, kw_only=True)
class IBTMConfig(ToMAConfig):
    """Importance-based token merging (Wu et al., ICCV 2025, arXiv 2411.16720).

    Selects in every window the tokens that guidance changes most: |cond - uncond| of what the
    merged blocks gave in the step before, the first time of what comes in. Merges and unmerges as
    ToMA. Cost: a read of the tokens and a sort of each window, and one tensor of all tokens kept
    for each pattern. Read from the abstract alone; `toma_fx.methods.ibtm` says which parts are our
    reading.

    Only for calls whose batch is [uncond; cond], as pipelines of Stable Diffusion and SDXL make
    them with guidance: nothing else in a call tells which rows belong together. An odd number of
    rows is refused.

    The fields are those of `ToMAConfig`.
    """

    name: ClassVar[str] = "ibtm"

    def renewal(self, since: int) -> str:
        """Selections see the step before."""
        due = super().renewal(since)
        return MATCH if due == REFRESH else due

    def make_setting(self, **fields: Any) -> IBTM:
        """The setting of ToMA's fields."""
        return IBTM(**fields)
