"""`toma-fx explain`: what would merge where, and why not elsewhere."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console

from toma_fx.api import explain
from toma_fx.models.named import example


def explain_model(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Print the report on a model, as tables or as JSON."""
    size = args.height, args.width, args.batch
    model, inputs = example(args.model, *size, subfolder=args.subfolder)
    report = explain(model, inputs, method=args.method, **options)
    if args.json:
        sys.stdout.write(report.to_json() + "\n")
    else:
        console.print(report)
