"""Every private name that the package uses still means what it did.

One test each. When an upgrade fails one of them, its function in `toma_fx/compat/` is the place
to mend.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Set
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from toma_fx.compat import collectives, compilers, libraries, lookup, pytorch, tracebacks
from toma_fx.errors import CompatError, TomaError
from toma_fx.graph.nodes import op_name, source_line

ROOT = Path(__file__).parent.parent


class Toy(nn.Module):
    """One of everything that a module can own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.zeros(2))
        self.register_parameter("missing", None)

    def forward(self, x: Tensor, timestep: float = 1.0) -> Tensor:
        return self.linear(x) * self.scale + self.shift * timestep


def dynamo_graph(model: nn.Module, *args: Any, read: Any) -> list[Any]:
    """What `read` returns for Dynamo's graph of a call, while Dynamo compiles it."""
    found: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        found.append(read(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*args)
    assert len(found) == 1
    return found[0]


# -- a name that is gone --------------------------------------------------------------------------


def test_a_missing_name_says_which_and_in_which_version() -> None:
    with pytest.raises(CompatError) as error:
        lookup.lookup("torch._dynamo", "teleport")
    assert isinstance(error.value, TomaError)
    assert "torch._dynamo.teleport" in error.value.what
    assert error.value.where == f"torch {metadata.version('torch')}"
    (tested,) = (r for r in metadata.requires("toma-fx") or () if re.match("torch[<>=]", r))
    assert error.value.expected.endswith(tested)
    assert "toma_fx/compat/" in error.value.hint


def test_a_missing_module_is_a_missing_name() -> None:
    with pytest.raises(CompatError, match=r"torch\._teleport\.beam"):
        lookup.lookup("torch._teleport", "beam")


def test_a_missing_attribute_names_its_owner() -> None:
    with pytest.raises(CompatError, match=r"no Linear\._teleport"):
        lookup.attribute("torch", nn.Linear(1, 1), "_teleport")


# -- dictionaries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dict, OrderedDict, lambda a: vars(SimpleNamespace(a=a))])
def test_every_write_to_a_dictionary_has_a_version(make: Any) -> None:
    version, table = pytorch.dict_version(), make(a=1)
    writes: list[Callable[[], Any]] = [
        lambda: table.update(a=2),
        lambda: table.__setitem__("a", True),
        lambda: table.setdefault("b", 1),
        lambda: table.pop("b"),
        lambda: table.clear(),
        # not `update`: from Python 3.12 on an empty dictionary takes another one over untold. The
        # guard asks of those that were empty whether they still are
        lambda: table.__setitem__("a", 2),
        lambda: table.popitem(),
    ]
    seen = [version(table)]
    for write in writes:
        assert version(table) == seen[-1], "reading is no write"
        write()
        seen.append(version(table))
        assert seen[-1] > seen[-2]


def test_attributes_that_are_set_have_a_version() -> None:
    """In a loop, too, where the interpreter has ways of its own to set them."""
    if not pytorch.versions_see_attributes():
        assert sys.version_info >= (3, 13), "what the guard has another way for"
        return
    version, module = pytorch.dict_version(), Toy()
    plain = SimpleNamespace(scale=0.0)
    for owner in (module.linear, plain):
        seen = [version(vars(owner))]
        for i in range(200):
            owner.eps = float(i)
            seen.append(version(vars(owner)))
        del owner.eps
        seen.append(version(vars(owner)))
        assert all(later > before for before, later in pairwise(seen))
    tables = [*pytorch.module_tables(module.linear), *pytorch.hook_tables(module.linear)]
    before = [version(table) for table in tables]
    module.linear.weight = nn.Parameter(torch.zeros(2, 2))
    module.linear.register_buffer("shift", torch.zeros(2))
    module.linear.add_module("inner", nn.Identity())
    module.linear.register_forward_hook(lambda *_: None)
    module.linear.register_forward_pre_hook(lambda *_: None)
    assert all(version(table) > b for table, b in zip(tables, before, strict=True))


# -- nested values --------------------------------------------------------------------------------


def nested() -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    return {"a": [1, (2, None)], "b": UNet2DConditionOutput(sample=torch.ones(1))}


def test_leaves_are_those_of_containers_and_of_outputs_of_diffusers() -> None:
    leaves, _ = pytorch.tree_flatten(nested())
    assert leaves[:3] == [1, 2, None]
    assert torch.equal(leaves[3], torch.ones(1))
    assert len(leaves) == len(pytorch.tree_leaves(nested())) == 4


def test_unflatten_is_the_inverse() -> None:
    leaves, structure = pytorch.tree_flatten(nested())
    again = pytorch.tree_unflatten(leaves, structure)
    assert again["a"] == [1, (2, None)]
    assert type(again["b"]) is type(nested()["b"])


def test_map_keeps_the_structure() -> None:
    assert pytorch.tree_map(lambda x: x + 1, {"a": [1, (2,)]}) == {"a": [2, (3,)]}


def test_paths_are_keys_and_indices() -> None:
    paths = pytorch.tree_paths(((7,), {"x": {"ids": [8]}, "y": None}))
    assert paths == [(("0", "0"), 7), (("1", "x", "ids", "0"), 8), (("1", "y"), None)]


# -- tensors and operators ------------------------------------------------------------------------


def test_fake_tensors_have_no_data() -> None:
    program = torch.export.export(Toy().eval(), (torch.ones(1, 2),), strict=False)
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "call_function"]
    assert values
    assert all(pytorch.is_fake(v) for v in values)
    assert not pytorch.is_fake(torch.ones(1))
    assert not pytorch.is_fake(torch.ones(1, device="meta"))
    assert not pytorch.is_fake(None)


