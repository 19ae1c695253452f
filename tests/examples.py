"""The files of examples/ and tools/, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load_example(name: str, folder: str = "examples") -> ModuleType:
    """A file by the name under which the pages import it, once: its operators exist once."""
    full = f"{folder}.{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, ROOT / folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]
