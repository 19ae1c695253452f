"""Token merging for diffusion denoisers as a graph rewrite.

pipe.unet = toma_fx.optimize(pipe.unet, toma=True)
pipe.unet = torch.compile(pipe.unet)

A public name is imported when it is first used: `import toma_fx` alone does not import torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the names of the table, for type checkers and editors
    # isort: off
    # fmt: off
    from toma_fx import export as export
    from toma_fx.analysis.rules.base import tokenwise as tokenwise
    from toma_fx.api import (
        explain as explain, optimize as optimize, restore as restore, summary as summary,
    )
    from toma_fx.calibration import (
        calibrate as calibrate, calibrate_cache as calibrate_cache, record_calls as record_calls,
    )
    from toma_fx.errors import (
        AdapterError as AdapterError, ArtifactError as ArtifactError, BuildError as BuildError,
        CaptureError as CaptureError, CompanionError as CompanionError, CompatError as CompatError,
        ConfigError as ConfigError, DynamicError as DynamicError,
        GenerationError as GenerationError, GradientError as GradientError,
        MissingPackageError as MissingPackageError, ModelTypeError as ModelTypeError,
        NoCacheSites as NoCacheSites, NoMergeSites as NoMergeSites, OffloadError as OffloadError,
        ParallelError as ParallelError, ParityError as ParityError,
        RankLostError as RankLostError, RankMismatchError as RankMismatchError,
        RecipeError as RecipeError, ResultsError as ResultsError, RewriteError as RewriteError,
        SharedStateError as SharedStateError, SignatureError as SignatureError,
        StatefulModelError as StatefulModelError,
        StateError as StateError, TileError as TileError,
        TomaError as TomaError, TrainingModeError as TrainingModeError, TuneError as TuneError,
        UnknownNameError as UnknownNameError, VerifyError as VerifyError,
    )
    from toma_fx.events import Event as Event, on_event as on_event
    from toma_fx.export.denoiser import ArtifactDenoiser as ArtifactDenoiser
    from toma_fx.export.loader import load as load
    from toma_fx.inputs import example_inputs as example_inputs
    from toma_fx.measure.bench import bench as bench
    from toma_fx.measure.intervals import paired_interval as paired_interval
    from toma_fx.measure.quality import quality as quality
    from toma_fx.measure.tune import tune as tune
    from toma_fx.methods.base import MethodConfig as MethodConfig
    from toma_fx.methods.baselines import GridConfig as GridConfig, RandomConfig as RandomConfig
    from toma_fx.methods.bigain import BiGainConfig as BiGainConfig
    from toma_fx.methods.ca_tome import CAToMeConfig as CAToMeConfig
    from toma_fx.methods.cache import CACHES as CACHES, CacheConfig as CacheConfig
    from toma_fx.methods.config import METHODS as METHODS, PRESETS as PRESETS
    from toma_fx.methods.coredit import CoReDiTConfig as CoReDiTConfig
    from toma_fx.methods.dito import DiToConfig as DiToConfig
    from toma_fx.methods.ibtm import IBTMConfig as IBTMConfig
    from toma_fx.methods.recipe import Recipe as Recipe
    from toma_fx.methods.retom import ReToMConfig as ReToMConfig
    from toma_fx.methods.setting import Place as Place, Setting as Setting
    from toma_fx.methods.todo import ToDoConfig as ToDoConfig
    from toma_fx.methods.tofu import ToFuConfig as ToFuConfig
    from toma_fx.methods.toma import ToMAConfig as ToMAConfig
    from toma_fx.methods.tomesd import ToMeSDConfig as ToMeSDConfig
    from toma_fx.methods.topi import ToPiConfig as ToPiConfig
    from toma_fx.offline.generate import generate as generate
    from toma_fx.offline.stage import DrawPictures as DrawPictures
    from toma_fx.run.batching import State as State
    from toma_fx.run.denoiser import OptimizedDenoiser as OptimizedDenoiser
    from toma_fx.run.ranks import Parallel as Parallel
    from toma_fx.run.report import Report as Report, Summary as Summary
    # fmt: on
    # isort: on

_NAMES = {
    "toma_fx.analysis.rules.base": "tokenwise",
    "toma_fx.api": "explain optimize restore summary",
    "toma_fx.calibration": "calibrate calibrate_cache record_calls",
    "toma_fx.errors": (
        "AdapterError ArtifactError BuildError CaptureError CompanionError CompatError "
        "ConfigError DynamicError GenerationError GradientError MissingPackageError ModelTypeError "
        "NoCacheSites NoMergeSites OffloadError ParallelError ParityError RankLostError "
        "RankMismatchError RecipeError ResultsError RewriteError "
        "SharedStateError SignatureError StatefulModelError StateError TileError TomaError "
        "TrainingModeError TuneError UnknownNameError VerifyError"
    ),
    "toma_fx.events": "Event on_event",
    "toma_fx.export.denoiser": "ArtifactDenoiser",
    "toma_fx.export.loader": "load",
    "toma_fx.inputs": "example_inputs",
    "toma_fx.measure.bench": "bench",
    "toma_fx.measure.intervals": "paired_interval",
    "toma_fx.measure.quality": "quality",
    "toma_fx.measure.tune": "tune",
    "toma_fx.methods.base": "MethodConfig",
    "toma_fx.methods.baselines": "GridConfig RandomConfig",
    "toma_fx.methods.bigain": "BiGainConfig",
    "toma_fx.methods.ca_tome": "CAToMeConfig",
    "toma_fx.methods.cache": "CACHES CacheConfig",
    "toma_fx.methods.config": "METHODS PRESETS",
    "toma_fx.methods.coredit": "CoReDiTConfig",
    "toma_fx.methods.dito": "DiToConfig",
    "toma_fx.methods.ibtm": "IBTMConfig",
    "toma_fx.methods.recipe": "Recipe",
    "toma_fx.methods.retom": "ReToMConfig",
    "toma_fx.methods.setting": "Place Setting",
    "toma_fx.methods.todo": "ToDoConfig",
    "toma_fx.methods.tofu": "ToFuConfig",
    "toma_fx.methods.toma": "ToMAConfig",
    "toma_fx.methods.tomesd": "ToMeSDConfig",
    "toma_fx.methods.topi": "ToPiConfig",
    "toma_fx.offline.generate": "generate",
    "toma_fx.offline.stage": "DrawPictures",
    "toma_fx.run.batching": "State",
    "toma_fx.run.denoiser": "OptimizedDenoiser",
    "toma_fx.run.ranks": "Parallel",
    "toma_fx.run.report": "Report Summary",
}
"""Modules, and the public names that are imported from each."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = ["export", *_MODULES]


if not TYPE_CHECKING:  # with it, type checkers would take every name for a public one

    def __getattr__(name: str) -> Any:
        if name == "export":
            return importlib.import_module("toma_fx.export")
        if name not in _MODULES:
            raise AttributeError(f"module 'toma_fx' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value


if "TOMA_FX_LOG" in os.environ:
    importlib.import_module("toma_fx.events").show_log()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
