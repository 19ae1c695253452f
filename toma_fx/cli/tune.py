"""`toma-fx tune`: find a recipe for a model and prompts, and write it to a file."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from toma_fx.cli.measure import DRAWING, ShownProgress, load_model
from toma_fx.errors import ConfigError
from toma_fx.measure.tune import tune
from toma_fx.methods.config import make_config
from toma_fx.methods.recipe import Recipe, is_yaml_file


def tune_model(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Search, write the recipe, and print what is known of it."""
    is_yaml_file(args.recipe)  # a name that can't be, before hours of search
    if not args.recipe.parent.is_dir():
        raise ConfigError(
            "the folder of the recipe is not there",
            where="--recipe",
            expected="a file in a folder that exists",
            got=str(args.recipe),
        )
    merging: Any = True
    if args.merging != "toma":
        merging = False if args.merging == "none" else make_config(True, args.merging)
    with ShownProgress(console) as progress:
        recipe = tune(
            load_model(args),
            args.prompts,
            speedup=args.speedup,
            psnr=args.psnr,
            clock=args.clock,
            merging=merging,
            budget=args.budget,
            programs=args.programs,
            progress=progress,
            **{name: getattr(args, name) for name in DRAWING},
        )
    recipe.save(args.recipe)
    console.print(_described(recipe))
    console.print(f"recipe: {args.recipe}", highlight=False, soft_wrap=True)


def _described(recipe: Recipe) -> str:
    """What is known of a recipe, in a few lines."""
    cache, measured = recipe.config.caching, recipe.measured
    mask = "".join(map(str, cache.mask or ())) if cache is not None else ""
    speeds = [f"{measured['speedup_counted']:.2f}x counted"]
    if "speedup_measured" in measured:
        speeds.append(f"{measured['speedup_measured']:.2f}x measured")
    lines = [
        "merging: " + (", ".join(_amounts(recipe)) or "none"),
        "steps that compute: " + (mask or "all"),
        "speed-up: " + ", ".join(speeds),
        f"PSNR: {measured['psnr']:.1f} dB, on other seeds {measured['psnr_other_seeds']:.1f} dB",
    ]
    return "\n".join(lines)


def _amounts(recipe: Recipe) -> list[str]:
    """What merges, in each part of the generation."""
    begins = ["0", *(f"{begin:g}" for begin, _ in recipe.config.phases)]
    found = []
    for begin, stage in zip(begins, recipe.config.stages, strict=True):
        paths = [path.replace("*", "x") for path in stage.path_patterns()]
        ratios = [getattr(stage.at(path), "ratio", 0) or 0 for path in ("", *paths)]
        found.append(f"up to {max(ratios):g} from {begin}")
    return found if recipe.config.merges else []