def test_fake_tensors_forget_the_real_ones() -> None:
    model = Toy().eval()
    program = torch.export.export(model, (torch.ones(1, 2),), strict=False)
    assert weakref.getweakrefcount(model.scale) == 1
    pytorch.forget_tensors(n.meta.get("val") for n in program.graph.nodes)
    assert weakref.getweakrefcount(model.scale) == 0
    mode = FakeTensorMode()
    mode.from_tensor(model.scale)
    assert weakref.getweakrefcount(model.scale) == 1
    pytorch.forget_tensors([1, None, mode])
    assert weakref.getweakrefcount(model.scale) == 0


def test_inner_tensors_of_a_quantized_weight() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Linear(64, 64).eval()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    inner = pytorch.inner_tensors(model.weight)
    assert any(x.dtype == torch.int8 and x.numel() == 64 * 64 for x in inner if x is not None)
    assert pytorch.inner_tensors(torch.ones(1)) == []


def test_operators_are_overloads() -> None:
    assert pytorch.is_operator(torch.ops.aten.add.Tensor)
    assert torch.ops.aten.add.Tensor.name() == "aten::add.Tensor"
    assert not pytorch.is_operator(torch.ops.aten.add)
    assert not pytorch.is_operator(torch.add)


def test_higher_order_operators_take_graphs() -> None:
    assert pytorch.is_higher_order(torch.ops.higher_order.cond)
    assert not pytorch.is_higher_order(torch.ops.aten.add.Tensor)


def test_operators_that_write() -> None:
    assert pytorch.writes_in_place(torch.ops.aten.add_.Tensor)
    assert pytorch.writes_in_place(torch.ops.aten.add.out)
    assert not pytorch.writes_in_place(torch.ops.aten.add.Tensor)
    assert not pytorch.writes_in_place(torch.add)


def test_gradient_switch_is_what_dynamo_calls() -> None:
    class Switching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return x + 1

    targets = dynamo_graph(
        Switching(), torch.ones(1), read=lambda gm, _: [n.target for n in gm.graph.nodes]
    )
    assert pytorch.gradient_switch() in targets


