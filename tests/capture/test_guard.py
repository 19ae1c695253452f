"""Whatever a graph depends on is seen when it changes, and nothing else is."""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as TunedLinear
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from toma_fx.capture.guard import ModelGuard, Snapshot

Change = Callable[["Model"], Any]


class Curve:
    """Held by a helper."""

    def __init__(self) -> None:
        self.gamma = 2.0


class Processor:
    """A helper: acts in the forward pass, and is no module."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.curve = Curve()


class Block(nn.Module):
    """One of everything that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Identity())
        self.norm = nn.LayerNorm(4)
        self.gate = nn.Parameter(torch.ones(1))
        self.register_parameter("absent", None)
        self.register_buffer("shift", torch.zeros(1))
        self.processor = Processor()
        self.other = {"left": Processor()}
        self.flag, self.count, self.zero, self.none = True, 1, 0.0, None
        self.nan, self.name = math.nan, "plain"
        self.sizes: Any = [1, 2]
        self.nested: Any = {"a": {"b": [1.0, 2.0]}}
        self.blank: Any = []
        self.blank_table: Any = {}
        self.ordered: Any = OrderedDict(one=1, two=2)
        self.pair: Any = (1, [2])
        self.mixed: Any = [torch.zeros(1), [3]]
        self.tensors: Any = {"bias": torch.zeros(1)}
        self.modes: Any = {"fast", "exact"}
        self.array: Any = np.zeros(2000)
        self.function: Any = partial(torch.add, alpha=2)
        self.hidden: Any = [nn.Linear(1, 1)]
        self.lora_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.gate + self.shift


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    @property
    def block(self) -> Block:
        """The last one."""
        return self.blocks[-1]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def make_model() -> Model:
    return Model().eval().requires_grad_(False)


def rename_child(model: Model) -> None:
    model.block.layers._modules["last"] = model.block.layers._modules.pop("1")


def swap_attributes(model: Model) -> None:
    """One that does not count goes, one that counts comes: the number stays."""
    del model.block.lora_scale
    model.block.late = 1.0


def swap_items(model: Model) -> None:
    model.block.sizes[0], model.block.sizes[1] = model.block.sizes[1], model.block.sizes[0]


def copy_and_set(name: str, change: Callable[[Any], Any]) -> Change:
    """Replace a container by a changed copy."""

    def act(model: Model) -> None:
        value = copy.copy(getattr(model.block, name))
        change(value)
        setattr(model.block, name, value)

    return act


def assign(name: str, value: Any) -> Change:
    return lambda m: setattr(m.block, name, value)


