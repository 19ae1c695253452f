"""Token merging for diffusion denoisers as a graph rewrite.

pipe.unet = toma_fx.optimize(pipe.unet, toma=True)
pipe.unet = torch.compile(pipe.unet)
"""

from toma_fx import export
from toma_fx.api import explain, optimize, restore, summary
from toma_fx.calibration import calibrate, recorded
from toma_fx.config import (
    PRESETS,
    CAToMeConfig,
    GridConfig,
    MethodConfig,
    Place,
    RandomConfig,
    ReToMConfig,
    Setting,
    ToDoConfig,
    ToFuConfig,
    ToMAConfig,
    ToMeSDConfig,
)
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
from toma_fx.report import Report, Summary
from toma_fx.rules import tokenwise
from toma_fx.state import State

__version__ = "0.1.0"
__all__ = [
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
