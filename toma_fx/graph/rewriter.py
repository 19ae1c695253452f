"""The one door for graph mutation: only `Rewriter` creates, changes or erases nodes.

It gives new nodes their fake value, keeps the module stack of the node they belong to, records
which pass did what, and refuses name collisions.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from toma_fx.compat.pytorch import make_graph_module, tree_leaves, writes_in_place
from toma_fx.errors import RewriteError
from toma_fx.graph.nodes import is_dead, op_name
from toma_fx.graph.templates import Opaque, Templates, trace_snippet
from toma_fx.graph.verify import (
    describe,
    fake_mode_of,
    fake_result,
    faking,
    output_values,
    strides_of,
)

ModuleStack = Mapping[str, tuple[str, Any]]
"""`nn_module_stack` of a node: (path, class) of each module around it, outermost first."""


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph that shares every parameter; node names stay the same."""
    graph = copy.deepcopy(graph_module.graph)
    names = [n.name for n in graph_module.graph.nodes]
    if [n.name for n in graph.nodes] != names:
        raise RewriteError("node names changed in a copy", where="copy_graph")
    for new, old in zip(graph.nodes, graph_module.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    return make_graph_module(graph_module, graph, graph_module.__class__.__name__)


def _check_snippet(node: fx.Node, where: str) -> None:
    """Raise unless a node of a traced snippet may stand in a graph."""
    if node.op != "call_function":
        raise RewriteError(
            "a method may only call functions of torch",
            where=where,
            got=node.format_node() or "",
            hint="make constant tensors with torch.arange and arithmetic, not with torch.tensor",
        )
    if writes_in_place(node.target):
        raise RewriteError(
            "a method may not write in place, not even into tensors of its own",
            where=where,
            got=node.format_node() or "",
            hint="use the form without an underscore: add for add_, index_put for x[i] = y",
        )


class Rewriter:
    """Mutates one graph on behalf of passes.

    Attributes:
        graph_module: the graph being rewritten. log: (pass, action, node) of every change.
        inputs: names that the inputs must have. outputs: fake values of the outputs; the verbs that
            add or erase some keep both up to date, and verification compares them with the graph.
        named: nodes that a pass leaves for the passes after it. stand_ins: what now stands for
            nodes of the graph at first, by their names.
        changed: nodes made or changed since `settle`. spliced: nodes of the last `splice`.
    """

    def __init__(self, graph_module: fx.GraphModule, templates: Templates | None = None) -> None:
        """`templates` caches traced snippets; rewrites of one captured graph may share it."""
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.log: list[tuple[str, str, str]] = []
        self.inputs = [n.name for n in self.graph.nodes if n.op == "placeholder"]
        self.outputs = output_values(self.graph)
        self.named: dict[str, tuple[fx.Node, ...]] = {}
        self.stand_ins: dict[str, fx.Node] = {}
        self._first = self.index()
        self.changed: set[fx.Node] = set()
        self.spliced: list[fx.Node] = []
        self._restrided: set[fx.Node] = set()
        self._templates: Templates = {} if templates is None else templates
        self._fakes: dict[Hashable, Any] = {}
        self._pass = ""
        self._cursor: fx.Node | None = None
        self._owner: fx.Node | None = None
        self._mode = fake_mode_of(self.graph)

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Attribute changes to the pass `name`."""
        self._pass = name
        yield
        self._pass = ""

    @contextmanager
    def after(self, *nodes: fx.Node) -> Iterator[None]:
        """Insert new nodes after the last of `nodes` in graph order, and after all inputs."""
        previous = self._cursor, self._owner
        self._cursor = self._owner = max(nodes)
        yield
        self._cursor, self._owner = previous

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Insert new nodes before `node`, as parts of the module that it belongs to."""
        previous = self._cursor, self._owner
        self._cursor, self._owner = node.prev, node
        yield
        self._cursor, self._owner = previous

    def settle(self) -> set[fx.Node]:
        """The nodes changed so far, still in the graph, their strides up to date; starts anew."""
        self._update_strides()
        changed, self.changed = self.changed, set()
        return changed

    def index(self) -> dict[str, fx.Node]:
        """All nodes by name."""
        return {n.name: n for n in self.graph.nodes}

    def current(self, name: str) -> fx.Node:
        """What now stands for a node that the graph had at first."""
        return self.stand_ins.get(name) or self._first[name]

    def stand_in(self, name: str, node: fx.Node) -> None:
        """Say that `node` has taken the place of one that the graph had at first."""
        self.stand_ins[name] = node

    def calls(self, *ops: str) -> list[fx.Node]:
        """The calls of these ops, in graph order."""
        nodes = self.graph.nodes
        return [n for n in nodes if n.op == "call_function" and op_name(n.target) in ops]

    # -- new nodes ---------------------------------------------------------------------------------

    def add_input(self, name: str, like: Callable[[], Tensor]) -> fx.Node:
        """Append an input; `like` builds its fake value."""
        known = self.graph.find_nodes(op="placeholder")
        place = known[-1] if known else next(iter(self.graph.nodes)).prev
        with self.graph.inserting_after(place):
            node = self.graph.placeholder(name)
        if node.name != name:
            self.graph.erase_node(node)
            raise RewriteError("a node of that name exists", where=self._pass, got=name)
        with faking(self._mode):
            node.meta["val"] = like()
        self.inputs.append(name)
        self._record("add input", node)
        return node

    def insert(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Insert one call at the cursor; its fake value is computed from its arguments."""
        node = self._insert(target, args, kwargs)
        self.retype(node)
        return node

    def splice(
        self,
        key: Hashable,
        function: Callable[..., Any],
        inputs: Sequence[fx.Node],
        *,
        as_call: bool = False,
    ) -> list[fx.Node]:
        """Trace `function` on the fake values of `inputs` and insert its nodes at the cursor.

        Equal `key` promises an equal function, so that its trace may be used again for inputs of
        the same shapes. `as_call` inserts one node that calls the function, for what can't be
        traced because its shapes depend on the data. Returns the nodes of its outputs (a tensor, a
        number, or a tuple of tensors).
        """
        self.spliced = []
        if as_call:
            return self._call(Opaque(function), tuple(inputs))
        fakes = [n.meta["val"] for n in inputs]
        retyping = None in strides_of(fakes)  # what is traced has other strides
        traced = trace_snippet(self._templates, key, function, fakes, self._pass)
        mapping: dict[fx.Node, Any] = dict(
            zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True)
        )
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                break
            _check_snippet(node, self._pass)
            args, kwargs = fx.map_arg((node.args, node.kwargs), mapping.__getitem__)
            mapping[node] = self._insert(node.target, args, kwargs)
            mapping[node].meta["val"] = node.meta["val"]
            if retyping:
                self.retype(mapping[node])
        results: Any = traced.graph.output_node().args[0]
        return [mapping[n] for n in (results if isinstance(results, (tuple, list)) else [results])]

    def _call(self, target: Opaque, inputs: tuple[fx.Node, ...]) -> list[fx.Node]:
        """One node that calls a function, and one for each of its results if it has several."""
        node = self.insert(target, *inputs)
        values = node.meta["val"]
        if not isinstance(values, tuple):
            return [node]
        return [self.insert(operator.getitem, node, i) for i in range(len(values))]

    def fake(self, key: Hashable, function: Callable[[Tensor], Any], like: Tensor) -> Any:
        """What `function` gives for a fake tensor like `like`; kept by `key` and shape."""
        known = (key, (tuple(like.shape), like.dtype, like.device))
        if known not in self._fakes:
            with torch.no_grad(), faking(self._mode):
                self._fakes[known] = function(
                    torch.empty(like.shape, dtype=like.dtype, device=like.device)
                )
        return self._fakes[known]

    def _insert(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        if self._cursor is None or self._owner is None:
            raise RewriteError("no place to insert", where=self._pass)
        if self._cursor.op == "placeholder":  # inputs come first, those added later, too
            self._cursor = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(self._cursor):
            node = self.graph.call_function(target, args, kwargs)
        stack = self._owner.meta.get("nn_module_stack")
        if stack is not None:
            node.meta["nn_module_stack"] = stack
        self._adopt(node)
        self._cursor = node
        self.spliced.append(node)
        return node

    def _adopt(self, node: fx.Node) -> None:
        """Note which pass a new node is of."""
        node.meta["toma_fx"] = self._pass
        self._record("insert", node)

    def inline(self, node: fx.Node, body: fx.Graph, operands: Sequence[Any]) -> None:
        """Put the nodes of `body`, called on `operands`, where `node` calls it.

        `node` returns a tuple and is used by `getitem` alone, as higher-order operators are.
        """
        mapping: dict[fx.Node, Any] = dict(
            zip(body.find_nodes(op="placeholder"), operands, strict=True)
        )
        with self.graph.inserting_before(node):
            results: Any = self.graph.graph_copy(body, mapping)
        for old, new in mapping.items():
            if old.op != "placeholder":
                self._adopt(new)
        for user in list(node.users):
            self.replace(user, results[user.args[1]])
        self.erase(node)

    # -- changes -----------------------------------------------------------------------------------

    def replace_input(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Make `user` read `new` where it read `old`."""
        if old not in user.all_input_nodes:
            raise RewriteError("not an input", where=user.format_node() or user.name, got=old.name)
        user.replace_input_with(old, new)
        if strides_of(old.meta.get("val")) != strides_of(new.meta.get("val")):
            self._restrided.add(user)
        self._record("replace input", user)

    def replace_uses(self, old: fx.Node, new: fx.Node, keep: Collection[fx.Node] = ()) -> None:
        """Make every user of `old` but those in `keep` read `new`."""
        for user in list(old.users):
            if user not in keep:
                self.replace_input(user, old, new)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Make every user of `old` read `new`, and erase `old`."""
        self.replace_uses(old, new)
        self.erase(old)

    def set_argument(self, node: fx.Node, index: int, value: Any) -> None:
        """Set `node.args[index]`; the value of the node stays what it is."""
        node.update_arg(index, value)
        self._record("set argument", node)

    def set_operand(self, node: fx.Node, index: int, name: str, value: fx.Node) -> None:
        """Make `value` the argument `index` of a call, which may be given as the keyword `name` or
        be the first that is left out. What the call returns may then have other strides."""
        if name in node.kwargs:
            node.update_kwarg(name, value)
        else:
            node.args = (*node.args[:index], value, *node.args[index + 1 :])
        self._restrided.add(node)
        self._record("set operand", node)

    def set_literal(self, node: fx.Node, path: Sequence[int], value: int | fx.Node) -> None:
        """Set the literal `node.args[path]`, an int, to another or to a node that counts it."""
        args: list[Any] = list(node.args)
        if len(path) == 1:
            current, args[path[0]] = args[path[0]], value
        else:
            inner = list(args[path[0]])
            current, inner[path[1]] = inner[path[1]], value
            args[path[0]] = inner
        if not isinstance(current, int):
            raise RewriteError(
                "not a literal", where=node.format_node() or node.name, got=str(current)
            )
        node.args = tuple(args)
        self._record("set literal", node)

    def retype(self, node: fx.Node) -> None:
        """Recompute the fake value of a node from its inputs."""
        try:
            with faking(self._mode):
                node.meta["val"] = fake_result(node)
        except Exception as error:  # any operator of torch may run here
            raise RewriteError(
                "a node does not run on merged tokens",
                where=f"{self._pass}: {node.format_node()}",
                got=f"{type(error).__name__}: {error}",
                hint="please report this model; exclude= the module meanwhile",
            ) from error

    def restride(self, node: fx.Node) -> None:
        """Say that a value has other strides, but not another shape, for those that read it."""
        self._restrided.update(node.users)

    def _update_strides(self) -> None:
        """Recompute values whose inputs have other strides than before.

        A view that the strides of its input no longer allow becomes a reshape. A node that runs no
        more, or has another shape or dtype than recorded, is left for verification to report.
        """
        pending, self._restrided = self._restrided, set()
        for node in self.graph.nodes if pending else ():
            if node not in pending or node.op != "call_function":
                continue
            before, value = node.meta["val"], self._rerun(node)
            if value is None or describe(value) != describe(before):
                continue
            node.meta["val"] = value
            if strides_of(value) != strides_of(before):
                pending.update(node.users)

    def _rerun(self, node: fx.Node) -> Any:
        """The value of a node on its inputs as they are now; None if it does not run."""
        with faking(self._mode):
            try:
                return fake_result(node)
            except Exception:  # any operator of torch may run here
                if node.target is not torch.ops.aten.view.default:
                    return None
            node.target = torch.ops.aten.reshape.default
            self._record("view becomes reshape", node)
            return fake_result(node)

    def set_module_stacks(self, stacks: Mapping[fx.Node, ModuleStack]) -> None:
        """Say which modules nodes belong to."""
        for node, stack in stacks.items():
            node.meta["nn_module_stack"] = dict(stack)

    # -- inputs and outputs ------------------------------------------------------------------------

    def flatten_signature(self) -> None:
        """Take and return flat tuples, whatever trees the graph took and returned."""
        output = self.graph.output_node()
        self.graph.set_codegen(fx.graph.CodeGen())
        output.args = (tuple(tree_leaves(output.args[0])),)
        self._record("flatten signature", output)

    def add_outputs(self, nodes: Sequence[fx.Node]) -> None:
        """Append outputs."""
        output = self.graph.output_node()
        results: Any = output.args[0]
        output.args = ((*results, *nodes),)
        self.outputs += [n.meta["val"] for n in nodes]
        self._record("add outputs", output)

    # -- erasing -----------------------------------------------------------------------------------

    def erase(self, node: fx.Node) -> None:
        """Erase a node that nothing reads; `RewriteError` if something does."""
        if node.users:
            users = ", ".join(n.name for n in node.users)
            raise RewriteError("a node in use can't be erased", where=node.name, got=users)
        if node.op == "placeholder":
            self.inputs.remove(node.name)
        self.graph.erase_node(node)
        self._record("erase", node)
        self.changed.discard(node)

    def erase_dead(self) -> None:
        """Erase nodes that nothing reads, readers before what they read, but no side effects."""
        for node in reversed(self.graph.nodes):
            if is_dead(node):
                self.erase(node)

    def _record(self, action: str, node: fx.Node) -> None:
        self.changed.add(node)
        self.log.append((self._pass, action, node.name))
