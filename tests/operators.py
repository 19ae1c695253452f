"""Which operators models hold: `python -m tests.operators` writes `tests/data/operators.json`.

They are those of captured graphs, which the rules of the analysis are about: of the denoisers of
the matrix, and of the vision models of other packages. (Run with timm and torchvision installed.)
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.vision_models import MODELS
from tests.zoo import CASES
from toma_fx.capture.model import capture
from toma_fx.errors import TomaError
from toma_fx.graph.nodes import op_name

TABLE = Path(__file__).parent / "data" / "operators.json"


def sources() -> dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]]:
    """How to make every model, and arguments of a call, by name."""
    zoo = {f"zoo/{c.name}": lambda c=c: (c.build(), c.inputs(1)) for c in CASES}  # type: ignore[misc]
    vision = {
        f"{m.package}/{name}": lambda m=m: ((model := m.model()), m.inputs(model, 1))  # type: ignore[misc]
        for name, m in MODELS.items()
    }
    return {**zoo, **vision}


def operators_of(name: str) -> tuple[str, list[str]]:
    """Operators of a model's captured graph."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = sources()[name]()
    try:
        with torch.no_grad():
            graph = capture(model, (), inputs).graph_module.graph
    except TomaError:  # a case of the matrix that no export takes
        return name, []
    targets = {n.target for n in graph.nodes if n.op == "call_function"}
    return name, sorted(str(t) if "." in op_name(t) else op_name(t) for t in targets)


def main() -> int:
    """Capture all models in processes, and write the table."""
    table: dict[str, list[str]] = defaultdict(list)
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=40) as pool:
        for name, found in pool.imap(operators_of, sources()):
            for op in found:
                table[op].append(name)
    rows = [f"{json.dumps(op)}: {json.dumps(table[op])}" for op in sorted(table)]
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
