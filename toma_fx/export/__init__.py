"""Exported programs, and artifacts: folders that run without the model.

    export(optimized, inputs, out, target="onnx", ...)     or onnx(...), aoti(...), ...

`toma_fx.load` opens an artifact.
"""

from typing import TYPE_CHECKING

from toma_fx.export.lazy import lazy_names

if TYPE_CHECKING:
    from toma_fx.export.builder import aoti, export, onnx, tensorrt, triton
    from toma_fx.export.programs import Exported, Programs, export_programs
    from toma_fx.export.signatures import sign
    from toma_fx.export.to_tensorrt.dry_run import tensorrt_coverage

__all__ = [
    "Exported",
    "Programs",
    "aoti",
    "export",
    "export_programs",
    "onnx",
    "sign",
    "tensorrt",
    "tensorrt_coverage",
    "triton",
]
__getattr__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("aoti", "export", "onnx", "tensorrt", "triton"), "builder"),
        **dict.fromkeys(("Exported", "Programs", "export_programs"), "programs"),
        "sign": "signatures",
        "tensorrt_coverage": "to_tensorrt.dry_run",
    },
)