def test_tensor_constructors_are_what_dynamo_calls() -> None:
    class Making(nn.Module):
        def forward(self, x: Tensor, t: int) -> Tensor:
            return x + torch.tensor([t], dtype=torch.float32)

    def targets(gm: fx.GraphModule, _: Any) -> list[Any]:
        return [n.target for n in gm.graph.nodes if n.op == "call_function"]

    with torch._dynamo.config.patch(specialize_int=False, assume_static_by_default=False):
        found = dynamo_graph(Making(), torch.ones(3), 5, read=targets)
    assert set(found) & set(pytorch.tensor_constructors())


def test_decompositions_of_the_table_and_of_composite_operators() -> None:
    asked = torch.ops.aten.native_layer_norm.default
    chosen = pytorch.decompositions([asked])
    assert asked in chosen
    assert torch.ops.aten.linear.default in chosen  # composite
    assert torch.ops.aten.native_group_norm.default not in chosen  # not asked for
    program = torch.export.export(nn.LayerNorm(4).eval(), (torch.ones(2, 4),), strict=False)
    lowered = program.run_decompositions(chosen)
    assert torch.ops.aten.rsqrt.default in {n.target for n in lowered.graph.nodes}


# -- modules and graphs ---------------------------------------------------------------------------


def test_tables_are_the_modules_own() -> None:
    model = Toy()
    children, parameters, buffers = pytorch.module_tables(model)
    assert list(children) == ["linear"]
    assert list(parameters) == ["scale", "missing"]
    buffers["shift"] = torch.ones(2)
    assert torch.equal(model.shift, torch.ones(2))


def test_shared_tables_follow_the_model() -> None:
    model, view = Toy(), nn.Module()
    pytorch.share_tables(view, model)
    model.extra = nn.Linear(1, 1)
    assert view.extra is model.extra
    assert view.state_dict().keys() == model.state_dict().keys()


def test_hook_tables_are_the_modules_own() -> None:
    model = Toy()
    after, before = pytorch.hook_tables(model)
    assert not after
    assert not before
    model.register_forward_hook(print)
    model.register_forward_pre_hook(repr)
    assert list(after.values()) == [print]
    assert list(before.values()) == [repr]


def test_module_fields_are_no_attributes_of_the_model() -> None:
    model = Toy()
    model.flag = 3
    model.compile(backend="eager")
    assert vars(model).keys() - pytorch.module_fields() == {"flag", "training"}


def test_apply_reaches_every_tensor() -> None:
    model = Toy()
    pytorch.apply_to_tensors(model, lambda x: x.double())
    assert {x.dtype for x in model.state_dict().values()} == {torch.float64}


def test_graph_sources_grow_with_every_graph_module() -> None:
    before = dict(pytorch.graph_sources())
    fx.symbolic_trace(Toy())
    added = {k: v for k, v in pytorch.graph_sources().items() if k not in before}
    assert len(added) == 1
    assert "def forward" in next(iter(added.values()))


def test_lazy_graph_modules_write_their_code_when_asked() -> None:
    before = {*pytorch.graph_sources()}
    with pytorch.lazy_graph_modules():
        traced = fx.symbolic_trace(Toy())
    module = pytorch.make_graph_module(traced, traced.graph, "Named")
    assert {*pytorch.graph_sources()} == before
    assert type(module).__name__ == "Named"
    pytorch.write_code(module)
    assert len({*pytorch.graph_sources()} - before) == 1
    compiled: Any = torch.compile(module, backend="eager", fullgraph=True)
    x = torch.rand(1, 2)
    assert torch.equal(compiled(x), module(x))
    (node,) = (n for n in module.graph.nodes if n.op == "output")
    node.args = (next(iter(module.graph.nodes)),)
    pytorch.write_code(module)
    assert module(x) is x, "of the graph as it is now"


# -- Dynamo ---------------------------------------------------------------------------------------


