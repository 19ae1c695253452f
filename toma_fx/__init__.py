"""Token merging for diffusion denoisers as a graph rewrite.

pipe.unet = toma_fx.optimize(pipe.unet, toma=True)
pipe.unet = torch.compile(pipe.unet)
"""

from toma_fx.api import explain, optimize, restore, summary
from toma_fx.config import PRESETS, ToMAConfig
from toma_fx.errors import (
    AdapterError,
    CaptureError,
    CompanionError,
    ConfigError,
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
from toma_fx.report import Report, Summary
from toma_fx.rules import tokenwise
from toma_fx.state import State

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "AdapterError",
    "CaptureError",
    "CompanionError",
    "ConfigError",
    "ModelTypeError",
    "NoMergeSites",
    "OffloadError",
    "ParityError",
    "Report",
    "RewriteError",
    "SharedStateError",
    "SignatureError",
    "State",
    "StateError",
    "Summary",
    "TileError",
    "ToMAConfig",
    "TomaError",
    "TrainingModeError",
    "UnknownNameError",
    "VerifyError",
    "explain",
    "optimize",
    "restore",
    "summary",
    "tokenwise",
]
