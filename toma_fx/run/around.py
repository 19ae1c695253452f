"""Functions that are set as the `forward` of an optimized denoiser.

Around its own they are welcome: offload hooks of accelerate, caches and meters that call what they
found there. One that runs the layers itself would turn merging off without a word.
"""

from __future__ import annotations

from functools import update_wrapper
from typing import Any

from toma_fx.capture.replaced import refuse_known, replacement
from toma_fx.errors import CompanionError


class AroundForward:
    """A function around a denoiser's `forward`, which it must run in its first call.

    Attributes:
        function: as it was set. ran: whether it has run what it stands around.

    Raises:
        CompanionError: when called: it belongs to a package that can't act beside merging, or it
            did not run the denoiser's own `forward`.
    """

    def __init__(self, where: str, function: Any) -> None:
        update_wrapper(self, function)
        self._where, self.function, self.ran = where, function, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        if self.ran:
            return self.function(*args, **kwargs)
        origin = replacement("the optimized denoiser", self.function)
        refuse_known(origin)
        outputs = self.function(*args, **kwargs)
        if not self.ran:
            raise CompanionError(
                "forward was replaced on the optimized denoiser, and nothing would merge",
                where=self._where,
                expected="a function that calls the forward that it found there",
                got=f"{origin.name} of {origin.module}, which does not",
                hint="set it on the original, before or after: toma_fx.restore(denoiser).forward "
                "= ...; it is captured then. del denoiser.forward takes it off",
            )
        return outputs