CHANGES: dict[str, Change] = {
    # modules, parameters and buffers
    "a child is replaced": lambda m: setattr(m.block, "norm", nn.LayerNorm(4).eval()),
    "a child is replaced by none": lambda m: setattr(m.block, "norm", None),
    "a child is added": lambda m: m.block.add_module("late", nn.Identity()),
    "a leaf gets a child": lambda m: m.block.norm.add_module("late", nn.Identity()),
    "a child is removed": lambda m: delattr(m.block, "norm"),
    "a child is renamed": rename_child,
    "a block is appended": lambda m: m.blocks.append(Block()),
    "a parameter is replaced": lambda m: setattr(
        m.block.layers[0], "weight", nn.Parameter(torch.zeros(4, 4))
    ),
    "a number is replaced by an equal one": lambda m: setattr(
        m.block, "gate", nn.Parameter(torch.ones(1))
    ),
    "a parameter is removed": lambda m: setattr(m.block.layers[0], "bias", None),
    "a parameter is added": lambda m: m.block.register_parameter(
        "late", nn.Parameter(torch.ones(1))
    ),
    "a missing parameter comes": assign("absent", nn.Parameter(torch.ones(1))),
    "a leaf gets a parameter": lambda m: m.block.layers[1].register_parameter(
        "late", nn.Parameter(torch.ones(1))
    ),
    "a table of parameters is replaced": lambda m: setattr(
        m.block.norm, "_parameters", {"weight": None, "bias": None}
    ),
    "a buffer is replaced": lambda m: setattr(m.block, "shift", torch.zeros(1)),
    "a buffer is added": lambda m: m.block.register_buffer("late", torch.zeros(1)),
    # hooks and methods
    "a hook": lambda m: m.block.norm.register_forward_hook(lambda *_: None),
    "a hook before": lambda m: m.block.norm.register_forward_pre_hook(lambda *_: None),
    "a hook on the model": lambda m: m.register_forward_hook(lambda *_: None),
    "a forward of its own": lambda m: setattr(m.block, "forward", lambda x: x),
    "a forward of a container": lambda m: setattr(m.block.layers, "forward", lambda x: x),
    "a forward of an identity": lambda m: setattr(m.block.layers[1], "forward", lambda x: x),
    "a forward of the model": lambda m: setattr(m, "forward", lambda x: x),
    # attributes
    "a flag": assign("flag", False),
    "a flag becomes a number": assign("flag", 1),
    "a count becomes a float": assign("count", 1.0),
    "a count becomes a flag": assign("count", True),
    "the sign of zero": assign("zero", -0.0),
    "nan becomes a number": assign("nan", 0.0),
    "none becomes something": assign("none", 0),
    "a text": assign("name", "other"),
    "an attribute of a library module": lambda m: setattr(m.block.norm, "eps", 0.5),
    "an attribute of the model": lambda m: setattr(m, "late", 1),
    "training mode of one module": lambda m: m.block.norm.train(),
    "an attribute is added": assign("late", 1.0),
    "an attribute is removed": lambda m: delattr(m.block, "name"),
    "one attribute comes and one goes": swap_attributes,
    # containers
    "an item of a list": lambda m: m.block.sizes.__setitem__(0, 5),
    "an item becomes a flag": lambda m: m.block.sizes.__setitem__(0, True),
    "two items change places": swap_items,
    "a list grows": lambda m: m.block.sizes.append(3),
    "an empty list grows": lambda m: m.block.blank.append(1),
    "an empty table grows": lambda m: m.block.blank_table.update(a=1),
    "a list in a table in a table": lambda m: m.block.nested["a"]["b"].append(3.0),
    "a list in a pair": lambda m: m.block.pair[1].append(3),
    "a list becomes a pair": assign("sizes", (1, 2)),
    "an ordered table": lambda m: m.block.ordered.update(one=2),
    "a tensor in a list": lambda m: m.block.mixed.__setitem__(0, torch.zeros(1)),
    "a list beside a tensor": lambda m: m.block.mixed[1].append(4),
    "a tensor in a table": lambda m: m.block.tensors.update(bias=torch.zeros(1)),
    "a table loses a tensor": lambda m: m.block.tensors.clear(),
    "a set": lambda m: m.block.modes.add("third"),
    "a number in a large array": lambda m: m.block.array.__setitem__(1000, 1.0),
    "another list": copy_and_set("sizes", lambda v: v.append(3)),
    "another table": copy_and_set("ordered", lambda v: v.update(one=True)),
    "another array": copy_and_set("array", lambda v: v.__setitem__(1000, 1.0)),
    # helpers
    "an attribute of a helper": lambda m: setattr(m.block.processor, "scale", 0.5),
    "an attribute that a helper gets": lambda m: setattr(m.block.processor, "late", 1),
    "a helper of a helper": lambda m: setattr(m.block.processor.curve, "gamma", 3.0),
    "a function's argument": assign("function", partial(torch.add, alpha=3)),
    "a module in a list": lambda m: m.block.hidden.__setitem__(0, nn.Linear(1, 1)),
    "a helper in a table": lambda m: setattr(m.block.other["left"], "scale", 0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    model = make_model()
    guard = ModelGuard(model)
    assert guard.holds()
    CHANGES[name](model)
    assert not guard.holds()
    after = ModelGuard(model)
    assert after.holds()
    # buffers, and what hooks and methods do, may be taken over by a graph
    assert (after.key == guard.key) == (name == "a buffer is replaced")


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_where_attributes_have_no_versions(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Python 3.13.0, on any Python."""
    monkeypatch.setattr("toma_fx.capture.guard.versions_see_attributes", lambda: False)
    test_a_change_is_seen(name)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_by_comparing(name: str) -> None:
    """Also where something else was written, so that counters do not tell."""
    model = make_model()
    snapshot = Snapshot(model)
    model.block.lora_scale = 2.0
    assert not snapshot.is_untouched()
    assert Snapshot(model) == snapshot
    CHANGES[name](model)
    assert Snapshot(model) != snapshot


def rewrite(model: Model) -> None:
    """Everything is written again with equal values."""
    model.block.zero, model.block.nan = float("0"), float("nan")
    model.block.name = "".join(["pl", "ain"])
    model.block.sizes, model.block.nested = [1, 2], {"a": {"b": [1.0, 2.0]}}
    model.block.array = model.block.array.copy()
    model.block.processor.scale = float("1")


@torch.no_grad()
def multiply(model: Model) -> None:
    model.block.gate.mul_(2)
    model.block.shift.add_(1)
    model.block.layers[0].weight.data = torch.ones(4, 4)


def hook_and_remove(model: Model) -> None:
    model.block.norm.register_forward_hook(lambda *_: None).remove()


def patch_and_restore(model: Model) -> None:
    """As hooks do that put the forward of the class back into the object."""
    forward = model.block.forward
    model.block.forward = lambda x: x
    model.block.forward = forward


def change_and_return(model: Model) -> None:
    model.block.count, model.block.flag = 2, False
    model.block.count, model.block.flag = 1, True


def replace_and_return(model: Model) -> None:
    norm = model.block.norm
    model.block.norm = nn.Identity()
    model.block.norm = norm


UNCHANGED: dict[str, Change] = {
    "nothing": lambda m: None,
    "a call": lambda m: m(torch.ones(1, 4)),
    "values in tensors": multiply,
    "evaluation mode again": lambda m: m.eval(),
    "the mode of containers": lambda m: setattr(m.block.layers, "training", True),
    "the same values again": rewrite,
    "there and back": change_and_return,
    "a child there and back": replace_and_return,
    "a hook that goes again": hook_and_remove,
    "a forward that is put back": patch_and_restore,
    "history": lambda m: (setattr(m.block, "lora_scale", 0.5), setattr(m, "_safe_fusing", True)),
    "offloading around the model": lambda m: setattr(m, "_hf_hook", Processor()),
    "saving": lambda m: m.state_dict(),
    "a copy": copy.deepcopy,
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_no_change_is_seen(name: str) -> None:
    model = make_model()
    guard = ModelGuard(model)
    UNCHANGED[name](model)
    assert guard.holds()
    assert ModelGuard(model).key == guard.key
    model.block.count += 1
    assert not guard.holds(), "what was written is watched where it is now"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.block.sizes.append(3),
        lambda m: m.block.nested["a"].update(b=[]),
        lambda m: setattr(m.block.processor, "scale", 2.0),
        lambda m: m.block.array.__setitem__(0, 1.0),
    ],
)
def test_containers_that_were_replaced_by_equal_ones_are_watched(change: Change) -> None:
    model = make_model()
    guard = ModelGuard(model)
    rewrite(model)
    assert guard.holds()
    change(model)
    assert not guard.holds()


def test_a_state_that_comes_back_has_its_key_again() -> None:
    model = make_model()
    first = ModelGuard(model)
    model.block.count = 2
    second = ModelGuard(model)
    assert second.key != first.key
    assert not first.holds()
    model.block.count = 1
    assert first.holds()
    assert not second.holds()
    assert ModelGuard(model).key == first.key


def test_what_is_alike_shares_graphs() -> None:
    """Helpers, and modules without parameters, count by what they are."""
    model = make_model()
    guard = ModelGuard(model)
    model.block.processor = Processor()
    model.block.layers[1] = nn.Identity().eval()
    model.block.other = {"left": Processor()}
    assert not guard.holds()
    assert ModelGuard(model).key == guard.key


def tuned() -> tuple[Model, TunedLinear]:
    """With the adapters a and b on one layer; a acts."""
    model = make_model()
    for name in "ab":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["layers.0"]), model, name)
    layer: Any = model.block.layers[0]
    layer.set_adapter("a")
    return model.eval(), layer


ADAPTERS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "another acts": (lambda layer: layer.set_adapter("b"), True),
    "both act": (lambda layer: layer.set_adapter(["a", "b"]), True),
    "a scale": (lambda layer: layer.set_scale("a", 0.5), True),
    "a scale that is equal but no float": (lambda layer: layer.scaling.update(a=4), True),
    "switched off": (lambda layer: layer.enable_adapters(False), True),
    "fused": (lambda layer: layer.merge(), True),
    "a weight is replaced": (
        lambda layer: setattr(layer.lora_A["a"], "weight", nn.Parameter(torch.ones(2, 4))),
        True,
    ),
    "removed": (lambda layer: layer.delete_adapter("a"), True),
    "the scale of one that does not act": (lambda layer: layer.set_scale("b", 0.5), False),
    "one that does not act is removed": (lambda layer: layer.delete_adapter("b"), False),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str) -> None:
    model, layer = tuned()
    guard = ModelGuard(model)
    change, acts = ADAPTERS[name]
    change(layer)
    assert not guard.holds()
    assert (ModelGuard(model).key != guard.key) == acts


def test_adapters_set_to_what_they_are() -> None:
    model, layer = tuned()
    guard = ModelGuard(model)
    layer.set_adapter("".join("a"))
    layer.set_scale("a", 1.0)
    assert guard.holds()
    layer.merge()
    assert not guard.holds()
    layer.unmerge()
    assert guard.holds()


def test_containers_that_hold_themselves() -> None:
    model = make_model()
    model.block.nested["self"] = model.block.nested
    model.block.mixed.append(model.block.mixed)
    guard = ModelGuard(model)
    assert guard.holds()
    assert ModelGuard(model).key == guard.key
    model.block.mixed.append(1)
    assert not guard.holds()
    assert ModelGuard(model).key != guard.key


def test_writes_while_another_thread_asks() -> None:
    """A guard that holds saw the last write, or none."""
    model = make_model()
    guard, done, seen = ModelGuard(model), threading.Event(), []

    def write() -> None:
        for i in range(3000):
            setattr(model.block, f"late{i % 7}", 1)
            delattr(model.block, f"late{i % 7}")
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        seen.append(guard.holds())
    thread.join()
    assert seen
    assert guard.holds()
    model.block.late = 1
    assert not guard.holds()


@pytest.mark.parametrize("around", ["nothing", "a cache context", "offload"])
@torch.no_grad()
def test_steps_write_nothing(around: str) -> None:
    """Counters are enough at a step: the model is walked when it is captured, not again."""
    model = denoisers.flux(num_layers=1, num_single_layers=1)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "a")
    model.eval()
    if around == "offload":
        cpu_offload_with_hook(model, "cpu")
    optimized = toma_fx.optimize(model, min_tokens=60, tile=4)
    context = optimized.cache_context if around == "a cache context" else nullcontext
    snapshots = []
    for step in range(5):
        with context("cond"):
            optimized(**denoisers.flux_inputs(8, 8, batch=1, timestep=0.9 - step / 20))
        snapshots.append(optimized._guard._snapshot)
    assert optimized.totals == {"refresh": 1, "reuse": 4}
    # capturing, in step 0, moved parameters out and back in
    assert snapshots[1] is snapshots[2] is snapshots[3] is snapshots[4]