def test_compiled_modules_are_recognized() -> None:
    model, in_place = Toy(), Toy()
    assert not compilers.is_compiled(model)
    compiled: Any = torch.compile(model, backend="eager")
    in_place.compile(backend="eager")
    assert compilers.is_compiled(compiled)
    assert compilers.is_compiled(in_place)
    assert compilers.compiled_original(compiled) is model
    assert compilers.compiled_original(model) is model
    assert compilers.compiled_original(in_place) is in_place


def test_compile_lock_keeps_dynamo_out() -> None:
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    with compilers.compile_lock():
        thread = threading.Thread(target=compiled, args=(torch.ones(1),))
        thread.start()
        thread.join(timeout=0.5)
        assert thread.is_alive()
    thread.join(timeout=60)
    assert not thread.is_alive()


def traced_by_dynamo(function: Any) -> list[bool]:
    """Whether each frame was compiled, as the function appended it to its second argument."""
    compiling: list[bool] = []
    torch._dynamo.reset()
    torch.compile(function, backend="eager")(torch.ones(1), compiling)
    return compiling


def test_disabled_functions_and_what_they_call_are_not_compiled() -> None:
    def inner(compiling: list[bool]) -> None:
        compiling.append(torch.compiler.is_compiling())

    @compilers.disable_dynamo
    def disabled(x: Tensor, compiling: list[bool]) -> Tensor:
        inner(compiling)
        return x + 1

    def entry(x: Tensor, compiling: list[bool]) -> Tensor:
        inner(compiling)
        return disabled(x, compiling)

    assert traced_by_dynamo(entry) == [True, False]


def test_skipped_frames_run_as_they_are_and_their_calls_are_compiled() -> None:
    def inner(x: Tensor, compiling: list[bool]) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return x + 1

    def skipped(x: Tensor, compiling: list[bool]) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return inner(x, compiling)

    compilers.skip_frame(skipped)
    assert traced_by_dynamo(skipped) == [False, True]


def test_compiled_functions_run_while_tracing() -> None:
    compiled = torch.compile(lambda x: x + 1, backend="eager")

    class Calling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return compiled(x)

    with pytest.raises(RuntimeError, match="symbolically trace"):
        fx.symbolic_trace(Calling())
    with compilers.allow_calls_while_tracing():
        fx.symbolic_trace(Calling())


def test_no_tracing_context_inside() -> None:
    current = torch._guards.TracingContext.try_get

    def read(gm: fx.GraphModule, _: Any) -> tuple[bool, bool]:
        with compilers.without_tracing_context():
            inside = current() is None
        return current() is None, inside

    assert dynamo_graph(Toy(), torch.ones(1, 2), read=read) == (False, True)


def test_the_variables_of_the_call_that_is_compiled() -> None:
    model = Toy()

    def read(gm: fx.GraphModule, _: Any) -> list[Any]:
        names = [compilers.input_source(n).name for n in gm.graph.find_nodes(op="placeholder")]
        return [eval(name, compilers.compiled_scope()) for name in names]

    assert compilers.compiled_scope() is None
    x = torch.ones(1, 2)
    found = dynamo_graph(model, x, read=read)
    assert {id(value) for value in found} == {id(x), *map(id, model.parameters()), id(model.shift)}


def test_inputs_of_a_graph_and_where_they_come_from() -> None:
    def read(gm: fx.GraphModule, _: Any) -> dict[str, bool]:
        sources = [compilers.input_source(n) for n in gm.graph.find_nodes(op="placeholder")]
        return {s.name: compilers.is_module_source(s) for s in sources}

    found = dynamo_graph(Toy(), torch.ones(1, 2), read=read)
    assert found["L['x']"] is False
    owned = [name for name, is_owned in found.items() if is_owned]
    assert len(owned) == 4
    assert all("self" in name for name in owned)


