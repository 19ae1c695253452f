"""Optional packages: imported where they are used, with an error that says how to install them."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from toma_fx.errors import MissingPackageError


def import_package(name: str, explain: Callable[[Exception], MissingPackageError]) -> Any:
    """An optional package.

    Raises:
        MissingPackageError: what `explain` makes of the reason why it can't be imported.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise explain(error) from error


def import_onnx(name: str) -> Any:
    """A package of the extra `[onnx]`.

    From its import on, ONNX Runtime keeps an identifier below HOME and reports to its maker. Not
    where this is its first import, unless the environment says ORT_DISABLE_TELEMETRY=0.

    Raises:
        MissingPackageError: it is not installed; names the extra.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return import_package(name, lambda _: missing_onnx(name, "onnx"))


def missing_onnx(package: str, extra: str) -> MissingPackageError:
    """The error for a package that ONNX artifacts need."""
    return MissingPackageError(
        f"ONNX artifacts need the package {package}",
        where=package,
        hint=f"pip install toma_fx[{extra}]",
    )


def version_of(package: str) -> str:
    """Version of a package of the extra `[onnx]`."""
    return str(getattr(import_onnx(package), "__version__", "unknown"))


def import_tensorrt(name: str) -> Any:
    """TensorRT or Torch-TensorRT.

    Raises:
        MissingPackageError: names the versions that belong together.
    """
    return import_package(name, partial(_missing_tensorrt, name))


def _missing_tensorrt(name: str, error: Exception) -> MissingPackageError:
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


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """No warnings of the ONNX exporter about missing packages and unfolded constants."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
