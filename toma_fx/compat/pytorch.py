"""Private names of torch: values, operators, modules and graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from toma_fx.compat.lookup import attribute, lookup

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor, fx, nn
    from torch.utils._pytree import TreeSpec as TreeSpec

F = TypeVar("F", bound=Callable[..., Any])


def dict_version() -> Callable[[dict[Any, Any]], int]:
    """Version of a dictionary: a greater number after every write. Dynamo's guards go by it.

    See `versions_see_attributes`, too.
    """
    return lookup("torch._C._dynamo.guards", "dict_version")


@cache
def versions_see_attributes() -> bool:
    """Whether a write to an attribute of an object counts as one to its dictionary.

    On Python 3.13.0 it does not: attributes lie in the object, and whoever watches its dictionary
    is not told of them.
    """

    class Probe:
        def __init__(self) -> None:
            self.value = 0

    version, probe = dict_version(), Probe()
    before = version(vars(probe))
    probe.value = 1
    return version(vars(probe)) != before


# -- nested values --------------------------------------------------------------------------------


def tree_flatten(value: Any) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of nested containers, of output classes of diffusers too."""
    return lookup("torch.utils._pytree", "tree_flatten")(value)


def tree_leaves(value: Any) -> list[Any]:
    """Leaves of nested containers, as `tree_flatten` lists them."""
    return lookup("torch.utils._pytree", "tree_leaves")(value)


def tree_unflatten(leaves: Iterable[Any], structure: TreeSpec) -> Any:
    """The nested value of a structure from `tree_flatten`, with these leaves."""
    return lookup("torch.utils._pytree", "tree_unflatten")(leaves, structure)


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """A nested value with `function` applied to every leaf."""
    return lookup("torch.utils._pytree", "tree_map")(function, value)


def tree_paths(value: Any) -> list[tuple[tuple[str, ...], Any]]:
    """(keys and indices that lead to a leaf, as text; the leaf) of every leaf in order."""
    pairs = lookup("torch.utils._pytree", "tree_flatten_with_path")(value)[0]
    text = lambda key: str(getattr(key, "key", getattr(key, "idx", key)))  # noqa: E731
    return [(tuple(map(text, keys)), leaf) for keys, leaf in pairs]


# -- tensors and operators ------------------------------------------------------------------------


def is_fake(value: Any) -> bool:
    """Whether a value is a fake tensor: a shape, dtype and device without data."""
    return isinstance(value, lookup("torch._subclasses.fake_tensor", "FakeTensor"))


