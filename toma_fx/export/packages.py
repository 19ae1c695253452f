"""Optional packages: imported where used, with an error that names the extra."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from toma_fx.errors import MissingPackageError

# -- packages -------------------------------------------------------------------------------------


def imported(package: str) -> Any:
    """An optional package.

    Raises:
        MissingPackageError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _missing(package, "onnx") from error


def _missing(package: str, extra: str) -> MissingPackageError:
    return MissingPackageError(
        f"ONNX artifacts need the package {package}",
        where=package,
        hint=f"pip install toma_fx[{extra}]",
    )


def _version(package: str) -> str:
    module: ModuleType = imported(package)
    return str(getattr(module, "__version__", "unknown"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks on packages looked for and constants left unfolded; errors are raised."""
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
