"""Programs that leave the process: exported graphs, and artifacts made of them."""

from toma_fx.export.builder import build
from toma_fx.export.entry import aoti, onnx, tensorrt
from toma_fx.export.programs import Exported, Programs, export_programs
from toma_fx.export.to_tensorrt.target import tensorrt_coverage

__all__ = [
    "Exported",
    "Programs",
    "aoti",
    "build",
    "export_programs",
    "onnx",
    "tensorrt",
    "tensorrt_coverage",
]
