"""Private names of torch, diffusers, accelerate and peft: one function each, used nowhere else.

None of them is promised to stay. A name that is gone raises `CompatError` here; a name that means
something else fails its test in `tests/test_compat.py`. Packages are imported when a function is
called.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from toma_fx.errors import CompatError

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    from torch import Tensor, fx, nn
    from torch.utils._pytree import TreeSpec as TreeSpec

F = TypeVar("F", bound=Callable[..., Any])


def _lookup(module: str, name: str) -> Any:
    """The object `name` of `module`; raises `CompatError` if there is none."""
    try:
        found: Any = sys.modules.get(module) or import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise _missing(module.partition(".")[0], f"{module}.{name}") from error
    return found


def _attribute(package: str, owner: Any, name: str) -> Any:
    """The attribute `name` of an object of `package`; raises `CompatError` if it has none."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        kind = owner if isinstance(owner, type) else type(owner)
        raise _missing(package, f"{kind.__name__}.{name}") from error


def _missing(package: str, name: str) -> CompatError:
    required = metadata.requires("toma-fx") or ()
    tested = [r.partition(";")[0].strip() for r in required if re.match(rf"{package}[^\w-]", r)]
    return CompatError(
        f"this version of {package} has no {name}",
        where=f"{package} {metadata.version(package)}",
        expected=f"a version that was tested: {', '.join(tested) or package}",
        hint="install such a version; to support another, see the function of toma_fx/compat.py "
        "that asks for this name",
    )


def dict_version() -> Callable[[dict[Any, Any]], int]:
    """Version of a dictionary: a greater number after every write. Dynamo's guards go by it."""
    return _lookup("torch._C._dynamo.guards", "dict_version")


# -- nested values --------------------------------------------------------------------------------


def tree_flatten(value: Any) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of nested containers, of output classes of diffusers too."""
    return _lookup("torch.utils._pytree", "tree_flatten")(value)


def tree_leaves(value: Any) -> list[Any]:
    """Leaves of nested containers, as `tree_flatten` lists them."""
    return _lookup("torch.utils._pytree", "tree_leaves")(value)


def tree_unflatten(leaves: Iterable[Any], structure: TreeSpec) -> Any:
    """The nested value of a structure from `tree_flatten`, with these leaves."""
    return _lookup("torch.utils._pytree", "tree_unflatten")(leaves, structure)


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """A nested value with `function` applied to every leaf."""
    return _lookup("torch.utils._pytree", "tree_map")(function, value)


def tree_paths(value: Any) -> list[tuple[tuple[str, ...], Any]]:
    """(keys and indices that lead to a leaf, as text; the leaf) of every leaf in order."""
    pairs = _lookup("torch.utils._pytree", "tree_flatten_with_path")(value)[0]
    text = lambda key: str(getattr(key, "key", getattr(key, "idx", key)))  # noqa: E731
    return [(tuple(map(text, keys)), leaf) for keys, leaf in pairs]


# -- tensors and operators ------------------------------------------------------------------------


def is_fake(value: Any) -> bool:
    """Whether a value is a fake tensor: a shape, dtype and device without data."""
    return isinstance(value, _lookup("torch._subclasses.fake_tensor", "FakeTensor"))


def forget_tensors(values: Iterable[Any]) -> None:
    """Drop the weak references that modes of fake tensors, and theirs, keep to real tensors."""
    kind = _lookup("torch._subclasses.fake_tensor", "FakeTensorMode")
    modes = {v.fake_mode if is_fake(v) else v for v in values if is_fake(v) or type(v) is kind}
    for mode in modes:
        describer = _attribute("torch", mode.fake_tensor_converter.meta_converter, "describer")
        describer.lookup_tensor.clear()
        describer.lookup_storage.clear()


def inner_tensors(tensor: Any) -> list[Any]:
    """What a traceable subclass of tensors (a quantized weight) is made of; empty for others."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]


def is_operator(target: Any) -> bool:
    """Whether a node's target is an overload of a registered operator: `torch.ops.aten.add.out`."""
    return isinstance(target, _lookup("torch._ops", "OpOverload"))


