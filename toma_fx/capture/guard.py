"""Whether a model is still the one that was captured.

A graph is baked from a model's modules, its parameters and its plain Python attributes (adapter
scales, processors, flags). `ModelGuard` remembers them by identity and by value: `holds` compares
in about a millisecond and is asked at every step; `key` names the state by value, so that a model
that returns to an earlier state (an adapter switched back) finds its earlier graphs.

Of what a model's Python code reads from elsewhere, `home` names autocast regions and diffusers'
attention backend. Outside the guard: values inside tensors (shared with the graph, a change shows
at once) and everything else that lies outside the model.

What other libraries do inside a forward pass that a graph can't follow is refused by name.
"""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from toma_fx.capture.companions import (
    KERNELS,
    _active_backend,
    _autocast,
    _check_hooks,
    _check_parallel,
    _dispatching,
)
from toma_fx.errors import AdapterError, CompanionError

_INTERNAL = frozenset(
    {*nn.Module().__dict__, "_is_full_backward_hook", "_compiled_call_impl"} - {"training"}
)


STAND_IN = frozenset({"_hf_hook", "_old_forward", "forward", "_diffusers_hook"})
"""Attributes by which other libraries wrap the call of a module; at the root they are not part of
the graph."""


_CONTAINERS = (nn.ModuleDict, nn.ParameterDict, nn.ModuleList, nn.Sequential, nn.Identity)
"""Modules without behaviour of their own: only what they hold counts."""


_NOTES = frozenset(
    {"peft_config", "_hf_peft_config_loaded", "lora_scale", "_safe_fusing", "_cache_config"}
)
"""Attributes that record how a model came about and that its forward pass does not read."""


_SWITCHES = frozenset({"_active_adapter", "_disable_adapters", "merged_adapters"})


