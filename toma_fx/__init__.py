"""Token merging for diffusion denoisers as a graph rewrite.

pipe.unet = toma_fx.optimize(pipe.unet, toma=True)
pipe.unet = torch.compile(pipe.unet)
"""

from toma_fx.api import explain, optimize
from toma_fx.config import PRESETS, ToMAConfig
from toma_fx.errors import (
    CaptureError,
    ConfigError,
    ModelTypeError,
    NoMergeSites,
    RewriteError,
    SignatureError,
    TileError,
    TomaError,
    TrainingModeError,
    UnknownNameError,
    VerifyError,
)
from toma_fx.report import Report

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "CaptureError",
    "ConfigError",
    "ModelTypeError",
    "NoMergeSites",
    "Report",
    "RewriteError",
    "SignatureError",
    "TileError",
    "ToMAConfig",
    "TomaError",
    "TrainingModeError",
    "UnknownNameError",
    "VerifyError",
    "explain",
    "optimize",
]
