"""`toma_fx.quality`: the same prompts and seeds with and without acceleration, compared in pairs.

    draw, score and record every picture (each process its share) -> time in turn (the first process
    alone) -> merge the records, summarize, write the page

Pictures are rounded to 8 bits before they are scored, so that the scores are those of the PNG files
that are kept, and a run that was killed goes on from these.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toma_fx.capture.fingerprint import Fingerprint
from toma_fx.errors import TomaError
from toma_fx.files import write_file
from toma_fx.measure.cases import Case, batches_of, naming
from toma_fx.measure.configs import ORIGINAL, config_json, name_configs
from toma_fx.measure.environment import environment
from toma_fx.measure.gates import Gate, parse_gate
from toma_fx.measure.learned import Scorer, open_scorers
from toma_fx.measure.page import write_page
from toma_fx.measure.plots import write_plots
from toma_fx.measure.processes import Processes, joined
from toma_fx.measure.prompts import read_cases
from toma_fx.measure.records import Record, Records
from toma_fx.measure.results import (
    Quality,
    Scores,
    Speed,
    Spread,
    check_gates,
    compare_configs,
    summarize_config,
)
from toma_fx.measure.scores import METRICS, PLAIN, metric_of
from toma_fx.measure.subjects import Subject, subject_of
from toma_fx.measure.work import Times, count_work, time_generations

_log = logging.getLogger("toma_fx.measure")
Progress = Callable[[str, int], None]
"""Called with what is done next ("draw", "time") and how many units of it there are, or, with "",
how many units were finished."""


def quality(
    model: Any,
    prompts: Any,
    configs: Any,
    *,
    out: str | Path | None = None,
    metrics: Iterable[str] | Mapping[str, str | None] = tuple(PLAIN),
    require: Iterable[str | Gate] = (),
    rounds: int = 3,
    seed: int = 0,
    seeds: int = 1,
    limit: int | None = None,
    shown: int = 12,
    progress: Progress | None = None,
    **settings: Any,
) -> Quality:
    """Draw pictures with and without acceleration, and say how they differ and how fast they are.

    Args:
        model: a pipeline, an embedded model, or a `Subject`, which has its settings.
        prompts: see `read_cases`; as `seed`, `seeds` and `limit`.
        configs: {name: X}, a list of X, or one X: what `optimize(model, X)` takes.
        out: folder for records, pictures and the page; none is kept if not given. A run that broke
            off goes on there.
        metrics: names (`toma_fx.measure.scores.METRICS`), or {name: weights}, a folder or hub id.
        require: thresholds, as "psnr=28" (of the mean) or "ssim:worst=0.9"; see `Quality.passes`.
        rounds: generations that are timed of each; 0 for none.
        shown: pictures on the page, of each part. progress: is told what goes on.
        settings: fields of `Settings`: steps, guidance, height, width, batch, compile, ...

    Returns:
        The result; under `torchrun` or `accelerate launch` each process gets that of all.

    Raises:
        ConfigError: settings, prompts, metrics or configurations that can't be.
        ResultsError: `out` holds something else, or another process failed.
    """
    wanted = dict(metrics) if isinstance(metrics, Mapping) else dict.fromkeys(metrics)
    gates = [gate if isinstance(gate, Gate) else parse_gate(gate) for gate in require]
    for gate in gates:
        wanted.setdefault(gate.metric, None)
    for name in wanted:
        metric_of(name)
    named = name_configs(configs)
    cases = read_cases(prompts, seed=seed, seeds=seeds, limit=limit)
    subject = subject_of(model, settings)
    subject.check(cases)
    with joined() as processes, tempfile.TemporaryDirectory() as unkept:
        folder = Path(processes.told(unkept)) / "run" if out is None else Path(out)
        run = _Run(subject, cases, named, Records(folder, (ORIGINAL, *named), processes.rank))
        run.measure(processes, wanted, rounds, progress or (lambda what, count: None))
        result = run.result(gates, str(out or ""))
        if out is not None:
            processes.alone(lambda: _write(run, result, shown))
        processes.together(lambda: None)  # nobody leaves while another reads
    return result


def _write(run: _Run, result: Quality, shown: int) -> None:
    folder = run.records.folder
    write_file(folder / "report.json", result.to_json() + "\n")
    plots = write_plots(result, run.scores, folder)
    write_page(result, run.records, run.cases, plots, folder / "index.html", shown)


def describe_run(subject: Subject, cases: Sequence[Case]) -> dict[str, Any]:
    """What pictures depend on beside configurations, as JSON-able values."""
    keys = "\n".join(case.key for case in cases)
    denoisers = {n: asdict(Fingerprint.of(d)) for n, d in subject.denoisers.items()}
    fields = {
        "model": subject.name,
        "facts": subject.facts,
        "denoisers": denoisers,
        "settings": asdict(subject.settings),
        "pictures": len(cases),
        "prompts": hashlib.sha256(keys.encode()).hexdigest(),
    }
    settings: dict[str, Any] = json.loads(json.dumps(fields, default=repr))  # as read back
    return settings


@dataclass
class _Run:
    """One run in one process.

    Attributes:
        subject, cases, configs, records: what is drawn, and where it is kept.
        scorers, skipped: metrics, and reasons. speeds: by configuration. first: seconds of the
            first generation, by configuration.
    """

    subject: Subject
    cases: Sequence[Case]
    configs: Mapping[str, Any]
    records: Records
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What makes this run's results those of no other."""
        configs = {name: config_json(config) for name, config in self.configs.items()}
        return {**describe_run(self.subject, self.cases), "configs": configs}

    def measure(
        self,
        processes: Processes,
        metrics: Mapping[str, str | None],
        rounds: int,
        progress: Progress,
    ) -> None:
        """Draw and score this process's share, time in the first one, merge the records."""
        settings = self.settings()
        processes.alone(lambda: self.records.open(settings))
        processes.together(self.records.read)  # all of it before any process adds to it
        scorers, skipped = open_scorers(metrics, self.subject.device)
        for others in processes.gathered(skipped):  # one that a process lacks is skipped in all
            skipped = {**others, **skipped}
        self.scorers = {name: own for name, own in scorers.items() if name not in skipped}
        self.skipped = skipped
        batches = batches_of(self.cases, self.subject.settings.batch)
        own = batches[processes.rank :: processes.count]
        progress("draw", len(own) * (1 + len(self.configs)))
        processes.together(lambda: self._score(own, progress))
        processes.alone(self.records.merge)
        processes.together(self.records.read)
        if rounds:
            processes.alone(lambda: self._time(rounds, progress))
            self.speeds = processes.told(self.speeds)

    # -- pictures -------------------------------------------------------------------------------

    def _score(self, batches: Sequence[Sequence[int]], progress: Progress) -> None:
        for indices in batches:
            self._score_batch(indices, progress)

    def _score_batch(self, indices: Sequence[int], progress: Progress) -> None:
        """Draw, keep and score one batch with the original and every configuration."""
        for name in self.records.names:
            lacking = {i: self._lacking(i, name) for i in indices}
            if any(metrics is not None for metrics in lacking.values()):
                got, want = self._pictures(indices, name), self._pictures(indices, ORIGINAL)
                asked = dict.fromkeys(m for own in lacking.values() for m in own or ())
                self._record(indices, name, got, want, list(asked))
            progress("", 1)

    def _lacking(self, index: int, name: str) -> list[str] | None:
        """Metrics that a picture has no score of; None if nothing is to be done."""
        record = self.records.known.get((index, name))
        wanted = [m for m in self.scorers if name != ORIGINAL or not METRICS[m].paired]
        if record is None:
            return wanted
        return [m for m in wanted if m not in record.scores] or None

    def _record(
        self, indices: Sequence[int], name: str, got: Tensor, want: Tensor, metrics: list[str]
    ) -> None:
        cases = [self.cases[i] for i in indices]
        prompts = [case.prompt for case in cases]
        columns = {metric: self.scorers[metric](got, want, prompts) for metric in metrics}
        records = []
        for row, (index, case) in enumerate(zip(indices, cases, strict=True)):
            known = self.records.known.get((index, name))
            scores = dict(known.scores) if known else {}
            scores |= {metric: column[row] for metric, column in columns.items()}
            records.append(Record(index, name, case.prompt, case.seed, scores))
        self.records.add(records)

    def _pictures(self, indices: Sequence[int], name: str) -> Tensor:
        """Pictures [B, 3, H, W] of 8 bits in [0, 1], those kept or drawn now."""
        kept = [self.records.load_picture(i, name) for i in indices]
        if any(picture is None for picture in kept):
            drawn = self._draw([self.cases[i] for i in indices], name)
            for at, index in enumerate(indices):
                if kept[at] is None:
                    kept[at] = drawn[at]
                    self.records.save_picture(index, name, drawn[at])
        return torch.stack([picture for picture in kept if picture is not None])

    def _draw(self, cases: Sequence[Case], name: str) -> Tensor:
        """Pictures in 8 bits; the first time of a configuration is noted."""
        start = time.perf_counter()
        try:
            with naming(*cases):
                pictures = self.subject.draw(cases, self.configs.get(name))
        except TomaError as error:
            error.add_note(f"  configuration: {name}")
            raise
        self.first.setdefault(name, time.perf_counter() - start)
        if not bool(pictures.isfinite().all()):
            _log.warning("configuration %s draws values that are not finite; they are black", name)
        return (pictures.nan_to_num() * 255).round() / 255

    # -- speed ----------------------------------------------------------------------------------

    def _time(self, rounds: int, progress: Progress) -> None:
        """Time one batch with the original and every configuration, or read what was measured."""
        path = self.records.folder / "speed.json"
        cases = [self.cases[i] for i in batches_of(self.cases, self.subject.settings.batch)[0]]
        try:
            found = json.loads(path.read_text())
            if found["rounds"] == rounds:
                self.speeds = {name: Speed(**own) for name, own in found["speeds"].items()}
                return
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not measured yet, or broken off
        everyone = {ORIGINAL: None, **self.configs}
        progress("time", (rounds + 2) * len(everyone))
        work = {}
        for name, config in self.configs.items():
            start = time.perf_counter()
            work[name] = count_work(self.subject, cases, config)
            self.first.setdefault(name, time.perf_counter() - start)
        times = time_generations(
            self.subject, cases, everyone, rounds, lambda name: progress("", 1)
        )
        for name in self.configs:
            own = Times(self.first.get(name, times[name].first_s), times[name].seconds)
            self.speeds[name] = Speed.of(times[ORIGINAL], own, work[name])
        speeds = {name: asdict(speed) for name, speed in self.speeds.items()}
        write_file(path, json.dumps({"rounds": rounds, "speeds": speeds}, indent=2) + "\n")

    # -- result ---------------------------------------------------------------------------------

    @property
    def scores(self) -> dict[str, dict[str, dict[int, float]]]:
        """By configuration, metric and picture, of metrics that were asked for."""
        found: dict[str, dict[str, dict[int, float]]] = {name: {} for name in self.records.names}
        for (index, name), record in sorted(self.records.known.items(), key=lambda x: x[0][0]):
            for metric in self.scorers:
                if metric in record.scores:
                    found[name].setdefault(metric, {})[index] = record.scores[metric]
        return found

    def result(self, gates: Sequence[Gate], folder: str) -> Quality:
        """The summary of all records."""
        scores: dict[str, Scores] = dict(self.scores)
        original = scores.pop(ORIGINAL)
        configs = tuple(
            summarize_config(
                name, config_json(config), scores[name], original, self.speeds.get(name)
            )
            for name, config in self.configs.items()
        )
        return Quality(
            model=self.subject.name,
            pictures=len(self.cases),
            settings=json.loads(json.dumps(asdict(self.subject.settings), default=repr)),
            configs=configs,
            original={metric: Spread.of(metric, own) for metric, own in original.items()},
            comparisons=compare_configs(scores),
            checks=check_gates(gates, scores),
            skipped=self.skipped,
            environment=environment(self.subject.device),
            folder=folder,
        )
