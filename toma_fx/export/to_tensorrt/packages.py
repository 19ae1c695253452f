"""TensorRT and Torch-TensorRT, which are optional."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

from toma_fx.errors import MissingPackageError
from toma_fx.export.packages import import_package


def import_tensorrt(name: str) -> Any:
    """TensorRT or Torch-TensorRT.

    Raises:
        MissingPackageError: names the versions that belong together.
    """
    return import_package(name, partial(_missing, name))


def _missing(name: str, error: Exception) -> MissingPackageError:
    from toma_fx.export.to_tensorrt.coverage import load_table

    table = load_table("torch_tensorrt")
    wanted = [r for r in table["requires"] if r.startswith(("torch", "tensorrt"))]
    return MissingPackageError(
        f"TensorRT artifacts need the package {name.replace('_', '-')}",
        where=name,
        expected=f"torch-tensorrt {table['version']} with {', '.join(sorted(wanted))}",
        got=f"torch {version('torch')}; {type(error).__name__}: {error}",
        hint="on a machine with an NVIDIA GPU: pip install toma_fx[tensorrt] "
        "--extra-index-url https://pypi.nvidia.com",
    )