def is_higher_order(target: Any) -> bool:
    """Whether a node's target takes graphs as arguments: `cond`, `while_loop`, autocast regions."""
    return isinstance(target, _lookup("torch._ops", "HigherOrderOperator"))


def writes_in_place(target: Any) -> bool:
    """Whether a node's target is an operator that changes one of its arguments, by its schema."""
    return is_operator(target) and _attribute("torch", target, "_schema").is_mutable


def gradient_switch() -> Callable[[bool], None]:
    """What Dynamo's graphs call to switch gradients on and off."""
    return _lookup("torch._C", "_set_grad_enabled")


def tensor_constructors() -> tuple[Callable[..., Any], ...]:
    """`torch.tensor`, and what Dynamo's graphs call in its place for a symbolic number."""
    return _lookup("torch", "tensor"), _lookup("torch._refs", "tensor")


def decompositions(operators: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
    """torch's decompositions of these operators as far as it has any, and of all composite ones."""
    chosen = dict(_lookup("torch._decomp", "get_decompositions")(operators))
    composite = _lookup("torch._export.utils", "_collect_all_valid_cia_ops_for_aten_namespace")()
    decompose = _lookup("torch._export.utils", "_get_decomp_for_cia")
    return chosen | {operator: decompose(operator) for operator in composite}


# -- modules and graphs ---------------------------------------------------------------------------

CONTENTS = ("_modules", "_parameters", "_buffers")
"""Tables of a module's children, parameters and buffers."""


def module_tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """A module's own tables of its children, parameters and buffers by name, None included."""
    return tuple(_attribute("torch", module, name) for name in CONTENTS)


def share_tables(module: nn.Module, model: nn.Module) -> None:
    """Make a module hold the very children, parameters and buffers of another one."""
    for name in (*CONTENTS, "_non_persistent_buffers_set"):
        vars(module)[name] = _attribute("torch", model, name)


def hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """A module's own tables of forward hooks: those that run after it, those that run before."""
    return tuple(_attribute("torch", module, n) for n in ("_forward_hooks", "_forward_pre_hooks"))


@cache
def module_fields() -> frozenset[str]:
    """Attributes that `nn.Module` keeps for itself, other than `training`."""
    own = vars(_lookup("torch.nn", "Module")())
    return frozenset({*own, "_is_full_backward_hook", "_compiled_call_impl"} - {"training"})


def apply_to_tensors(module: nn.Module, function: Any, recurse: bool = True) -> None:
    """Replace parameters and buffers by `function(tensor)`: what `to` and `half` are made of."""
    _attribute("torch", module, "_apply")(function, recurse)


def graph_sources() -> dict[str, str]:
    """Source texts of all graph modules by file name; torch.fx keeps them for good."""
    return _lookup("torch.fx.graph_module", "_loader.eval_cache")


# -- Dynamo ---------------------------------------------------------------------------------------


def compiled_original(module: Any) -> Any:
    """The module that was given to `torch.compile`; anything else as it is. Imports no Dynamo."""
    if "torch._dynamo" not in sys.modules:
        return module
    compiled = type(module) is _lookup("torch._dynamo.eval_frame", "OptimizedModule")
    return _attribute("torch", module, "_orig_mod") if compiled else module


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` returned, or was compiled in place."""
    in_place = _attribute("torch", module, "_compiled_call_impl") is not None
    return in_place or compiled_original(module) is not module


def compile_lock() -> threading.RLock:
    """The lock that Dynamo holds while it compiles."""
    return _lookup("torch._dynamo.convert_frame", "compile_lock")


def disable_dynamo(function: F) -> F:
    """Decorator: Dynamo compiles neither it nor what it calls. The public one imports Dynamo."""
    return _lookup("torch", "_disable_dynamo")(function)


def skip_frame(function: Callable[..., Any]) -> None:
    """Let Dynamo run this as it is, and compile what it calls: beside a thread that traces, too."""
    _lookup("torch._dynamo.decorators", "skip")(function)


def allow_calls_while_tracing() -> AbstractContextManager[Any]:
    """A context in which compiled functions run uncompiled, not refused, while a thread traces."""
    return _lookup("torch._dynamo.config", "patch")(error_on_nested_fx_trace=False)


def without_tracing_context() -> AbstractContextManager[Any]:
    """A context in which nothing is taken from the trace that Dynamo has open (symbolic shapes)."""
    return _lookup("torch._guards", "tracing")(None)


def mark_static_address(tensor: Tensor) -> None:
    """Promise that a tensor stays where it is: a CUDA graph then reads it without a copy."""
    _lookup("torch._dynamo", "mark_static_address")(tensor, guard=False)


def input_source(node: fx.Node) -> Any:
    """Where an input of Dynamo's graph comes from; its `name` is Python text: "L['timestep']"."""
    return _attribute("torch", node, "_dynamo_source")


def compiled_scope() -> dict[str, dict[str, Any]] | None:
    """What sources name: variables ("L", "G") of the call that this thread compiles, if it does."""
    translator = getattr(_lookup("torch._dynamo.symbolic_convert", "tls"), "current_tx", None)
    if translator is None:
        return None
    frame = _attribute("torch", _attribute("torch", translator, "output"), "root_tx")
    return {"L": frame.f_locals, "G": frame.f_globals}


def is_module_source(source: Any) -> bool:
    """Whether an input of Dynamo's graph belongs to a module, and is no argument of the call."""
    where = _attribute("torch", source, "guard_source")
    unspecialized = _attribute("torch", where, "is_unspecialized_nn_module")()
    return unspecialized or _attribute("torch", where, "is_specialized_nn_module")()


def input_notes(node: fx.Node) -> tuple[Any, Mapping[str, Any]]:
    """Source and marks (static address, ...) of an input of Dynamo's graph."""
    return input_source(node), node.meta.get("tensor_dict", {})


def static_notes(name: str) -> tuple[Any, Mapping[str, Any]]:
    """The same for an input that Dynamo does not know, and whose address never changes."""
    tensor = _lookup("torch", "empty")(0)
    mark_static_address(tensor)
    return _lookup("torch._dynamo.source", "ConstantSource")(f"toma_fx.{name}"), vars(tensor)


def note_inputs(graph_module: fx.GraphModule, notes: Sequence[tuple[Any, Any]]) -> None:
    """Note (source, marks) on every input of a graph, and a source for every buffer in it.

    `compile_graph` goes by them; without, it takes parameters for tensors that change at each call.
    """
    nodes: Sequence[Any] = graph_module.graph.find_nodes(op="placeholder")
    for node, (source, marks) in zip(nodes, notes, strict=True):
        node._dynamo_source, node.meta["tensor_dict"] = source, marks
    buffers = {name: static_notes(name)[0] for name, _ in graph_module.named_buffers()}
    vars(graph_module)["_param_name_to_source"] = buffers


def example_of(node: fx.Node, default: Any) -> Any:
    """The real tensor or number of an input while Dynamo compiles; of another time, `default`."""
    known = node.meta.get("grapharg")
    value = default if known is None else _attribute("torch", known, "example")
    symbolic = isinstance(value, _lookup("torch", "SymInt"))
    return _attribute("torch", value.node, "hint") if symbolic else value


def is_wrapped_number(node: fx.Node) -> bool:
    """Whether an input is a Python float that Dynamo passes as a tensor and reads by `item`."""
    known = node.meta.get("grapharg")
    return known is not None and _attribute("torch", known, "pass_arg_as_tensor")


# -- Inductor -------------------------------------------------------------------------------------


def inductor_options() -> list[str]:
    """Names of the fields of Inductor's configuration."""
    return _lookup("torch._inductor", "list_options")()


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Modes of `torch.compile`, and the changes to Inductor's configuration that each makes."""
    return _lookup("torch._inductor", "list_mode_options")()


def compile_graph(
    graph_module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compile a graph for fake inputs with Inductor. `torch.compile` would trace it again."""
    compile_fx = _lookup("torch._inductor.compile_fx", "compile_fx")
    return compile_fx(graph_module, inputs, config_patches=dict(options))


def compile_ahead(
    module: Any, example: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[list[str], dict[str, Tensor]]:
    """Compile an exported graph with AOTInductor: (paths of files, constants that are apart)."""
    files = _lookup("torch._inductor", "aot_compile")(module, example, options=dict(options))
    kind = _lookup("torch.export.pt2_archive._package_weights", "Weights")
    constants = [f for f in files if isinstance(f, kind)]
    flat = {name: tensor for each in constants for name, (tensor, _) in each.items()}
    return [f for f in files if not isinstance(f, kind)], flat


def package_programs(file: BinaryIO, files: Mapping[str, Sequence[str]]) -> None:
    """Write a package of programs by name, from what `compile_ahead` gave for each."""
    package = _lookup("torch._inductor.package.package", "package_aoti")
    package(file, {name: list(each) for name, each in files.items()})


def load_programs(path: Path, device_index: int) -> dict[str, Any]:
    """The programs of a package by name (`AOTICompiledModel`), on a device; -1: the current one."""
    load = _lookup("torch.export.pt2_archive._package", "load_pt2")
    return load(str(path), device_index=device_index).aoti_runners


def has_cpp_compiler() -> bool:
    """Whether Inductor finds a C++ compiler."""
    try:
        return bool(_lookup("torch._inductor.cpp_builder", "get_cpp_compiler")())
    except _lookup("torch._inductor.exc", "InvalidCxxCompiler"):
        return False


# -- diffusers, accelerate, peft ------------------------------------------------------------------

HOOKS, ORIGINAL_FORWARD = "_diffusers_hook", "_old_forward"
"""Where a module has diffusers' registry of hooks, and the `forward` that accelerate replaced."""
WRAPPING = frozenset({"_hf_hook", ORIGINAL_FORWARD, "forward", HOOKS})
"""Attributes by which accelerate and diffusers wrap the call of a module."""
HISTORY = frozenset(
    {"peft_config", "_hf_peft_config_loaded", "lora_scale", "_safe_fusing", "_cache_config"}
)
"""Attributes that tell how a model of diffusers came about; its forward pass reads none of them."""
STEPS_MADE, NOTES = "_num_timesteps", {"_name_or_path", "_use_default_values"}
"""Where a pipeline notes its number of steps, and a configuration what does not change a model."""
ADAPTER_SWITCHES = frozenset({"_active_adapter", "_disable_adapters", "merged_adapters"})
"""Attributes of a tuner layer of peft that say which adapters act; public properties read them."""


def diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    """Hooks of diffusers that a module has itself, by name."""
    registry = vars(module).get(HOOKS)
    return {} if registry is None else _attribute("diffusers", registry, "hooks")


def accelerate_hook(module: nn.Module) -> Any:
    """The hook of accelerate around a module's call (offloading, device maps); None without one."""
    return vars(module).get("_hf_hook")


def attention_backend(processor: Any) -> str | None:
    """The attention backend of a processor: None for the global one, "native" if it knows none."""
    backend = getattr(processor, "_attention_backend", "native")
    return getattr(backend, "value", backend)


def active_attention_backend() -> str:
    """The global attention backend of diffusers; torch's own where diffusers is not imported."""
    if "diffusers.models.attention_dispatch" not in sys.modules:
        return "native"
    registry = _lookup("diffusers.models.attention_dispatch", "_AttentionBackendRegistry")
    active = _attribute("diffusers", registry, "_active_backend")
    return str(getattr(active, "value", active) or "native")


def parallel_config(model: nn.Module) -> Any:
    """How a model of diffusers is split over several processes; None if it is not."""
    return getattr(model, "_parallel_config", None)


def reset_stateful_cache(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Tell a model of diffusers that a generation ends, as pipelines do; others have no say."""
    getattr(model, "_reset_stateful_cache", lambda *_, **__: None)(*args, **kwargs)
