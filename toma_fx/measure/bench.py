"""`toma-fx bench`: how fast a user's own model is, eager, compiled and accelerated.

Everything runs in one process, in turn, round after round, so that slow changes of the machine meet
all alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from toma_fx.errors import ConfigError
from toma_fx.measure.cases import Case
from toma_fx.measure.configs import ORIGINAL, config_json, name_configs
from toma_fx.measure.environment import environment
from toma_fx.measure.subjects import Subject, subject_of
from toma_fx.measure.work import NOISY, Times, Work, count_work, drawing, time_in_turn
from toma_fx.methods.checks import check_choice
from toma_fx.run.printable import Printable

MODES = ("eager", "compiled")


@dataclass(frozen=True)
class BenchRow:
    """Whole generations of one batch, in one mode.

    Attributes:
        config: name, or "original". mode: "eager" or "compiled". median_s, low_s, high_s: median
            and quartiles. speedup: over the original in the same mode. ideal_speedup: from counted
            FLOPs of the denoisers. compile_s: what the first generation took longer. kept_bytes:
            most that is kept between steps. noisy: whether the times scatter too much.
    """

    config: str
    mode: str
    median_s: float
    low_s: float
    high_s: float
    speedup: float
    ideal_speedup: float
    compile_s: float
    kept_bytes: int
    noisy: bool

    @classmethod
    def of(cls, key: tuple[str, str], times: Times, original: Times, work: Work) -> BenchRow:
        """From times taken in turn; `key` is (configuration, mode)."""
        low, high = times.quartiles
        return cls(
            *key,
            times.median_s,
            low,
            high,
            original.median_s / times.median_s,
            work.ideal_speedup,
            times.compile_s,
            work.kept_bytes,
            times.noisy,
        )

    @property
    def quotient(self) -> float:
        """Share of the ideal speed-up that is measured."""
        return self.speedup / self.ideal_speedup


@dataclass(frozen=True)
class Bench(Printable):
    """What `bench` returns; prints as a table, converts to JSON.

    Attributes:
        model: name. rows: in the order measured. rounds: that count. settings, configs: of the
            runs. environment: versions and device.
    """

    model: str
    rows: tuple[BenchRow, ...]
    rounds: int
    settings: Mapping[str, Any]
    configs: Mapping[str, Any]
    environment: Mapping[str, str]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the figures doubtful."""
        return tuple(
            f"{row.config}, {row.mode}: quartiles are {(row.high_s - row.low_s) / row.median_s:.0%}"
            f" of the median apart (more than {NOISY:.0%}); the machine is too noisy for small "
            "differences"
            for row in self.rows
            if row.noisy
        )

    def to_json(self) -> str:
        """All of it as JSON text."""
        rows = [{**asdict(row), "quotient": row.quotient} for row in self.rows]
        return json.dumps({**asdict(self), "rows": rows, "warnings": self.warnings}, indent=2)

    def _renderables(self) -> list[Any]:
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        title = f"{self.model}: {self.settings['steps']} steps, batch {self.settings['batch']}"
        table = Table(title=title, title_justify="left", box=SIMPLE)
        table.add_column("configuration", overflow="fold")
        for name in ("mode", "median", "speed-up", "ideal", "of ideal", "kept", "compile"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.config,
                row.mode,
                f"{row.median_s:.3f} s\n({row.low_s:.3f} to {row.high_s:.3f})",
                f"{row.speedup:.2f}x",
                f"{row.ideal_speedup:.2f}x",
                f"{row.quotient:.0%}",
                f"{row.kept_bytes / 1e6:.1f} MB",
                f"{row.compile_s:.1f} s",
            )
        return [table, *(Text(f"warning: {text}") for text in self.warnings)]


def bench(
    model: Any,
    configs: Any,
    *,
    prompt: str | None = None,
    modes: Sequence[str] = MODES,
    rounds: int = 7,
    on_run: Callable[[int], None] | None = None,
    **settings: Any,
) -> Bench:
    """Time whole generations of a model: the original and every configuration, in every mode.

    Args:
        model: a pipeline or an embedded model. configs: as for `toma_fx.quality`.
        prompt: what is drawn; "a photo" if not given, of embedded models one that they know.
        modes: "eager", "compiled". rounds: that count. on_run: called after each generation with
            how many there are. settings: fields of `Settings` except `compile`.

    Raises:
        ConfigError: settings or configurations that can't be.
    """
    for mode in modes:
        check_choice("modes", mode, MODES)
    if isinstance(model, Subject) or "compile" in settings:
        raise ConfigError(
            "bench chooses itself what is compiled",
            where="bench",
            expected="a pipeline or an embedded model, and modes=",
            got="a Subject" if isinstance(model, Subject) else "compile=",
        )
    named = {ORIGINAL: None, **name_configs(configs)}
    subjects = {m: subject_of(model, {**settings, "compile": m == "compiled"}) for m in modes}
    own = next(iter(subjects.values()))
    cases = [Case(prompt or own.example_prompt, i) for i in range(own.settings.batch)]
    keys = [(name, mode) for mode in modes for name in named]
    runs = {f"{n} {m}": drawing(subjects[m], cases, named[n]) for n, m in keys}
    total = (rounds + 2) * len(runs)
    times = time_in_turn(
        runs, rounds, own.device, None if on_run is None else lambda name: on_run(total)
    )
    work = {n: count_work(own, cases, c) if n != ORIGINAL else Work(1, 1, {}, 0)
            for n, c in named.items()}  # fmt: skip
    rows = tuple(
        BenchRow.of((n, m), times[f"{n} {m}"], times[f"{ORIGINAL} {m}"], work[n]) for n, m in keys
    )
    return Bench(
        own.name,
        rows,
        rounds,
        json.loads(json.dumps(asdict(own.settings), default=repr)),
        {name: config_json(config) for name, config in named.items() if config is not None},
        environment(own.device),
    )