def test_examples_are_real_while_dynamo_compiles() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x * n

    given = torch.full((3,), 2.0)

    def read(gm: fx.GraphModule, inputs: Any) -> list[Any]:
        nodes = gm.graph.find_nodes(op="placeholder")
        return [compilers.example_of(n, fake) for n, fake in zip(nodes, inputs, strict=True)]

    with torch._dynamo.config.patch(assume_static_by_default=False):
        found = dynamo_graph(Sized(), given, 7, read=read)
    assert any(x is given for x in found if isinstance(x, Tensor))
    assert {x for x in found if type(x) is int} == {3, 7}
    assert compilers.example_of(fx.Graph().placeholder("x"), 5) == 5


def test_floats_are_passed_as_tensors() -> None:
    def read(gm: fx.GraphModule, _: Any) -> list[bool]:
        return [compilers.is_wrapped_number(n) for n in gm.graph.find_nodes(op="placeholder")]

    with torch._dynamo.config.patch(specialize_float=False, assume_static_by_default=False):
        found = dynamo_graph(Toy(), torch.ones(1, 2), 0.5, read=read)
    assert sorted(found) == [False] * (len(found) - 1) + [True]
    assert compilers.is_wrapped_number(fx.Graph().placeholder("x")) is False


def test_marks_of_a_static_address_reach_the_graph() -> None:
    x = torch.ones(1, 2)
    compilers.mark_static_address(x)

    def read(gm: fx.GraphModule, _: Any) -> dict[str, Any]:
        notes = [compilers.input_notes(n) for n in gm.graph.find_nodes(op="placeholder")]
        return {source.name: marks for source, marks in notes}

    marks = dynamo_graph(Toy(), x, read=read)["L['x']"]
    _, expected = compilers.noted_input("pattern", static=True)
    assert expected
    assert expected.items() <= marks.items()