class ModelGuard:
    """What the graph of `model` depends on, remembered.

    Attributes:
        key: digest of the state by value; parameters count by identity.

    Raises:
        CompanionError: another library acts inside the forward pass (`OffloadError`: by hooks).
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules(remove_duplicate=True))
        _check_parallel(model)
        _check_hooks(modules)
        self._dispatching = _dispatching(modules)
        objects = [*modules.values(), *_helpers(modules.values())]
        hooks = [table for m in modules.values() for table in _hook_tables(m)]
        self._root = vars(model)
        self._first = next(model.parameters(), None)
        self._tables: list[Mapping[Any, Any]] = [d for m in modules.values() for d in _named(m)]
        self._tables += [table for table in hooks if table]
        self._sized = [*(vars(o) for o in objects if o is not model), *self._tables, *hooks]
        self._plain: list[tuple[Callable[[Any], Any], dict[str, Any]]] = []
        self._opaque: list[tuple[Callable[[Any], Any], dict[str, Any]]] = []
        self._lists: list[Any] = []
        for each in objects:
            plain, opaque = _attributes(each, root=each is model)
            if plain:
                self._plain.append((itemgetter(*plain), vars(each)))
            self._opaque += [(itemgetter(name), vars(each)) for name in opaque]
        values = [get(d) for get, d in self._opaque]
        self._tables += [v for v in values if type(v) is dict]
        self._lists = [v for v in values if type(v) in (list, tuple)]
        # the objects themselves are kept: the address of a freed one may be used again
        self._objects = self._look()
        self._values = self._read()
        self.key = _digest(modules)

    def holds(self) -> bool:
        """Whether nothing has changed since this guard was made."""
        try:
            now = self._look()
            same = len(now) == len(self._objects) and all(map(is_, now, self._objects))
            return same and self._read() == self._values
        except (KeyError, ValueError):  # an attribute is gone, or no longer a plain value
            return False

    @property
    def home(self) -> tuple[Any, ...]:
        """Where the model runs: dtype and device, autocast, attention backends.

        Dtype and device are those of its first parameter, if it has one. Of the parameter itself:
        while another thread traces, the model holds a stand-in for it.
        """
        if self._first is None:
            return _autocast("cpu"), self.backends
        device = self._first.device
        return self._first.dtype, device, _autocast(device.type), self.backends

    @property
    def backends(self) -> tuple[str, ...]:
        """The attention backends of diffusers that act now; the global one where none is set."""
        active = _active_backend() if None in self._dispatching else ""
        return tuple(dict.fromkeys(active if n is None else n for n in self._dispatching))

    def kernel(self) -> AbstractContextManager[Any]:
        """What the graph runs under: the attention kernel that the backend asks for.

        In the graph attention is one op; which kernel runs it is not recorded there.

        Raises:
            CompanionError: parts of the model ask for different kernels.
        """
        kernels = {KERNELS.get(name) for name in self.backends}
        if len(kernels) > 1:
            raise CompanionError(
                "parts of the model ask for different attention kernels",
                where=self._using(next(name for name in self.backends if name in KERNELS))[0],
                expected="one attention backend for the whole model",
                got=", ".join(self.backends),
                hint="denoiser.set_attention_backend(...), or denoiser.reset_attention_backend()",
            )
        kernel = next(iter(kernels), None)
        return nullcontext() if kernel is None else sdpa_kernel(kernel)

    def check_merging(self, merges: Callable[[str], bool]) -> None:
        """Refuse to merge where it would not do what it should.

        Args:
            merges: whether attention at a module path is to be merged; of "", whether anything is.

        Raises:
            CompanionError: inside an autocast region, or attention is to be merged and its backend
                isn't torch's own.
        """
        autocast = _autocast("cpu" if self._first is None else self._first.device.type)
        if autocast and merges(""):
            # the graph leaves casting to autocast, which would also cast what selects the tokens
            raise CompanionError(
                "tokens are selected in float32, and autocast would round that",
                where="torch.autocast around the call",
                expected="no autocast region around the optimized denoiser",
                got=", ".join(f"torch.autocast({kind!r}, {dtype})" for kind, dtype in autocast),
                hint="cast the model instead: denoiser.to(torch.bfloat16), and call it outside, or "
                "inside torch.autocast(..., enabled=False)",
            )
        for name in self.backends:
            if name == "native" or name in KERNELS:
                continue
            where = next(filter(merges, self._using(name)), None)
            if where is not None:
                raise CompanionError(
                    "the attention backend hides the attention",
                    where=where,
                    expected="torch's scaled_dot_product_attention in the graph",
                    got=f"the attention backend {name!r}",
                    hint='denoiser.set_attention_backend("native"), and compile: denoiser.compile()'
                    '; or leave attention alone: branches=("mlp",)',
                )

    def _using(self, backend: str) -> list[str]:
        """Paths of the modules whose attention a backend computes."""
        own = self._dispatching.get(backend, [])
        active = self._dispatching.get(None, []) if backend == _active_backend() else []
        return [*own, *active]

    def _look(self) -> list[Any]:
        """Modules, parameters, buffers, hooks and other objects, to be compared by identity."""
        found = [v for d in self._tables for v in d.values()]
        found += [get(d) for get, d in self._opaque]
        found += [v for values in self._lists for v in values]
        return found

    def _read(self) -> tuple[Any, ...]:
        """How many attributes, children and hooks there are, and plain values."""
        own = sum(name not in _wrapped(self._root) for name in self._root)
        return own, sum(map(len, self._sized)), marshal.dumps([g(d) for g, d in self._plain], 2)


def _named(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._modules, module._parameters, module._buffers


def _hook_tables(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks


def _is_plain(value: Any) -> bool:
    try:
        marshal.dumps(value, 2)
    except ValueError:
        return False
    return True


def _wrapped(own: Mapping[str, Any]) -> frozenset[str]:
    """Which attributes of the root are others' wrapping; a `forward` of its own is not."""
    return STAND_IN if "_old_forward" in own else STAND_IN - {"forward"}


def _attributes(owner: Any, *, root: bool) -> tuple[list[str], list[str]]:
    """Names of the attributes of a module or helper: plain values, and all others."""
    plain: list[str] = []
    opaque: list[str] = []
    if type(owner) in _CONTAINERS:
        return plain, opaque
    wrapped = _wrapped(vars(owner))
    for name, value in vars(owner).items():
        if name in _INTERNAL or name in _NOTES or (root and name in wrapped):
            continue
        if _is_leftover(owner, name, value):
            continue
        (plain if _is_plain(value) else opaque).append(name)
    return plain, opaque


def _is_leftover(owner: Any, name: str, value: Any) -> bool:
    """What hooks leave behind when removed: an empty registry, the class's own forward put back."""
    if name == "_diffusers_hook":
        return not getattr(value, "hooks", None)
    forward = getattr(type(owner), "forward", None)
    own = name == "forward" and getattr(value, "__func__", None) is forward
    return own and getattr(value, "__self__", None) is owner


