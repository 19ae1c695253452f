"""`toma-fx explain`: what would merge where, and why not elsewhere."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console
from torch import nn

from toma_fx.api import explain
from toma_fx.errors import ConfigError
from toma_fx.files import write_file
from toma_fx.inputs import example_inputs, load_example
from toma_fx.models.named import from_config


def explain_model(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Print the report on a model as tables, as a tree or as JSON; write it as a page.

    Raises:
        ConfigError: a model, and the configuration of one, or neither.
    """
    report = explain(*_subject(args), **options)
    if args.html is not None:
        write_file(args.html, report.to_html(args.model or args.model_class))
    if args.json:
        sys.stdout.write(report.to_json() + "\n")
    elif args.tree or args.full:
        console.print(report.tree() if args.tree else report.full())
    else:
        console.print(report)


def _subject(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and inputs of one of its steps."""
    given = args.model is not None, args.model_class is not None, args.config is not None
    if given not in ((True, False, False), (False, True, True)):
        raise ConfigError(
            "it takes one model",
            where="toma-fx explain",
            expected="a model, or --class and --config of one",
            got="; ".join(
                name for name, there in zip(("a model", "--class", "--config"), given, strict=True)
                if there
            ) or "neither",
        )  # fmt: skip
    if args.model is not None:
        size = args.height, args.width, args.batch
        return load_example(args.model, *size, subfolder=args.subfolder)
    model = from_config(args.model_class, args.config)
    height = args.height or 1024
    return model, example_inputs(model, height, args.width or height, args.batch)
