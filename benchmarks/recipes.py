"""Rows of benchmarks/frontier.py: what `toma_fx.tune` finds for each speed, and how it compares.

Tuned on eight of the twelve prompts and on seeds that the pictures don't have. `beaten` compares a
recipe, picture by picture, with the best other row that is as fast.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import toma_fx
from toma_fx.measure.subjects import EmbeddedSubject, Settings

SPEEDS = (1.25, 1.5, 2.0, 2.5, 3.0)
TUNED_ON = 8
"""Prompts."""
SEED = 1000
FOLDER = Path("build/tuning")
"""Of what tuning measured: one search serves all speeds."""


def recipe_for(model: Any, speedup: float, steps: int) -> toma_fx.Recipe:
    """The recipe for a counted speed-up."""
    subject = EmbeddedSubject(model, Settings(steps=steps, batch=TUNED_ON))
    prompts = list(model.prompts)[:TUNED_ON]
    return toma_fx.tune(
        subject, prompts, speedup=speedup, seed=SEED, rounds=0, out=FOLDER / model.name
    )


def described(recipe: toma_fx.Recipe) -> dict[str, Any]:
    """A recipe for the record."""
    cache = recipe.config.cache
    fields = {
        k: v for k, v in recipe.to_dict()["config"].items() if k in ("ratio", "phases", "overrides")
    }
    if isinstance(cache, toma_fx.CacheConfig):
        mask = "".join(map(str, cache.steps_mask or ()))
        fields |= {
            "scope": cache.scope,
            "order": cache.order,
            "mask": mask,
            "fitted": bool(cache.fitted),
        }
    return {**fields, **{k: recipe.measured[k] for k in ("psnr", "psnr_other_seeds")}}


def beaten(rows: Mapping[str, Mapping[str, Any]], title: str) -> dict[str, Any]:
    """The best other row of this package that is as fast, and the quotient of squared errors.

    Of pictures that both have; 95 % interval of the quotient of means, by bootstrap over pictures.
    """
    own = rows[title]
    others = {
        t: row
        for t, row in rows.items()
        if row["group"] not in ("recipe", "peer")
        and row.get("counted_speedup", 0.0) >= 0.995 * own["counted_speedup"]
        and len(row["mse"]) >= len(own["mse"])
    }
    if not others:
        return {}
    values = {t: _errors(row, len(own["mse"])) for t, row in {**others, title: own}.items()}
    best = min(others, key=lambda t: statistics.fmean(values[t]))
    low, high = _interval(values[title], values[best])
    return {
        "best": best,
        "pictures": len(values[title]),
        "quotient": statistics.fmean(values[title]) / statistics.fmean(values[best]),
        "interval": [low, high],
    }


def _errors(row: Mapping[str, Any], seeds: int) -> list[float]:
    return [value for seed in row["mse"][:seeds] for value in seed]


def _interval(
    own: Sequence[float], other: Sequence[float], draws: int = 4000
) -> tuple[float, float]:
    rng, count = random.Random(0), len(own)
    found = []
    for _ in range(draws):
        picked = rng.choices(range(count), k=count)
        found.append(sum(own[i] for i in picked) / sum(other[i] for i in picked))
    found.sort()
    return found[round(0.025 * draws)], found[round(0.975 * draws)]
