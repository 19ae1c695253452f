"""Subjects: what draws pictures with a denoiser that can be replaced.

    subject = PipelineSubject(pipe, Settings(steps=30))
    cases = [Case("a lighthouse in a storm", seed=1)]
    want = subject.reference(cases)         # drawn once, then kept
    got = subject.draw(cases, "balanced")   # optimized once for each configuration

A configuration is anything that `toma_fx.optimize(model, X)` takes; None is the original.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from toma_fx.api import find_components, optimize
from toma_fx.capture.fingerprint import digest_weights
from toma_fx.errors import ConfigError, ModelTypeError, TomaError, UnknownNameError, nearest
from toma_fx.measure.cases import Case, batch_option, naming
from toma_fx.methods.checks import check_count
from toma_fx.methods.planning import plan_key
from toma_fx.models.embedded import EmbeddedModel
from toma_fx.run.denoiser import OptimizedDenoiser, optimized_of
from toma_fx.run.pipelines import replace_components


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn.

    Attributes:
        steps: of a generation. guidance: scale; None for the pipeline's default (embedded models:
            1). height, width: pixels; None for the model's own. batch: pictures of one call; a
            last batch that is smaller is filled up, so that shapes stay.
        compile: whether denoisers are compiled. compile_options: of `torch.compile`.
        options: further arguments of every call of the pipeline.

    Raises:
        ConfigError: steps or batch below 1.
    """

    steps: int = 20
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    batch: int = 1
    compile: bool = False
    compile_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            check_count(name, getattr(self, name))


class Subject(ABC):
    """Draws pictures with the original denoisers, or with optimized ones in their place.

    Optimized denoisers are kept by configuration, so that graphs and compiled programs are made
    once; so are the original's pictures.

    Attributes:
        name: of the model. settings: how pictures are drawn. denoisers: the originals, by the
            names of their components.
    """

    def __init__(self, name: str, denoisers: Mapping[str, nn.Module], settings: Settings) -> None:
        for component, denoiser in denoisers.items():
            if optimized_of(denoiser) is not None:
                raise ModelTypeError(
                    "the model is optimized already",
                    where=component,
                    expected="the original, which the configurations are compared with",
                    got=type(denoiser).__name__,
                    hint="toma_fx.restore(pipe) gives it back",
                )
        self.name, self.denoisers, self.settings = name, dict(denoisers), settings
        self._optimized: dict[Hashable, dict[str, OptimizedDenoiser]] = {}
        self._by_plan: WeakValueDictionary[Hashable, OptimizedDenoiser] = WeakValueDictionary()
        self._compiled: dict[str, Any] = {}
        self._references: dict[str, Tensor] = {}

    @abstractmethod
    def _generate(self, cases: Sequence[Case], denoisers: Mapping[str, Any]) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] of one batch, a generation of these denoisers."""

    @property
    def facts(self) -> dict[str, Any]:
        """What pictures depend on beside denoisers and settings, for records."""
        return {}

    def check(self, cases: Sequence[Case]) -> None:
        """Raise unless the model takes the cases, as far as that shows before they are drawn.

        Raises:
            ConfigError: arguments or prompts that it does not take, with the place of the case.
        """
        return

    @property
    def example_prompt(self) -> str:
        """A prompt that it draws."""
        return "a photo"

    @property
    def device(self) -> torch.device:
        """Of the first denoiser."""
        parameter = next(next(iter(self.denoisers.values())).parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @torch.no_grad()
    def draw(self, cases: Sequence[Case], config: Any = None) -> Tensor:
        """The pictures of the cases, [B, 3, H, W] float32 in [0, 1] on the CPU.

        Raises:
            ConfigError: no cases, or arguments that the model does not take. As `toma_fx.optimize`.
        """
        if not cases:
            raise ConfigError("nothing to draw", where="cases", expected="at least one", got="none")
        denoisers, size = self.running(config), self.settings.batch
        pictures = []
        for start in range(0, len(cases), size):
            batch = list(cases[start : start + size])
            filled = batch + [batch[-1]] * (size - len(batch))
            pictures.append(self._generate(filled, denoisers)[: len(batch)].float().cpu())
        return torch.cat(pictures).clamp(0, 1)

    def reference(self, cases: Sequence[Case]) -> Tensor:
        """The original's pictures, as `draw(cases)`; each is drawn once and kept."""
        lacking = list({c.key: c for c in cases if c.key not in self._references}.values())
        if lacking:
            for case, picture in zip(lacking, self.draw(lacking), strict=True):
                self._references[case.key] = picture
        return torch.stack([self._references[case.key] for case in cases])

    def running(self, config: Any) -> Mapping[str, Any]:
        """The denoisers that draw, by component: optimized or original, compiled if set."""
        if config is not None:
            return self.optimized(config)
        if not self.settings.compile:
            return self.denoisers
        for name, denoiser in self.denoisers.items():
            if name not in self._compiled:
                options = {"dynamic": False, **self.settings.compile_options}
                self._compiled[name] = torch.compile(denoiser, **options)
        return self._compiled

    def optimized(self, config: Any) -> Mapping[str, OptimizedDenoiser]:
        """The denoisers optimized by a configuration, made when first asked for."""
        key = _key(config)
        if key not in self._optimized:
            own = {}
            for name, denoiser in self.denoisers.items():
                optimized = optimize(denoiser, config)
                plan = name, plan_key(optimized.config_toma)
                like = self._by_plan.setdefault(plan, optimized)
                if like is not optimized:
                    optimized = optimize(denoiser, config, like=like)
                if self.settings.compile:
                    optimized.compile(**self.settings.compile_options)
                own[name] = optimized
            self._optimized[key] = own
        return self._optimized[key]

    def forget(self, config: Any) -> None:
        """Drop the optimized denoisers of a configuration; programs that others share stay."""
        self._optimized.pop(_key(config), None)


