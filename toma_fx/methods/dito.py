"""DiTo: destinations by the similarity of outputs (Lee, Lee, Kim, arXiv 2605.22011).

    step s      blocks --> x_b of all tokens, kept
    step s + 1  x_b of step s --select--> destinations, for this step and those that reuse them

Only the paper's abstract was at hand: what merging should keep alike are outputs, not inputs;
outputs that are alike stay so in the next step; tokens are matched by the outputs of the step
before, at some steps, and the pattern is reused in between; a penalty on how often a token was
selected counters errors that stay in one place. All else here is our reading of it: destinations
are chosen as by ToMA, on the residual stream behind the merged blocks, the penalty divides the
similarities of a token by exp(`penalty`) for each selection that chose it, and matching steps are
evenly spaced. The paper finds their spacing by a ratio of pairs that match.

The first step that merges selects on what comes in, as ToMA does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from toma_fx.methods.checks import is_number
from toma_fx.methods.facility import facility_location
from toma_fx.methods.kinds import MATCH, REFRESH
from toma_fx.methods.setting import Pattern
from toma_fx.methods.toma import UNROLL, ToMA, ToMAConfig, cosine_similarity
from toma_fx.methods.windows import to_windows


@dataclass(frozen=True, kw_only=True)
class DiTo(ToMA):
    """DiTo at one grid.

    Cost: that of ToMA; the outputs of a step are kept until the next.

    Attributes:
        penalty: of each earlier selection of a token.
    """

    penalty: float

    chosen: ClassVar[tuple[str, ...]] = ("idx", "times")
    recalled: ClassVar[tuple[str, ...]] = ("times",)
    feature = "output"
    share = ToMA.share

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """ToMA's destinations, and how often each token was one: `idx`, `times` [B, T, n]."""
        windows = to_windows(x, self.grid, self.tile)
        return self._choose(windows, torch.zeros_like(windows[..., 0], dtype=torch.float32))

    def select_again(self, x: Tensor, before: Pattern) -> tuple[Tensor, ...]:
        """The same, tokens being less similar the more often they were chosen."""
        return self._choose(to_windows(x, self.grid, self.tile), before["times"])

    def _choose(self, windows: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Facility location on w_i w_j cos(x_i, x_j), where w falls with `times`."""
        weight = torch.exp(-self.penalty * (times - times.amin(-1, keepdim=True)))
        similarity = cosine_similarity(windows) * weight.unsqueeze(-1) * weight.unsqueeze(-2)
        if self.keep > UNROLL:
            idx: Tensor = torch.ops.toma_fx.facility_location(similarity, self.keep)
        else:
            idx = facility_location(similarity, self.keep)
        slots = torch.arange(windows.shape[-2], device=windows.device).unsqueeze(-1)
        return idx, times + (slots == idx.unsqueeze(-2)).any(-1).to(times.dtype)


@dataclass(frozen=True, kw_only=True)
class DiToConfig(ToMAConfig):
    """DiTo: destinations by the similarity of outputs (Lee, Lee, Kim, arXiv 2605.22011).

    Selects as ToMA, but on what the merged blocks gave in the step before; the first time on what
    comes in. Tokens that were often destinations are chosen less. Merges and unmerges as ToMA, by
    weights of those outputs. Cost: that of ToMA, and one tensor of all tokens kept for each
    pattern. Requests of one batch must match at the same steps. Read from the abstract alone;
    `toma_fx.methods.dito` says which parts are our reading.

    Attributes:
        penalty: of each earlier selection of a token; 0 for none.

    The other fields are those of `ToMAConfig`.
    """

    penalty: float = 0.05

    name: ClassVar[str] = "dito"
    overridable: ClassVar[tuple[str, ...]] = (*ToMAConfig.overridable, "penalty")

    def check(self) -> None:
        """Check every field."""
        super().check()
        self.require(
            is_number(self.penalty) and self.penalty >= 0, "penalty", "a number, 0 or more"
        )

    def renewal(self, since: int) -> str:
        """Selections see the step before."""
        due = super().renewal(since)
        return MATCH if due == REFRESH else due

    def make_setting(self, **fields: Any) -> DiTo:
        """The setting of ToMA's fields and the penalty."""
        return DiTo(**fields, penalty=float(self.penalty))
