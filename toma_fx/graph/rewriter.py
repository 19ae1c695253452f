"""The one door for graph mutation: only `Rewriter` creates, changes or erases nodes.

It gives new nodes their fake value, keeps the module stack of the node they belong to, records
which pass did what, and refuses name collisions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from toma_fx.errors import RewriteError
from toma_fx.graph.verify import fake_result

Templates = dict[tuple[Hashable, Any], fx.GraphModule]
"""Traced snippets by key and input shapes."""


class Opaque:
    """A function as the target of one node: graphs with it run eagerly and can't be exported."""

    __name__ = "opaque"
    __module__ = __name__
    __qualname__ = "Opaque"

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)


class Rewriter:
    """Mutates one graph on behalf of passes.

    Attributes:
        graph_module: the graph being rewritten. log: (pass, action, node) of every change.
        changed: nodes made or changed since `settle`. spliced: nodes of the last `splice`.
    """

    def __init__(self, graph_module: fx.GraphModule, templates: Templates | None = None) -> None:
        """`templates` caches traced snippets; rewrites of one captured graph may share it."""
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.log: list[tuple[str, str, str]] = []
        self.changed: set[fx.Node] = set()
        self.spliced: list[fx.Node] = []
        self._templates: Templates = {} if templates is None else templates
        self._fakes: dict[Hashable, Any] = {}
        self._pass = ""
        self._cursor: fx.Node | None = None
        self._last_input = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        values = (n.meta.get("val") for n in self.graph.nodes)
        self.mode = next(v.fake_mode for v in values if hasattr(v, "fake_mode"))

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Attribute changes to the pass `name`."""
        self._pass = name
        yield
        self._pass = ""

    @contextmanager
    def after(self, *nodes: fx.Node) -> Iterator[None]:
        """Insert new nodes after the last of `nodes` in graph order."""
        previous, self._cursor = self._cursor, max(nodes)
        yield
        self._cursor = previous

    def settle(self) -> set[fx.Node]:
        """The nodes changed so far, still in the graph; starts a new count."""
        changed, self.changed = self.changed, set()
        return {n for n in changed if not n._erased}

    def index(self) -> dict[str, fx.Node]:
        """All nodes by name."""
        return {n.name: n for n in self.graph.nodes}

    def placeholder(self, name: str, like: Callable[[], Tensor]) -> fx.Node:
        """Append an input; `like` builds its fake value."""
        with self.graph.inserting_after(self._last_input):
            node = self.graph.placeholder(name)
        if node.name != name:
            self.graph.erase_node(node)
            raise RewriteError("a node of that name exists", where=self._pass, got=name)
        self._last_input = node
        with self.mode:
            node.meta["val"] = like()
        self._record("add input", node)
        return node

    def splice(
        self,
        key: Hashable,
        function: Callable[..., Any],
        inputs: Sequence[fx.Node],
        *,
        whole: bool = False,
    ) -> list[fx.Node]:
        """Trace `function` on the fake values of `inputs` and insert its nodes at the cursor.

        Equal `key` promises an equal function, so that its trace may be used again for inputs of
        the same shapes. `whole` inserts one node that calls the function, for what can't be traced
        because its shapes depend on the data. Returns the nodes of its outputs (a tensor, a number,
        or a tuple of tensors).
        """
        self.spliced = []
        fakes = [n.meta["val"] for n in inputs]
        if whole:
            return self._call(Opaque(function), tuple(inputs))
        traced = self._traced(key, function, fakes)
        mapping: dict[fx.Node, Any] = dict(
            zip((n for n in traced.graph.nodes if n.op == "placeholder"), inputs, strict=True)
        )
        results: list[fx.Node] = []
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                out = node.args[0]
                results = [mapping[n] for n in (out if isinstance(out, (tuple, list)) else [out])]
                break
            if node.op != "call_function":
                raise RewriteError(
                    "a method may only call functions of torch",
                    where=self._pass,
                    got=node.format_node() or "",
                    hint="make constant tensors with torch.arange and arithmetic, "
                    "not with torch.tensor",
                )
            args, kwargs = fx.map_arg((node.args, node.kwargs), mapping.__getitem__)
            mapping[node] = self._insert(node.target, args, kwargs, node.meta.get("val"))
        return results

    def _call(self, target: Opaque, inputs: tuple[fx.Node, ...]) -> list[fx.Node]:
        """One node that calls a function, and one for each of its results if it has several."""
        node = self._insert(target, inputs, {}, None)
        made = node.meta["val"]
        if not isinstance(made, tuple):
            return [node]
        return [self._insert(operator.getitem, (node, i), {}, x) for i, x in enumerate(made)]

    def fake(self, key: Hashable, function: Callable[[Tensor], Any], like: Tensor) -> Any:
        """What `function` gives for a fake tensor like `like`; kept by `key` and shape."""
        known = (key, (tuple(like.shape), like.dtype, like.device))
        if known not in self._fakes:
            with torch.no_grad(), self.mode:
                self._fakes[known] = function(
                    torch.empty(like.shape, dtype=like.dtype, device=like.device)
                )
        return self._fakes[known]

    def _traced(
        self, key: Hashable, function: Callable[..., Any], fakes: Sequence[Tensor]
    ) -> fx.GraphModule:
        like = tuple((tuple(f.shape), f.stride(), f.dtype, f.device) for f in fakes)
        if (key, like) not in self._templates:
            try:
                with torch.no_grad(), self.mode:
                    # spliced nodes share fake values, and tracing takes one value for one input
                    own = [torch.empty_strided(*shape, dtype=d, device=v) for *shape, d, v in like]
                    traced = make_fx(function, pre_dispatch=True)(*own)
            except Exception as error:  # a method's functions are anybody's code
                raise RewriteError(
                    "tokens can't be merged here",
                    where=f"{self._pass}: {key}",
                    got=f"{type(error).__name__}: {error}",
                    hint="exclude= the module, and please report this model",
                ) from error
            self._templates[key, like] = traced
        return self._templates[key, like]

    def _insert(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        if self._cursor is None:
            raise RewriteError("no place to insert", where=self._pass)
        with self.graph.inserting_after(self._cursor):
            node = self.graph.call_function(target, args, kwargs)
        stack = self._cursor.meta.get("nn_module_stack")
        if stack is not None:
            node.meta["nn_module_stack"] = stack
        node.meta["toma_fx"] = self._pass
        node.meta["val"] = value
        if value is None:
            self.retype(node)
        self._cursor = node
        self.spliced.append(node)
        self._record("insert", node)
        return node

    def replace_input(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Make `user` read `new` where it read `old`."""
        if old not in user.all_input_nodes:
            raise RewriteError("not an input", where=user.format_node() or user.name, got=old.name)
        user.replace_input_with(old, new)
        self._record("replace input", user)

    def replace_uses(self, old: fx.Node, new: fx.Node, keep: Collection[fx.Node]) -> None:
        """Make every user of `old` but those in `keep` read `new`."""
        for user in list(old.users):
            if user not in keep:
                self.replace_input(user, old, new)

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
            with self.mode:
                node.meta["val"] = fake_result(node)
        except Exception as error:  # any operator of torch may run here
            raise RewriteError(
                "a node does not run on merged tokens",
                where=f"{self._pass}: {node.format_node()}",
                got=f"{type(error).__name__}: {error}",
                hint="please report this model; exclude= the module meanwhile",
            ) from error

    def add_outputs(self, nodes: Sequence[fx.Node]) -> None:
        """Append outputs."""
        output = self.graph.output_node()
        results: Any = output.args[0]
        output.args = ((*results, *nodes),)
        self._record("add outputs", output)

    def erase_inputs(self, names: Collection[str]) -> None:
        """Erase inputs that no node uses (constants, which a graph has inside).

        Raises:
            RewriteError: one of them is used.
        """
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name not in names:
                continue
            if node.users:
                raise RewriteError("an input is in use", where=self._pass, got=node.name)
            self.graph.erase_node(node)
        self.graph_module.recompile()

    def erase_dead(self) -> None:
        """Erase nodes without users."""
        before = len(self.graph.nodes)
        self.graph.eliminate_dead_code()
        if len(self.graph.nodes) != before:
            self._record("erase dead code", self.graph.output_node())

    def _record(self, action: str, node: fx.Node) -> None:
        self.changed.add(node)
        self.log.append((self._pass, action, node.name))