def _helpers(owners: Iterable[Any], depth: int = 2) -> list[Any]:
    """Objects that modules hold and that act in the forward pass (attention processors)."""
    found: dict[int, Any] = {}
    for owner in owners:
        for name in _attributes(owner, root=False)[1]:
            value = vars(owner)[name]
            if _is_helper(value):
                found[id(value)] = value
    if depth > 1 and found:
        found.update({id(v): v for v in _helpers(found.values(), depth - 1)})
    return list(found.values())


def _is_helper(value: Any) -> bool:
    known = isinstance(value, (nn.Module, Tensor, Mapping, type))
    return not known and hasattr(value, "__dict__") and not hasattr(value, "__get__")


def _digest(modules: Mapping[str, nn.Module]) -> str:
    """The state by value: types, plain attributes, parameters by identity, buffers by shape.

    Of adapters (peft's tuner layers) only those that act count.
    """
    digest = hashlib.sha256()
    idle: set[str] = set()
    for path, module in modules.items():
        parent = path.rpartition(".")[0]
        if path in idle or parent in idle:
            idle.add(path)
            continue
        adapters = _adapters(module, path)
        if adapters is not None:
            names, acting = adapters
            idle.update(f"{path}.{k}.{n}" for k in module._modules for n in names - set(acting))
        parameters = [(name, id(p)) for name, p in module._parameters.items()]
        buffers = [(name, str(_shape(b))) for name, b in module._buffers.items()]
        hooks = [n for table in _hook_tables(module) for n in table]  # numbers never come again
        described = _described(module, root=not path, adapters=adapters)
        digest.update(repr((path, described, parameters, buffers, hooks)).encode())
    return digest.hexdigest()


Adapters = tuple[set[str], tuple[str, ...]]


def _adapters(module: nn.Module, path: str) -> Adapters | None:
    """(names of the adapters of a tuner layer, those that act now in order), None for others."""
    scaling = vars(module).get("scaling")
    if not isinstance(scaling, dict) or not vars(module).keys() >= _SWITCHES:
        return None
    if module._disable_adapters and module.merged_adapters:
        raise AdapterError(
            "fused adapters are switched off",
            where=path,
            expected="adapters that are fused, or switched off",
            got="both; the model itself would unfuse them in its next forward pass",
            hint="unfuse_lora() first",
        )
    active: Any = module._active_adapter
    acting = (active,) if isinstance(active, str) else tuple(active)
    if module._disable_adapters or module.merged_adapters:
        acting = ()
    return set(scaling), tuple(name for name in acting if name in scaling)


def _shape(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device)


def _described(
    owner: Any, *, root: bool = False, depth: int = 3, adapters: Adapters | None = None
) -> Any:
    """A value, type or structure by which two equal states agree."""
    if _is_plain(owner) or isinstance(owner, frozenset):
        return repr(owner)
    if isinstance(owner, Mapping):
        return [(repr(k), _described(v, depth=depth - 1)) for k, v in owner.items()]
    if isinstance(owner, Tensor):
        return id(owner)
    kind = f"{type(owner).__module__}.{type(owner).__qualname__}"
    if isinstance(owner, (list, tuple)):
        return kind, [_described(v, depth=depth - 1) for v in owner]
    if not hasattr(owner, "__dict__") or hasattr(owner, "__get__"):
        return repr(owner) if type(owner).__module__ == "torch" else f"{kind} {id(owner)}"
    if depth <= 0:
        return kind
    plain, opaque = _attributes(owner, root=root)
    values = vars(owner)
    if adapters is not None:
        names, acting = adapters
        values = {k: _only(v, names, acting) for k, v in values.items()}
        plain = [n for n in plain if n not in _SWITCHES]
        return kind, acting, [(n, _described(values[n], depth=2)) for n in (*plain, *opaque)]
    return kind, [(n, _described(values[n], depth=depth - 1)) for n in (*plain, *opaque)]


def _only(value: Any, names: set[str], acting: tuple[str, ...]) -> Any:
    """A table by adapter name, without the adapters that don't act."""
    if isinstance(value, dict) and value.keys() <= names:
        return {name: value[name] for name in acting if name in value}
    return value
