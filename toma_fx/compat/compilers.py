"""Private names of Dynamo and Inductor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from toma_fx.compat.lookup import attribute, lookup

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    from torch import Tensor, fx, nn
    from torch.utils._pytree import TreeSpec as TreeSpec

F = TypeVar("F", bound=Callable[..., Any])


# -- Dynamo ---------------------------------------------------------------------------------------


def compiled_original(module: Any) -> Any:
    """The module that was given to `torch.compile`; anything else as it is. Imports no Dynamo."""
    if "torch._dynamo" not in sys.modules:
        return module
    compiled = type(module) is lookup("torch._dynamo.eval_frame", "OptimizedModule")
    return attribute("torch", module, "_orig_mod") if compiled else module


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` returned, or was compiled in place."""
    in_place = attribute("torch", module, "_compiled_call_impl") is not None
    return in_place or compiled_original(module) is not module


def compile_lock() -> threading.RLock:
    """The lock that Dynamo holds while it compiles."""
    return lookup("torch._dynamo.convert_frame", "compile_lock")


def disable_dynamo(function: F) -> F:
    """Decorator: Dynamo compiles neither it nor what it calls. The public one imports Dynamo."""
    return lookup("torch", "_disable_dynamo")(function)


def skip_frame(function: Callable[..., Any]) -> None:
    """Let Dynamo run this as it is, and compile what it calls: beside a thread that traces, too."""
    lookup("torch._dynamo.decorators", "skip")(function)


def allow_calls_while_tracing() -> AbstractContextManager[Any]:
    """A context in which compiled functions run uncompiled, not refused, while a thread traces."""
    return lookup("torch._dynamo.config", "patch")(error_on_nested_fx_trace=False)


def without_tracing_context() -> AbstractContextManager[Any]:
    """A context in which nothing is taken from the trace that Dynamo has open (symbolic shapes)."""
    return lookup("torch._guards", "tracing")(None)


def mark_static_address(tensor: Tensor) -> None:
    """Promise that a tensor stays where it is: a CUDA graph then reads it without a copy."""
    lookup("torch._dynamo", "mark_static_address")(tensor, guard=False)


def input_source(node: fx.Node) -> Any:
    """Where an input of Dynamo's graph comes from; its `name` is Python text: "L['timestep']"."""
    return attribute("torch", node, "_dynamo_source")


def compiled_scope() -> dict[str, dict[str, Any]] | None:
    """What sources name: variables ("L", "G") of the call that this thread compiles, if it does."""
    translator = getattr(lookup("torch._dynamo.symbolic_convert", "tls"), "current_tx", None)
    if translator is None:
        return None
    frame = attribute("torch", attribute("torch", translator, "output"), "root_tx")
    return {"L": frame.f_locals, "G": frame.f_globals}


def is_module_source(source: Any) -> bool:
    """Whether an input of Dynamo's graph belongs to a module, and is no argument of the call."""
    where = attribute("torch", source, "guard_source")
    unspecialized = attribute("torch", where, "is_unspecialized_nn_module")()
    return unspecialized or attribute("torch", where, "is_specialized_nn_module")()


def input_notes(node: fx.Node) -> tuple[Any, Mapping[str, Any]]:
    """Source and marks (static address, ...) of an input of Dynamo's graph."""
    return input_source(node), node.meta.get("tensor_dict", {})


def noted_input(name: str, *, static: bool) -> tuple[Any, Mapping[str, Any]]:
    """The same for an input that Dynamo does not know; static: its address never changes."""
    tensor = lookup("torch", "empty")(0)
    if static:
        mark_static_address(tensor)
    return lookup("torch._dynamo.source", "ConstantSource")(f"toma_fx.{name}"), vars(tensor)


def note_inputs(graph_module: fx.GraphModule, notes: Sequence[tuple[Any, Any]]) -> None:
    """Note (source, marks) on every input of a graph, and a source for every buffer in it.

    `compile_graph` goes by them; without, it takes parameters for tensors that change at each call.
    """
    nodes: Sequence[Any] = graph_module.graph.find_nodes(op="placeholder")
    for node, (source, marks) in zip(nodes, notes, strict=True):
        node._dynamo_source, node.meta["tensor_dict"] = source, marks
    buffers = {name: noted_input(name, static=True)[0] for name, _ in graph_module.named_buffers()}
    vars(graph_module)["_param_name_to_source"] = buffers
    graph_module.meta.setdefault("dynamo_compile_id", None)  # notes are read where this is