def _key(config: Any) -> Hashable:
    """A configuration as a key; what can't be hashed goes by its content."""
    try:
        hash(config)
    except TypeError:
        return json.dumps(config, sort_keys=True, default=repr)
    return cast(Hashable, config)


class EmbeddedSubject(Subject):
    """An embedded model (`toma_fx.models`), which draws its `prompts`."""

    def __init__(self, model: EmbeddedModel, settings: Settings | None = None) -> None:
        settings = settings or Settings()
        for name in ("height", "width"):
            if getattr(settings, name) not in (None, model.size):
                raise ConfigError(
                    "embedded models have one size",
                    where=name,
                    expected=f"{model.size} pixels, or nothing",
                    got=repr(getattr(settings, name)),
                )
        super().__init__(model.name, {"denoiser": model.denoiser}, settings)
        self.model = model

    @property
    def example_prompt(self) -> str:
        """The first that it knows."""
        return self.model.prompts[0]

    def check(self, cases: Sequence[Case]) -> None:
        """As of every subject: an embedded model takes prompts and seeds alone."""
        for case in cases:
            self._check_options(case)
        for case in {case.prompt: case for case in cases}.values():
            with naming(case):
                self.model.step_inputs([case.prompt], 1.0)

    def _check_options(self, case: Case) -> None:
        for name, value in case.options.items():
            if name not in ("height", "width") or value != self.model.size:
                raise ConfigError(
                    "embedded models take a prompt and a seed",
                    where=case.where or "options",
                    expected=f"no other field, or the height and width {self.model.size}",
                    got=f"{name} {value!r}"[:100],
                )

    def _generate(self, cases: Sequence[Case], denoisers: Mapping[str, Any]) -> Tensor:
        for case in cases:
            self._check_options(case)
        denoiser, steps = denoisers["denoiser"], self.settings.steps
        guidance = self.settings.guidance
        with ExitStack() as stack:
            if (optimized := optimized_of(denoiser)) is not None:
                stack.enter_context(optimized.generation(steps=steps))
            pictures = self.model.generate(
                [case.prompt for case in cases],
                seed=[case.seed for case in cases],
                steps=steps,
                guidance=1.0 if guidance is None else guidance,
                denoiser=denoiser,
            )
        return (pictures + 1) / 2