def test_notes_tell_inductor_what_is_static(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd reads the notes: the marked input is static, the other is not."""
    from torch._functorch._aot_autograd import frontend_utils

    seen: list[Any] = []
    original = frontend_utils._try_get_metadata_from_dynamo

    def spying(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr("torch._functorch.aot_autograd._try_get_metadata_from_dynamo", spying)
    graph_module = fx.symbolic_trace(lambda x, y: (x + y,))
    graph_module.meta["dynamo_compile_id"] = None  # as graphs of Dynamo have it
    fresh = compilers.noted_input("fresh", static=False)
    compilers.note_inputs(graph_module, [fresh, compilers.noted_input("pattern", static=True)])
    program = compilers.compile_graph(graph_module, [torch.ones(2), torch.ones(2)], {})
    assert torch.equal(program(torch.ones(2), torch.ones(2))[0], torch.full((2,), 2.0))
    assert any(1 in static for _, static in seen)
    assert not any(0 in static for _, static in seen)


# -- Inductor -------------------------------------------------------------------------------------


def test_inductor_options_are_fields_of_its_configuration() -> None:
    assert {"max_autotune", "freezing", "triton.cudagraphs"} <= set(compilers.inductor_options())


def test_modes_change_fields_of_the_configuration() -> None:
    modes = compilers.inductor_modes()
    assert {"default", "reduce-overhead", "max-autotune"} <= modes.keys()
    assert modes["reduce-overhead"] == {"triton.cudagraphs": True}
    known = set(compilers.inductor_options())
    assert all(known >= changes.keys() for changes in modes.values())


def test_a_compiled_graph_obeys_the_options() -> None:
    graph_module = fx.symbolic_trace(lambda x: (x.sin() + 1,))
    x = torch.ones(3)
    with pytest.raises(AttributeError, match="teleport"):
        compilers.compile_graph(graph_module, [x], {"teleport": True})
    assert torch.allclose(compilers.compile_graph(graph_module, [x], {})(x)[0], x.sin() + 1)


def test_programs_compiled_ahead(tmp_path: Path) -> None:
    """A package holds programs by name, without constants; run, they compute the same."""
    model, x = nn.Linear(16, 16).eval(), torch.rand(1, 16)
    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    }
    program = torch.export.export(model, (x,), strict=False)
    files, constants = compilers.compile_ahead(program.module(), (x,), options)
    assert files
    assert all(isinstance(f, str) for f in files)
    assert constants.keys() == {"weight", "bias"}
    with (tmp_path / "programs.pt2").open("wb") as file:
        compilers.package_programs(file, {"reuse": files})
    runner = compilers.load_programs(tmp_path / "programs.pt2", -1)["reuse"]
    assert set(runner.get_constant_fqns()) == constants.keys()
    runner.load_constants(constants, check_full_update=True, user_managed=True)
    with torch.no_grad():
        assert torch.allclose(runner.loader.run([x])[0], model(x))


def test_a_cpp_compiler_is_found_or_missed() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert compilers.has_cpp_compiler() is False
    with config.patch({"cpp.cxx": (sys.executable,)}):  # anything that knows --version
        assert compilers.has_cpp_compiler() is True


# -- diffusers, accelerate, peft ------------------------------------------------------------------


@pytest.fixture
def denoiser() -> Any:
    from tests.denoisers import flux

    return flux()


def test_hooks_of_diffusers_are_found() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    model, hook = Toy(), ModelHook()
    assert libraries.diffusers_hooks(model) == {}
    HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, "mine")
    assert libraries.diffusers_hooks(model) == {"mine": hook}
    assert vars(model).keys() - pytorch.module_fields() - {"training"} == {
        libraries.HOOKS,
        "forward",
    }
    assert libraries.HOOKS in libraries.WRAPPING


def test_hooks_of_accelerate_are_found() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, hook = Toy(), ModelHook()
    original = model.forward
    assert libraries.accelerate_hook(model) is None
    add_hook_to_module(model, hook)
    assert libraries.accelerate_hook(model) is hook
    assert vars(model)[libraries.ORIGINAL_FORWARD] == original
    added = vars(model).keys() - pytorch.module_fields() - {"training"}
    assert added == libraries.WRAPPING - {libraries.HOOKS}


def test_processors_and_their_backends() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    assert libraries.attention_backend(AttnProcessor2_0()) == "native"
    processor = FluxAttnProcessor()
    assert libraries.attention_backend(processor) is None
    processor._attention_backend = "_native_math"
    assert libraries.attention_backend(processor) == "_native_math"


def test_models_set_the_backend_of_their_processors(denoiser: Any) -> None:
    with attention_backend("native"):  # puts the global one back, which is set too
        denoiser.set_attention_backend("_native_math")
    found = {libraries.attention_backend(p) for p in denoiser.attn_processors.values()}
    assert found == {"_native_math"}


def test_the_global_backend_is_that_of_the_context() -> None:
    assert libraries.active_attention_backend() == "native"
    with attention_backend("_native_math"):
        assert libraries.active_attention_backend() == "_native_math"
    assert libraries.active_attention_backend() == "native"


def test_parallel_config_is_on_every_model(denoiser: Any) -> None:
    """Set by `enable_parallelism`, which needs several processes."""
    assert type(denoiser)._parallel_config is None
    assert libraries.parallel_config(denoiser) is None
    assert "_parallel_config" in type(denoiser).enable_parallelism.__code__.co_names
    denoiser._parallel_config = "split"
    assert libraries.parallel_config(denoiser) == "split"


def test_stateful_caches_are_reset(denoiser: Any) -> None:
    """By the name that pipelines look for."""
    from diffusers import DiffusionPipeline
    from diffusers.hooks import HookRegistry, ModelHook

    class Stateful(ModelHook):
        _is_stateful = True

        def reset_state(self, module: nn.Module) -> None:
            reset.append(module)

    reset: list[nn.Module] = []
    HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(Stateful(), "mine")
    libraries.reset_stateful_cache(denoiser)
    libraries.reset_stateful_cache(Toy())
    assert reset == [denoiser]
    assert "_reset_stateful_cache" in DiffusionPipeline.maybe_free_model_hooks.__code__.co_consts


def test_history_is_what_adapters_leave_on_the_root(denoiser: Any) -> None:
    from peft import LoraConfig

    model = denoiser
    before = set(vars(model))
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    model.fuse_lora()
    assert set(vars(model)) - before <= libraries.HISTORY
    assert {"_hf_peft_config_loaded", "peft_config"} <= set(vars(model))
    assert hasattr(model, "_cache_config")


def test_switches_of_a_tuner_layer_are_read_by_its_properties(denoiser: Any) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = denoiser
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    assert vars(layer).keys() >= libraries.ADAPTER_SWITCHES
    assert list(layer.active_adapters) == ["style"]
    model.disable_adapters()
    assert layer.disable_adapters is True
    model.enable_adapters()
    layer.merge()
    assert layer.merged
    assert vars(layer)["merged_adapters"] == ["style"]


# -- collectives ----------------------------------------------------------------------------------


def test_collectives_in_a_graph_find_their_group_by_name() -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        name = collectives.group_name(torch.distributed.group.WORLD)
        x = torch.randn(3, 4)
        assert torch.equal(collectives.gather(x, 1, name), x)
        # Fake: tracing waits for a real collective with Python's lock held, and gloo's own thread,
        # which inherits the tracer's dispatcher, needs that lock to go on. It never ends then.
        with FakeTensorMode():
            fake = torch.empty(3, 4)
            traced = make_fx(lambda x: collectives.gather(x, 1, name), pre_dispatch=True)(fake)
        assert torch.equal(traced(2 * x), 2 * x)
    finally:
        torch.distributed.destroy_process_group()
    _, sent, waiting, _ = traced.graph.nodes
    assert collectives.is_wait(waiting.target)
    assert waiting.is_impure(), "what `is_wait` is for"
    assert not collectives.is_wait(sent.target)
    assert not sent.is_impure()
    with FakeTensorMode():
        assert collectives.gather(torch.empty(3, 4), 5, name).shape == (15, 4)


# -- stacks -------------------------------------------------------------------------------------


def exported(model: nn.Module) -> fx.Graph:
    return torch.export.export(model, (torch.randn(1, 2),), strict=False).graph


def test_nodes_note_the_frames_outside_of_torch() -> None:
    """The innermost of them, by which users find a line, is the one that torch notes, too."""
    whole = exported(Toy())
    with tracebacks.own_frames():
        own = exported(Toy())
    assert [source_line(n) for n in own.nodes] == [source_line(n) for n in whole.nodes]
    (linear,) = [n for n in own.nodes if op_name(n.target) == "aten.linear"]
    assert re.match(r"test_compat.py:\d+ return self.linear", source_line(linear))
    assert "/torch/" not in linear.meta["stack_trace"]
    assert any("/torch/" in str(n.meta.get("stack_trace")) for n in whole.nodes)


def test_stacks_are_torchs_again_after_threads_that_overlap() -> None:
    """Each would put back what it found, which is the other's."""
    original = torch.fx.proxy.CapturedTraceback
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with tracebacks.own_frames():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    with tracebacks.own_frames():
        thread.start()
        assert inside.wait(60)
    assert torch.fx.proxy.CapturedTraceback is tracebacks.OwnFrames
    leave.set()
    thread.join()
    assert torch.fx.proxy.CapturedTraceback is original
    with pytest.raises(KeyError), tracebacks.own_frames():
        raise KeyError
    assert torch.fx.proxy.CapturedTraceback is original


# -- and nowhere else -----------------------------------------------------------------------------

PACKAGES = ("torch", "diffusers", "accelerate", "peft")
ALLOWED = {
    "_native_cudnn": "a value: the name of an attention backend of diffusers",
    "_native_efficient": "a value: the name of an attention backend of diffusers",
    "_native_flash": "a value: the name of an attention backend of diffusers",
    "_native_math": "a value: the name of an attention backend of diffusers",
    "_ids": "a value: how the names of some inputs end",
    "_abc_": "how names begin that Python gives to abstract classes",
    "_getframe": "a function of Python",
    "_operator": "a module of Python",
}


def own_names(trees: Iterable[ast.AST]) -> set[str]:
    """Private names that the package defines: functions, classes, variables, own attributes."""
    names: set[str] = set()
    for node in itertools.chain.from_iterable(map(ast.walk, trees)):
        stored = isinstance(getattr(node, "ctx", None), ast.Store)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and stored:
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and stored and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, ast.Subscript) and stored and isinstance(node.slice, ast.Constant):
            names.add(str(node.slice.value))  # vars(self)["_name"] = ...
    return set(filter(is_private, names))


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and not name.endswith("__")


