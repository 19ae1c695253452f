"""`toma-fx generate`: pictures of many prompts into a folder that processes share."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from toma_fx.cli.measure import SUBJECT, ShownProgress, load_model
from toma_fx.cli.terminal import Terminal
from toma_fx.cli.text import print_json
from toma_fx.offline.generate import generate

DRAWING = ("out", "shard", "seed", "seeds", "limit", "compile", *SUBJECT)
"""Options that are arguments of `toma_fx.generate` by the same names."""


def generate_pictures(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Draw this shard's pictures, and say what the folder holds."""
    with ShownProgress(Terminal(stderr=True)) as progress:
        result = generate(
            load_model(args),
            args.prompts,
            args.recipe,
            progress=progress,
            **{name: getattr(args, name) for name in DRAWING},
        )
    if args.json:
        print_json(result.to_dict())
    else:
        console.print(str(result), highlight=False, soft_wrap=True)
