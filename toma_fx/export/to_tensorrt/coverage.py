"""What TensorRT can take of a program, read from tables: nothing of TensorRT is imported.

Two ways lead to an engine, and each has a table of what it takes, made by tools/renew_tables.py:

    torch.export program -> Torch-TensorRT's converters    tables/torch_tensorrt.json
    ONNX file -> the ONNX parser of TensorRT               tables/onnx_tensorrt.json

A table says which operators are known. Converters and the parser also look at how an operator is
used: the rules here repeat what they look at, where our programs meet it. What a table can't say at
all (control flow, shapes, ranks, versions) is asked by named checks, `TRAPS`.

A coverage is a prediction. Only a build shows that TensorRT finds a kernel for everything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from toma_fx.errors import BuildError
from toma_fx.run.printable import Printable

Verdict = Literal["taken", "folded", "conditional", "refused", "missing"]
"""taken: converted, decomposed or removed by name. folded: computed at build time. conditional: it
depends on what no rule here looks at. refused: known, but not as it is used. missing: unknown."""
TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Location:
    """A node: its name in the graph, and the path of the module that it came from ("" if none)."""

    node: str
    module: str

    def __str__(self) -> str:
        return f"{self.module}: {self.node}" if self.module else self.node


@dataclass(frozen=True)
class OpRow:
    """One operator of a program and one thing to say about it.

    Attributes:
        name: as "aten.add.Tensor", or the ONNX operator type, with its domain unless ONNX's own.
        count: nodes that this holds for. verdict: whether TensorRT takes them.
        note: how, or why not. locations: the nodes, if they are not taken.
    """

    name: str
    count: int
    verdict: Verdict
    note: str
    locations: tuple[Location, ...] = ()


@dataclass(frozen=True)
class Finding:
    """Something that a check of `TRAPS` found.

    Attributes:
        trap: name of the check. location: where. detail: what is there.
        fatal: whether no engine can be made of it; otherwise it makes a worse one.
    """

    trap: str
    location: Location
    detail: str
    fatal: bool = True


@dataclass(frozen=True)
class Coverage(Printable):
    """What TensorRT takes of a program; prints as a table, converts to JSON.

    Attributes:
        target: "torch-tensorrt" or "onnx-tensorrt". version: of the table that was asked.
        source: what the table was made from.
        ops: what is not taken first. findings: of the checks.
    """

    target: Literal["torch-tensorrt", "onnx-tensorrt"]
    version: str
    source: str
    ops: tuple[OpRow, ...]
    findings: tuple[Finding, ...]

    @property
    def uncovered(self) -> tuple[OpRow, ...]:
        """Operators that TensorRT does not take."""
        return tuple(row for row in self.ops if row.verdict in ("missing", "refused"))

    @property
    def complete(self) -> bool:
        """Whether nothing known speaks against one engine for the whole program."""
        return not self.uncovered and not any(f.fatal for f in self.findings)

    def to_json(self) -> str:
        """The coverage as JSON text."""
        return json.dumps({**asdict(self), "complete": self.complete}, indent=2)

    def _renderables(self) -> list[Any]:
        table = Table(title=f"operators for {self.target}", title_justify="left", box=SIMPLE)
        table.add_column("operator", no_wrap=True)
        table.add_column("nodes", justify="right")
        table.add_column("verdict", no_wrap=True)
        for name in ("note", "where"):
            table.add_column(name, overflow="fold")
        for row in self.ops:
            where = _listed(row.locations, 3)
            table.add_row(row.name, str(row.count), row.verdict, row.note, where)
        nodes = sum(row.count for row in self.ops)
        left = sum(row.count for row in self.uncovered)
        words = "every operator is taken" if not left else f"{left} of {nodes} nodes are not taken"
        parts: list[Any] = [table, Text(f"{words}, by the table of {self.version} ({self.source})")]
        if self.findings:
            found = Table(title="checks", title_justify="left", box=SIMPLE)
            for name in ("check", "where", "what"):
                found.add_column(name, overflow="fold")
            for f in self.findings:
                kind = f.trap if f.fatal else f"{f.trap} (no obstacle)"
                found.add_row(kind, str(f.location), f.detail)
            parts.append(found)
        return parts


def require(coverage: Coverage) -> None:
    """Passes if nothing known speaks against one engine for the whole program.

    Raises:
        BuildError: names every operator that is not taken and every check that failed, each with
            its nodes and their modules.
    """
    if coverage.complete:
        return
    lines = [f"{r.name} ({r.note}) at {_listed(r.locations, 5)}" for r in coverage.uncovered]
    lines += [f"{f.trap} ({f.detail}) at {f.location}" for f in coverage.findings if f.fatal]
    raise BuildError(
        "TensorRT does not take the whole program",
        where="; ".join(lines),
        expected=f"only what {coverage.target} {coverage.version} takes",
        got=f"{sum(r.count for r in coverage.uncovered)} nodes that it does not take"
        if coverage.uncovered
        else "operators that it takes, used as it can't",
        hint="another method or other options of it, or another target, for instance aoti",
    )


def _listed(locations: Sequence[Location], most: int) -> str:
    shown = ", ".join(str(x) for x in locations[:most])
    return f"{shown} and {len(locations) - most} more" if len(locations) > most else shown


def op_rows(found: Mapping[tuple[str, Verdict, str], Sequence[Location]]) -> tuple[OpRow, ...]:
    """Rows of operators, the worst verdicts first."""
    order = ("missing", "refused", "conditional", "taken", "folded")
    rows = [
        OpRow(name, len(at), verdict, note, () if verdict in ("taken", "folded") else tuple(at))
        for (name, verdict, note), at in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: (order.index(row.verdict), row.name, row.note)))


def load_table(name: str) -> dict[str, Any]:
    """A table of this package: "torch_tensorrt" or "onnx_tensorrt"."""
    loaded = json.loads((TABLES / f"{name}.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


P = TypeVar("P")


@dataclass(frozen=True)
class Trap(Generic[P]):
    """A named check over a whole program: what it is about, and what finds it."""

    name: str
    about: str
    find: Callable[[P], Iterator[tuple[Location, str]]]
    fatal: bool = True

    def findings(self, program: P) -> Iterator[Finding]:
        """What it finds in a program."""
        for location, detail in self.find(program):
            yield Finding(self.name, location, detail, self.fatal)