def private_names(tree: ast.AST, own: Set[str] = frozenset()) -> set[str]:
    """Private names that a file uses, but for `own`: those of other packages.

    In imports, as attributes of whatever object, and in texts that `getattr` may look up, such as
    "_name" or "torch._name.x".
    """
    names: list[str] = []
    formatted = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            before = getattr(node, "module", None) or ""
            paths = [f"{before}.{alias.name}".lstrip(".") for alias in node.names]
            names += ".".join(p for p in paths if p.partition(".")[0] in PACKAGES).split(".")
        elif isinstance(node, ast.Attribute):
            mine = ast.unparse(node.value) == "self" and node.attr in own
            names += [] if mine or node.attr in own - TAKEN else [node.attr]
        elif isinstance(node, ast.Constant) and id(node) not in formatted:
            parts = re.fullmatch(r"[\w.]+", str(node.value)) and str(node.value).split(".")
            names += [p for p in filter(is_private, parts or ()) if p not in own]
    return {n for n in filter(is_private, names) if not hasattr(torch.ops.aten, n)}


TAKEN = {
    name
    for owner in (nn.Module(), fx.GraphModule({}, fx.Graph()), fx.Graph(), torch.ones(1))
    for name in dir(owner)
    if is_private(name)
}
"""Private attributes of torch's objects: on `self` alone they may be the package's own."""


