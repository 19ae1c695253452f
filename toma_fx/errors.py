"""Typed errors. Each says what went wrong, where, what was expected, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TomaError(Exception):
    """Base of every error that toma_fx raises on purpose.

    Attributes:
        what: one sentence on the failure.
        where: module path, graph node, argument or field concerned ("" if none).
        expected: what would have been right.
        got: what was found instead.
        hint: what to do next.
    """

    def __init__(
        self, what: str, *, where: str = "", expected: str = "", got: str = "", hint: str = ""
    ) -> None:
        self.what, self.where, self.expected, self.got, self.hint = what, where, expected, got, hint
        rows = (("where", where), ("expected", expected), ("got", got), ("try", hint))
        super().__init__("\n".join([what, *(f"  {name}: {text}" for name, text in rows if text)]))


class ConfigError(TomaError, ValueError):
    """A configuration field has a value outside its domain."""


class UnknownNameError(ConfigError):
    """A preset, field, scope, branch or module path that does not exist."""


class RecipeError(ConfigError):
    """A recipe can't be read, or is for another model."""


class TileError(ConfigError):
    """The window does not fit the token grid."""


class DynamicError(ConfigError):
    """A method whose shapes depend on the data, where a static graph is asked for."""


class ModelTypeError(TomaError, TypeError):
    """The object is neither a denoiser module nor a pipeline that holds one."""


class TrainingModeError(TomaError, RuntimeError):
    """The model is in training mode; token merging is an inference optimization."""


class CaptureError(TomaError, RuntimeError):
    """`torch.export` could not trace the model; names the module and the Python line."""


class ParityError(CaptureError):
    """A captured graph computes something else than the model."""


class StatefulModelError(CaptureError):
    """The model keeps state in Python from call to call; names what changed during a call."""


class GradientError(TomaError, RuntimeError):
    """A call asks for gradients where tokens merge, or of an artifact."""


class SignatureError(TomaError, ValueError):
    """A call does not fit the signature that was captured."""


class AdapterError(CaptureError):
    """The model no longer accepts a call that it accepted before it changed."""


class CompanionError(TomaError, RuntimeError):
    """Another library acts on the model in a way that a captured graph can't follow."""


class OffloadError(CompanionError):
    """Hooks act inside the forward pass: they move or cast weights, or skip parts of the model."""


class StateError(TomaError, ValueError):
    """A merging state does not fit the call it is given with."""


class GenerationError(TomaError, RuntimeError):
    """What a caller tells of a generation contradicts its calls, or itself."""


class SharedStateError(TomaError, RuntimeError):
    """Two threads use the implicit state of one optimized denoiser at the same time."""


class ParallelError(TomaError, RuntimeError):
    """Tokens can't be shared by these processes, or not with this model and configuration."""


class RankMismatchError(ParallelError):
    """Processes that share the tokens of a step are about to run different programs."""


class RankLostError(ParallelError):
    """A process that shares the tokens does not answer."""


class RewriteError(TomaError, RuntimeError):
    """A pass asked for a change that would leave the graph invalid."""


class VerifyError(TomaError, RuntimeError):
    """A rewritten graph failed verification; the original model is untouched."""


class MissingPackageError(TomaError, ImportError):
    """An optional package is not installed; names the extra that brings it."""


class CompatError(TomaError, ImportError):
    """An installed version of torch, diffusers, accelerate or peft lacks a name that is used."""


class ArtifactError(TomaError, RuntimeError):
    """An artifact is damaged, incomplete, or not for this machine; nothing of it was run."""


class BuildError(TomaError, RuntimeError):
    """An artifact could not be built; none was left behind, and an existing one is untouched."""


class ResultsError(TomaError, RuntimeError):
    """A folder of measurements is damaged, or holds those of another run; nothing was changed."""


class TuneError(TomaError, RuntimeError):
    """No configuration of a model reaches what was asked for."""


class NoMergeSites(TomaError, RuntimeError):
    """Nothing in the model can be merged with this configuration.

    Attributes:
        reasons: one line per attention or branch that was left alone.
    """

    def __init__(
        self, what: str, reasons: Sequence[str], *, where: str = "", hint: str = ""
    ) -> None:
        self.reasons = tuple(reasons)
        listed = "; ".join(self.reasons) if self.reasons else "the graph has no attention at all"
        super().__init__(what, where=where, expected=self.expected_sites, got=listed, hint=hint)

    expected_sites = "at least one merged branch"


class NoCacheSites(NoMergeSites):
    """No update of the model can be kept over steps with this configuration.

    Attributes:
        reasons: one line per stretch that can't be cut.
    """

    expected_sites = "at least one stretch of blocks that a kept update can stand for"


def nearest(name: object, known: Iterable[str]) -> str:
    """ "did you mean" text for an unknown name: the three nearest known ones, or all of them."""
    options = sorted(set(known))
    close = difflib.get_close_matches(str(name), options, n=3, cutoff=0.4)
    return "nearest: " + ", ".join(close) if close else "known: " + ", ".join(options[:20])
