"""`toma_fx.generate`: the pictures of many prompts, drawn with a recipe by any number of processes.

    read the prompts -> check that the folder is of this run -> draw the batches of this shard that
    the folder lacks -> once every picture is there, write them in order into `pictures.jsonl`

The processes share a folder, and nothing else. Which pictures are drawn in one call depends on the
prompts and `batch` alone, so the pictures do not depend on how many processes there are.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toma_fx.measure.cases import Case, batches_of, naming
from toma_fx.measure.configs import ORIGINAL, config_json, resolve_config
from toma_fx.measure.environment import versions
from toma_fx.measure.prompts import read_cases
from toma_fx.measure.quality import Progress, describe_run
from toma_fx.measure.records import open_folder
from toma_fx.measure.subjects import Subject, subject_of
from toma_fx.methods.recipe import Recipe
from toma_fx.offline.ledger import Ledger
from toma_fx.offline.shards import Shard

_log = logging.getLogger("toma_fx.offline")
PACKAGES = ("toma-fx", "torch", "diffusers", "transformers", "accelerate", "peft", "triton",
            "pillow")  # fmt: skip
"""Packages on whose versions pictures depend."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a folder holds after a process drew its share.

    Attributes:
        folder: of the pictures. shard: of this process. pictures: of the run. present: pictures in
            the folder, of all shards. drawn: by this call. not_finite: pictures of which some
            values were no numbers. seconds: of this call, with captures.
        digest: of `pictures.jsonl`, and so of all pictures; "" while some lack.
    """

    folder: str
    shard: str
    pictures: int
    present: int
    drawn: int
    not_finite: int
    seconds: float
    digest: str

    @property
    def complete(self) -> bool:
        """Whether every picture is there."""
        return self.present == self.pictures

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {**dataclasses.asdict(self), "complete": self.complete}

    def __str__(self) -> str:
        lines = [
            f"shard {self.shard}: drew {self.drawn} pictures in {self.seconds:.1f} s",
            f"{self.folder}: {self.present} of {self.pictures} pictures",
        ]
        if self.not_finite:
            lines.append(f"{self.not_finite} pictures have values that are not finite")
        return "\n".join(lines + [f"digest: {self.digest}"] * self.complete)


def generate(
    model: Any,
    prompts: Any,
    recipe: Any,
    *,
    out: str | Path,
    shard: Any = None,
    seed: int = 0,
    seeds: int = 1,
    limit: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Generated:
    """Draw the pictures of many prompts into a folder, or this process's share of them.

    A run that was killed goes on: what the folder holds is not drawn again.

    Args:
        model: a pipeline, an embedded model, or a `Subject`, which has its settings.
        prompts: a file, or a sequence; see `read_cases`, as `seed`, `seeds` and `limit`: what gives
            no seed gets `seed` plus its index.
        recipe: what `optimize(model, X)` takes, or as the command line says it (a preset, a method,
            METHOD:FIELD=VALUE,..., a file); None or "original" for the model as it is.
        out: folder, which processes of any number of shards may share.
        shard: "I/N" or (I, N), from 0; by default that of `torchrun` (RANK, WORLD_SIZE), or 0/1.
        progress: is told of pictures of all shards.
        settings: fields of `Settings`: steps, guidance, height, width, batch, compile, ...

    Raises:
        ConfigError: settings, prompts or a recipe that can't be; lines are named.
        ResultsError: `out` holds something else, or a run with other settings, which are named; or
            another process draws this shard. As `optimize`.
    """
    config, own = recipe_of(recipe), Shard.of(shard)
    cases = read_cases(prompts, seed=seed, seeds=seeds, limit=limit, least=1)
    subject = subject_of(model, settings)
    subject.check(cases)
    folder = Path(out)
    start = time.perf_counter()
    open_folder(folder, {**_settings(subject, cases, config), "seed": seed, "seeds": seeds})
    batches = batches_of(cases, subject.settings.batch)[own.index :: own.count]
    told = progress or (lambda what, count: None)
    drawn = 0
    with Ledger.held(folder, len(cases), own) as (ledger, path):
        told("draw", len(cases))
        told("", len(ledger.known))
        for batch in batches:
            if ledger.lacking(batch):
                told("", ledger.refresh())  # another process may have drawn it meanwhile
            if lacking := ledger.lacking(batch):
                with naming(*(cases[index] for index in batch)):
                    pictures = subject.draw([cases[index] for index in batch], config)
                kept = dict(zip(batch, pictures, strict=True))
                ledger.save(path, {index: kept[index] for index in lacking}, cases)
                drawn += len(lacking)
                told("", ledger.refresh())
        ledger.refresh()
        digest = ledger.finish()
    bad = sum(not picture.finite for picture in ledger.known.values())
    if bad:
        _log.warning("%d pictures have values that are not finite; these are black", bad)
    seconds = time.perf_counter() - start
    present = len(ledger.known)
    return Generated(str(out), str(own), len(cases), present, drawn, bad, seconds, digest)


def recipe_of(recipe: Any) -> Any:
    """The configuration of a recipe, as `generate` takes it; None for the original."""
    if recipe is None or (isinstance(recipe, str) and recipe == ORIGINAL):
        return None
    return resolve_config(recipe, "recipe")


def _settings(subject: Subject, cases: Sequence[Case], config: Any) -> dict[str, Any]:
    """What the pictures depend on."""
    if isinstance(config, Recipe):
        config = dataclasses.replace(config, measured={})
    return {
        **describe_run(subject, cases),
        "recipe": ORIGINAL if config is None else config_json(config),
        "device": subject.device.type,
        "versions": versions(PACKAGES),
        "seed_rule": "the line's own, or seed + index; further pictures of a prompt add the number "
        "of prompts",
    }
