"""Token merging for diffusion denoisers as a graph rewrite.

pipe.unet = toma_fx.optimize(pipe.unet, toma=True)
pipe.unet = torch.compile(pipe.unet)
"""

from toma_fx import export
from toma_fx.analysis.rules.base import tokenwise
from toma_fx.api import explain, optimize, restore, summary
from toma_fx.calibration import calibrate, recorded
from toma_fx.errors import (
    AdapterError,
    ArtifactError,
    BuildError,
    CaptureError,
    CompanionError,
    ConfigError,
    DynamicError,
    MissingPackageError,
    ModelTypeError,
    NoMergeSites,
    OffloadError,
    ParityError,
    RewriteError,
    SharedStateError,
    SignatureError,
    StateError,
    TileError,
    TomaError,
    TrainingModeError,
    UnknownNameError,
    VerifyError,
)
from toma_fx.export.loader import ArtifactDenoiser, load
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.baselines import GridConfig, RandomConfig
from toma_fx.methods.ca_tome import CAToMeConfig
from toma_fx.methods.config import METHODS, PRESETS
from toma_fx.methods.retom import ReToMConfig
from toma_fx.methods.setting import Place, Setting
from toma_fx.methods.todo import ToDoConfig
from toma_fx.methods.tofu import ToFuConfig
from toma_fx.methods.toma import ToMAConfig
from toma_fx.methods.tomesd import ToMeSDConfig
from toma_fx.run.batching import State
from toma_fx.run.report import Report, Summary

__version__ = "0.1.0"


__all__ = [
    "METHODS",
    "PRESETS",
    "AdapterError",
    "ArtifactDenoiser",
    "ArtifactError",
    "BuildError",
    "CAToMeConfig",
    "CaptureError",
    "CompanionError",
    "ConfigError",
    "DynamicError",
    "GridConfig",
    "MethodConfig",
    "MissingPackageError",
    "ModelTypeError",
    "NoMergeSites",
    "OffloadError",
    "ParityError",
    "Place",
    "RandomConfig",
    "ReToMConfig",
    "Report",
    "RewriteError",
    "Setting",
    "SharedStateError",
    "SignatureError",
    "State",
    "StateError",
    "Summary",
    "TileError",
    "ToDoConfig",
    "ToFuConfig",
    "ToMAConfig",
    "ToMeSDConfig",
    "TomaError",
    "TrainingModeError",
    "UnknownNameError",
    "VerifyError",
    "calibrate",
    "explain",
    "export",
    "load",
    "optimize",
    "recorded",
    "restore",
    "summary",
    "tokenwise",
]