def viewed_tensor(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of, where torch keeps it; None for others."""
    return None if tensor.is_inference() else attribute("torch", tensor, "_base")


def fake_values(values: Sequence[Any]) -> list[Any]:
    """The values as fake tensors of the mode that some are of."""
    mode = lookup("torch._guards", "detect_fake_mode")(list(values))
    return [v if is_fake(v) else mode.from_tensor(v, static_shapes=True) for v in values]


def forget_tensors(values: Iterable[Any]) -> None:
    """Drop the weak references that modes of fake tensors, and theirs, keep to real tensors."""
    kind = lookup("torch._subclasses.fake_tensor", "FakeTensorMode")
    modes = {v.fake_mode if is_fake(v) else v for v in values if is_fake(v) or type(v) is kind}
    for mode in modes:
        describer = attribute("torch", mode.fake_tensor_converter.meta_converter, "describer")
        describer.lookup_tensor.clear()
        describer.lookup_storage.clear()


def inner_tensors(tensor: Any) -> list[Any]:
    """What a traceable subclass of tensors (a quantized weight) is made of; empty for others."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]


def is_operator(target: Any) -> bool:
    """Whether a node's target is an overload of a registered operator: `torch.ops.aten.add.out`."""
    return isinstance(target, lookup("torch._ops", "OpOverload"))


def is_higher_order(target: Any) -> bool:
    """Whether a node's target takes graphs as arguments: `cond`, `while_loop`, autocast regions."""
    return isinstance(target, lookup("torch._ops", "HigherOrderOperator"))


def writes_in_place(target: Any) -> bool:
    """Whether a node's target is an operator that changes one of its arguments, by its schema."""
    return is_operator(target) and attribute("torch", target, "_schema").is_mutable


def aliased_argument(node: fx.Node) -> Any:
    """The argument that the result of an operator is a view of; None if it is none."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.returns or schema.returns[0].alias_info is None:
        return None
    named = zip(schema.arguments, node.args, strict=False)
    return next((value for argument, value in named if argument.alias_info is not None), None)


def gradient_switch() -> Callable[[bool], None]:
    """What Dynamo's graphs call to switch gradients on and off."""
    return lookup("torch._C", "_set_grad_enabled")


def tensor_constructors() -> tuple[Callable[..., Any], ...]:
    """`torch.tensor`, and what Dynamo's graphs call in its place for a symbolic number."""
    return lookup("torch", "tensor"), lookup("torch._refs", "tensor")


def decompositions(operators: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
    """torch's decompositions of these operators as far as it has any, and of all composite ones."""
    chosen = dict(lookup("torch._decomp", "get_decompositions")(operators))
    composite = lookup("torch._export.utils", "_collect_all_valid_cia_ops_for_aten_namespace")()
    decompose = lookup("torch._export.utils", "_get_decomp_for_cia")
    return chosen | {operator: decompose(operator) for operator in composite}


# -- modules and graphs ---------------------------------------------------------------------------

CONTENTS = ("_modules", "_parameters", "_buffers")
"""Tables of a module's children, parameters and buffers."""


def module_tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """A module's own tables of its children, parameters and buffers by name, None included."""
    return tuple(attribute("torch", module, name) for name in CONTENTS)


def share_tables(module: nn.Module, model: nn.Module) -> None:
    """Make a module hold the very children, parameters and buffers of another one."""
    for name in (*CONTENTS, "_non_persistent_buffers_set"):
        vars(module)[name] = attribute("torch", model, name)


def copy_with_children(module: nn.Module, children: Mapping[str, Any]) -> nn.Module:
    """A copy of a module that has these children, and shares all else."""
    copied = copy.copy(module)
    vars(copied)["_modules"] = dict(children)
    return copied


def hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """A module's own tables of forward hooks: those that run after it, those that run before."""
    return tuple(attribute("torch", module, n) for n in ("_forward_hooks", "_forward_pre_hooks"))


@cache
def module_fields() -> frozenset[str]:
    """Attributes that `nn.Module` keeps for itself, other than `training`."""
    own = vars(lookup("torch.nn", "Module")())
    return frozenset({*own, "_is_full_backward_hook", "_compiled_call_impl"} - {"training"})


def apply_to_tensors(module: nn.Module, function: Any, recurse: bool = True) -> None:
    """Replace parameters and buffers by `function(tensor)`: what `to` and `half` are made of."""
    attribute("torch", module, "_apply")(function, recurse)


def lazy_graph_modules() -> AbstractContextManager[Any]:
    """Graph modules that torch makes inside write their Python code when they are first called."""
    return cast("AbstractContextManager[Any]", _lazy("_use_lazy_graph_module")(True))


def make_graph_module(root: Any, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A graph module without Python code yet: `write_code` makes it, before Dynamo sees it."""
    return cast("fx.GraphModule", _lazy("_LazyGraphModule")(root, graph, name))


def write_code(graph_module: fx.GraphModule) -> None:
    """Make the Python code of a graph module from its graph as it is now."""
    graph_module.recompile()
    _lazy("_LazyGraphModule").force_recompile(graph_module)


def _lazy(name: str) -> Any:
    return lookup("torch.fx._lazy_graph_module", name)


def graph_sources() -> dict[str, str]:
    """Source texts of all graph modules by file name; torch.fx keeps them for good."""
    return lookup("torch.fx.graph_module", "_loader.eval_cache")