def test_private_names_are_used_in_one_folder() -> None:
    files = sorted((ROOT / "toma_fx").rglob("*.py"))
    trees = {str(f.relative_to(ROOT)): ast.parse(f.read_text()) for f in files}
    compat = [path for path in trees if path.startswith("toma_fx/compat/")]
    in_compat = set[str]().union(*(private_names(trees.pop(path)) for path in compat))
    assert in_compat >= {"_dynamo", "_inductor", "_dynamo_source", "_hf_hook", "_active_backend"}
    own = own_names(trees.values()) - in_compat
    used = {path: private_names(tree, own) - ALLOWED.keys() for path, tree in trees.items()}
    assert not {path: names for path, names in used.items() if names}
    everywhere = set().union(*map(private_names, trees.values()))
    assert everywhere >= ALLOWED.keys(), "an exception that is not needed"


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "from torch._dynamo import config",
        "from torch.utils import _dynamo",
        "torch._dynamo.reset()",
        "getattr(x, '_dynamo')",
        "vars(x)['_dynamo']",
        "import_module('torch._dynamo.config')",
    ],
)
def test_the_scan_sees_every_way_to_a_private_name(code: str) -> None:
    assert private_names(ast.parse(code)) == {"_dynamo"}


def test_the_scan_knows_the_packages_own_names() -> None:
    own = own_names([ast.parse("self._a = 1\ndef _b(): _c = 2\nvars(x)['_d'] = x._e = 3")])
    assert own == {"_a", "_b", "_c", "_d"}
    assert not private_names(ast.parse("x._a, y._b, vars(z)['_c']"), own)
    assert private_names(ast.parse("self._apply(), x._apply()"), {"_apply"}) == {"_apply"}
    assert not private_names(ast.parse("self._apply(), f'{x}_ids'"), {"_apply"})
