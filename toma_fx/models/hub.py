"""Whether a name is a folder, or a repository of the hub that can be had, asked once and early.

Loading a pipeline asks the hub for many files, one after the other, and for each it tries again and
again: without a connection that takes minutes, and what is said then is that a file is missing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache

from toma_fx.errors import ModelTypeError, nearest

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""Identifiers of models on the hub: owner and name."""
FILES = ("model_index.json", "config.json", "unet/config.json", "transformer/config.json")
"""What tells that a repository was downloaded before."""
PATIENCE = 20.0
"""Seconds that the hub may take to answer."""


def check_model_name(name: str, known: Sequence[str] = ()) -> None:
    """Raise unless there is a folder of this name, or a repository that was or can be downloaded.

    Args:
        known: names that were meant, perhaps.

    Raises:
        ModelTypeError: there is not, or nobody can say.
    """
    if name and os.path.exists(name):  # False, too, for names that no file can have
        return
    if not REPOSITORY.fullmatch(name):
        raise ModelTypeError(
            "there is no such model",
            where=name,
            expected=", ".join((*known, "a folder", "or an id OWNER/NAME of the hub")),
            got="no such folder",
            hint=nearest(name, known) if known else "",
        )
    _ask_hub(name)


@cache  # of those that are there: a model and its pipeline are asked for one after the other
def _ask_hub(name: str) -> None:
    """Raise unless a repository was, or can be, downloaded.

    Raises:
        ModelTypeError: neither, or nobody can say.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(name, file), str) for file in FILES):
        return
    try:
        HfApi().model_info(name, timeout=PATIENCE)
    except Exception as error:  # the hub's own errors, and those of what it asks with
        raise ModelTypeError(
            "there is no such model, or it can't be had",
            where=name,
            expected="a folder, or a repository of the hub that this machine can reach",
            got=f"no such folder, and {type(error).__name__}: {str(error).splitlines()[0]}",
            hint="a private or gated one needs `hf auth login`",
        ) from error
