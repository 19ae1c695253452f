"""What the functions of every setting must be: programs that trace and export."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from toma_fx.methods.setting import Setting

UNPORTABLE = ("scatter", "unique", "nonzero", "searchsorted", "one_hot", "rand", "index_put")


class Program(nn.Module):
    """All functions of a setting: tokens -> merged, positions, pattern, and what is unmerged."""

    def __init__(self, setting: Setting, *, unmerges: bool = True) -> None:
        super().__init__()
        self.setting, self.unmerges = setting, unmerges

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        setting = self.setting
        pattern = dict(zip(setting.chosen, setting.select(x), strict=True))
        pattern |= dict(zip(setting.weighed, setting.weights(x, pattern), strict=True))
        y = setting.merge(x, pattern)
        back = (setting.unmerge(y, pattern),) if self.unmerges else ()
        # an output may be no view of another, nor of an input
        return (y, setting.positions(pattern) + 0, *(part + 0 for part in pattern.values()), *back)


def check_traces(program: Program, x: Tensor) -> None:
    """The program traces on fake tensors into calls without side effects, and means the same."""
    with FakeTensorMode():
        traced = make_fx(program, pre_dispatch=True)(torch.empty(x.shape, dtype=x.dtype))
    calls = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
    assert {node.op for node in calls} == {"call_function"}
    for node in calls:
        if node.target is operator.getitem:
            continue
        assert not any(name in str(node.target) for name in UNPORTABLE), node
        assert not node.target._schema.is_mutable, node
    for got, expected in zip(traced(x), program(x), strict=True):
        torch.testing.assert_close(got, expected)


def check_onnx(program: Program, x: Tensor, path: Any) -> None:
    """ONNX Runtime computes the same, indices bit by bit."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    exported = torch.export.export(program.eval(), (x,))
    torch.onnx.export(exported, dynamo=True, opset_version=20, verbose=False).save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for got, expected in zip(outputs, program(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=1e-5)