def example_of(node: fx.Node, default: Any) -> Any:
    """The real tensor or number of an input while Dynamo compiles; of another time, `default`."""
    known = node.meta.get("grapharg")
    value = default if known is None else attribute("torch", known, "example")
    symbolic = isinstance(value, lookup("torch", "SymInt"))
    return attribute("torch", value.node, "hint") if symbolic else value


def is_wrapped_number(node: fx.Node) -> bool:
    """Whether an input is a Python float that Dynamo passes as a tensor and reads by `item`."""
    known = node.meta.get("grapharg")
    return known is not None and attribute("torch", known, "pass_arg_as_tensor")


def dynamo_callback() -> Callable[[], Any]:
    """A function that returns what Dynamo calls for new frames of this thread; None: nothing."""
    return lookup("torch._C._dynamo.eval_frame", "get_eval_frame_callback")


def global_state() -> Callable[[], bool]:
    """A function that tells whether torch's global switches are what they are now: those that
    Dynamo guards (autocast, determinism, number of threads, TF32, ...)."""
    return attribute("torch", lookup("torch._C._dynamo.guards", "GlobalStateGuard")(), "check")


def begin_invocation() -> None:
    """Say that a compiled function is called: CUDA graphs may write over what the last one gave."""
    lookup("torch._dynamo.mutation_guard", "install_generation_tagging_init")()


# -- Inductor -------------------------------------------------------------------------------------


def inductor_options() -> list[str]:
    """Names of the fields of Inductor's configuration."""
    return lookup("torch._inductor", "list_options")()


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Modes of `torch.compile`, and the changes to Inductor's configuration that each makes."""
    return lookup("torch._inductor", "list_mode_options")()


def inductor_patches(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The changes to Inductor's configuration that a mode or options of `torch.compile` are.

    Raises:
        RuntimeError: there is no such mode, field or kind of value.
    """
    wrapper = lookup("torch", "_TorchCompileInductorWrapper")(mode, options, False)
    return dict(attribute("torch", wrapper, "config"))


def inductor_of(callback: Any) -> dict[str, Any] | None:
    """The changes to Inductor's configuration of the `torch.compile` that installed a callback of
    Dynamo; None: it has another back end."""
    backend = lookup("torch._dynamo.eval_frame", "innermost_backend")(callback)
    if type(backend) is not lookup("torch", "_TorchCompileInductorWrapper"):
        return None
    return attribute("torch", backend, "config")


def makes_cuda_graphs(patches: Mapping[str, Any]) -> bool:
    """Whether Inductor makes CUDA graphs under these changes to its configuration."""
    default = lookup("torch._inductor.config", "triton.cudagraphs")
    return bool(patches.get("triton.cudagraphs", default))


def compile_graph(
    graph_module: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compile a graph for fake inputs with Inductor. `torch.compile` would trace it again."""
    compile_fx = lookup("torch._inductor.compile_fx", "compile_fx")
    return compile_fx(graph_module, inputs, config_patches=dict(options))


def compile_ahead(
    module: Any, example: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[list[str], dict[str, Tensor]]:
    """Compile an exported graph with AOTInductor: (paths of files, constants that are apart)."""
    files = lookup("torch._inductor", "aot_compile")(module, example, options=dict(options))
    kind = lookup("torch.export.pt2_archive._package_weights", "Weights")
    constants = [f for f in files if isinstance(f, kind)]
    flat = {name: tensor for each in constants for name, (tensor, _) in each.items()}
    return [f for f in files if not isinstance(f, kind)], flat


def package_programs(file: BinaryIO, files: Mapping[str, Sequence[str]]) -> None:
    """Write a package of programs by name, from what `compile_ahead` gave for each."""
    package = lookup("torch._inductor.package.package", "package_aoti")
    package(file, {name: list(each) for name, each in files.items()})


def load_programs(path: Path, device_index: int) -> dict[str, Any]:
    """The programs of a package by name (`AOTICompiledModel`), on a device; -1: the current one."""
    load = lookup("torch.export.pt2_archive._package", "load_pt2")
    return load(str(path), device_index=device_index).aoti_runners


def has_cpp_compiler() -> bool:
    """Whether Inductor finds a C++ compiler."""
    try:
        return bool(lookup("torch._inductor.cpp_builder", "get_cpp_compiler")())
    except lookup("torch._inductor.exc", "InvalidCxxCompiler"):
        return False