class PipelineSubject(Subject):
    """A pipeline of diffusers that gives pictures."""

    def __init__(self, pipeline: Any, settings: Settings | None = None, name: str = "") -> None:
        components = find_components(pipeline)
        super().__init__(name or type(pipeline).__name__, components, settings or Settings())
        self.pipeline = pipeline

    @property
    def facts(self) -> dict[str, Any]:
        """Classes and weights of its components, and the scheduler's configuration."""
        components = getattr(self.pipeline, "components", {})
        kinds = {name: type(part).__name__ for name, part in components.items()}
        weights = {
            name: digest_weights(part)
            for name, part in components.items()
            if isinstance(part, nn.Module) and name not in self.denoisers
        }
        scheduler = getattr(getattr(self.pipeline, "scheduler", None), "config", {})
        return {"components": kinds, "weights": weights, "scheduler": dict(scheduler)}

    def check(self, cases: Sequence[Case]) -> None:
        """As of every subject: the pipeline's call must name every argument."""
        for case in {tuple(case.options): case for case in reversed(cases)}.values():
            with naming(case):
                self._call([case])

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without the pipeline's own progress bar."""
        if not hasattr(self.pipeline, "progress_bar"):
            yield
            return
        from diffusers.utils.logging import EmptyTqdm

        own = vars(self.pipeline)
        before = own.get("progress_bar")
        own["progress_bar"] = EmptyTqdm
        try:
            yield
        finally:
            del own["progress_bar"]
            if before is not None:
                own["progress_bar"] = before

    def _generate(self, cases: Sequence[Case], denoisers: Mapping[str, Any]) -> Tensor:
        call = self._call(cases)
        with self._quiet(), replace_components(self.pipeline, denoisers):
            try:
                result = self.pipeline(**call)
            except TomaError:
                raise
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    "the pipeline refuses the call",
                    where=type(self.pipeline).__name__,
                    expected="arguments that it takes",
                    got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                ) from error
        pictures = getattr(result, "images", None)
        if not (isinstance(pictures, Tensor) and pictures.dim() == 4 and pictures.shape[1] == 3):
            raise ModelTypeError(
                "the pipeline gives no pictures",
                where=type(self.pipeline).__name__,
                expected="images [B, 3, H, W] for output_type='pt'",
                got=type(result).__name__,
                hint="videos and audio are not measured",
            )
        return pictures

    def _call(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call."""
        own = self.settings
        call: dict[str, Any] = {
            "num_inference_steps": own.steps,
            "generator": [torch.Generator().manual_seed(case.seed) for case in cases],
            "output_type": "pt",
        }
        for name, value in (
            ("guidance_scale", own.guidance), ("height", own.height), ("width", own.width),
        ):  # fmt: skip
            if value is not None:
                call[name] = value
        call |= own.options
        names = list(dict.fromkeys(name for case in cases for name in case.options))
        if "prompt_embeds" not in names:
            call["prompt"] = [case.prompt for case in cases]
        for name in names:
            call[name] = batch_option(name, [case.options.get(name) for case in cases])
        self._check_names(call)
        return call

    def _check_names(self, call: Mapping[str, Any]) -> None:
        """Raise unless the pipeline names every argument; many ignore what they don't know.

        Raises:
            UnknownNameError: with the nearest names.
        """
        own = inspect.signature(self.pipeline.__call__).parameters
        known = [name for name, p in own.items() if p.kind is not p.VAR_KEYWORD]
        for name in call:
            if name not in known:
                raise UnknownNameError(
                    f"the pipeline takes no argument {name!r}",
                    where=type(self.pipeline).__name__,
                    hint=nearest(name, known),
                )


def subject_of(model: Any, settings: Mapping[str, Any]) -> Subject:
    """The subject of a pipeline or an embedded model; a subject is returned as it is.

    Raises:
        UnknownNameError: settings that there are not. ConfigError: settings for a subject, which
            has its own. ModelTypeError: nothing that draws.
    """
    known = [f.name for f in dataclasses.fields(Settings)]
    for name in settings:
        if name not in known:
            raise UnknownNameError(
                f"unknown setting {name!r}", where="settings", hint=nearest(name, known)
            )
    if isinstance(model, Subject):
        if settings:
            raise ConfigError(
                "a subject has its settings already",
                where="settings",
                expected="none",
                got=", ".join(settings),
            )
        return model
    if all(hasattr(model, name) for name in ("denoiser", "prompts", "generate")):
        return EmbeddedSubject(model, Settings(**settings))
    return PipelineSubject(model, Settings(**settings))
