"""Whether a model is still the one that was captured.

A graph depends on a model's modules, its parameters and its plain Python attributes (adapter
scales, processors, flags). `ModelGuard` remembers them. At each step it asks two questions:

1. Was anything written? Every dictionary of the model has a version (see `compat.dict_version`),
   and few other containers hold state. This takes about 0.1 us a module. Where attributes are
   written without it (`compat.versions_see_attributes`), they are compared by identity instead.
2. If so: does anything differ? The model is walked and compared, objects by identity and plain
   values by value. An adapter scale that is set to what it was, or `eval()`, changes nothing.

`key` names the state by value: a model that returns to an earlier state (an adapter switched back)
finds its earlier graphs.

Outside the guard: values inside tensors (shared with the graph, a change shows at once); what
lies in classes, but for the `forward` and `__call__` of modules; and what lies outside the model,
of which `companions` follows some.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import is_
from typing import Any

from torch import nn

from toma_fx.capture.attributes import (
    ATOMS,
    HELPER_DEPTH,
    as_bytes,
    code_of,
    is_helper,
    tracked_attributes,
)
from toma_fx.capture.companions import Companions
from toma_fx.capture.fingerprint import CHANGED, Fingerprint
from toma_fx.capture.state_key import state_key
from toma_fx.compat.pytorch import (
    dict_version,
    hook_tables,
    module_tables,
    versions_see_attributes,
)


class ModelGuard:
    """What the graph of `model` depends on, remembered.

    Attributes:
        key: digest of the state by value; parameters count by identity.
        companions: what other libraries do around the model.

    Raises:
        CompanionError: another library acts inside the forward pass (`OffloadError`: by hooks).
        AdapterError: adapters are fused and switched off.
    """

    def __init__(self, model: nn.Module, *, runs: bool = True) -> None:
        """`runs`: whether the model will run, and not only be looked at."""
        self._model = model
        self._snapshot = Snapshot(model)
        self.companions = Companions(model, runs=runs)
        self.key = state_key(model)
        self._fingerprint: Fingerprint | None = None

    @property
    def fingerprint(self) -> Fingerprint:
        """The model by content; read once, when first asked for."""
        if self._fingerprint is None:
            if not self.holds():
                return Fingerprint(unknown=CHANGED)
            self._fingerprint = Fingerprint.of(self._model)
        return self._fingerprint

    def holds(self) -> bool:
        """Whether the model is what it was when this guard was made."""
        if self._snapshot.is_untouched():
            return True
        now = Snapshot(self._model)
        if now != self._snapshot:
            return False
        self._snapshot = now
        return True


class Snapshot:
    """The state of a model. Two are equal if nothing differs that a graph may depend on."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, model: nn.Module) -> None:
        self._version = dict_version()
        # what is compared: types, names and lengths; plain values; all others, by identity
        self._shape: list[Any] = []
        self._plain: list[Any] = []
        self._objects: list[Any] = []
        # what may be written: dictionaries, and other containers with their contents
        self._dicts: list[dict[Any, Any]] = []
        self._versions = 0  # their sum: versions only grow
        self._empty: list[Collection[Any]] = []
        self._data: list[Any] = []
        self._lists: list[tuple[Collection[Any], list[Any]]] = []
        # attributes, where versions of dictionaries do not tell that they were written
        self._attributes: list[tuple[dict[str, Any], list[Any]]] = []
        self._owners: list[tuple[Any, int]] = [(model, 0)]
        self._seen = {id(model)}
        for owner, depth in self._owners:  # grows as it is walked
            self._add_owner(owner, depth, root=owner is model)
        self._parts = [owner for owner, _ in self._owners if isinstance(owner, nn.Module)]
        self._classes = list(map(type, self._parts))
        self._kinds = tuple(dict.fromkeys(self._classes))
        self._functions = list(map(code_of, self._kinds))
        self._bytes = as_bytes(self._data)
        # read in the order of addresses, memory is fetched ahead
        self._dicts.sort(key=id)
        self._empty.sort(key=id)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Snapshot)
            and self._shape == other._shape
            and self._plain == other._plain
            and _same_items(self._objects, other._objects)
            and self._functions == other._functions
        )

    def is_untouched(self) -> bool:
        """Whether nothing of the model was written since, be it with equal values."""
        return (
            not any(self._empty)
            and sum(map(self._version, self._dicts)) == self._versions
            and list(map(type, self._parts)) == self._classes
            and list(map(code_of, self._kinds)) == self._functions
            and as_bytes(self._data) == self._bytes
            and all(_same_items(items, before) for items, before in self._lists)
            and all(_same_items(_flat(table), before) for table, before in self._attributes)
        )

    def _add_owner(self, owner: Any, depth: int, *, root: bool) -> None:
        """A module or helper: its type, what it holds and its attributes."""
        self._shape.append(type(owner))
        self._watch_attributes(vars(owner))
        if isinstance(owner, nn.Module):
            tables: tuple[dict[Any, Any], ...] = (*module_tables(owner), *hook_tables(owner))
            for table in tables:
                self._add_table(table)
            for child in list(tables[0].values()):
                self._follow(child, 0)
        for name, value in tracked_attributes(owner, root=root).items():
            self._shape.append(name)
            self._add(value, depth)

    def _add_table(self, table: dict[Any, Any]) -> None:
        """Children, parameters, buffers or hooks of a module, by name or number."""
        self._watch(table)
        self._shape += (len(table), *table)
        self._objects += table.values()

    def _add(self, value: Any, depth: int) -> None:
        """A value that an attribute or a container of `owner` holds."""
        kind = type(value)
        self._shape.append(kind)
        if kind in ATOMS:
            # 0.0 == -0.0, nan != nan
            self._plain.append(repr(value) if kind in (float, complex) else value)
        elif isinstance(value, dict):
            self._watch(value)
            self._add_items(value, [each for pair in list(value.items()) for each in pair], depth)
        elif isinstance(value, (list, set, tuple, frozenset)):
            if isinstance(value, (list, set)):
                self._watch_items(value)
            self._add_items(value, list(value), depth)
        else:
            self._add_object(value, depth)

    def _add_items(self, container: Any, items: list[Any], depth: int) -> None:
        self._shape.append(len(items))
        if id(container) not in self._seen:  # a container may hold itself
            self._seen.add(id(container))
            for item in items:
                self._add(item, depth)

    def _add_object(self, value: Any, depth: int) -> None:
        """An array, compared by its contents, or any other object."""
        data = None if isinstance(value, nn.Module) else as_bytes(value)
        if data is None:
            self._objects.append(value)
            if depth < HELPER_DEPTH and is_helper(value):
                self._follow(value, depth + 1)
        else:
            self._plain.append(data)
            self._data.append(value)

    def _follow(self, owner: Any, depth: int) -> None:
        if owner is not None and id(owner) not in self._seen:
            self._seen.add(id(owner))
            self._owners.append((owner, depth))

    def _watch(self, table: dict[Any, Any]) -> None:
        """Notice writes to a dictionary; call it before its contents are read."""
        if table:
            self._dicts.append(table)
            self._versions += self._version(table)
        else:
            self._empty.append(table)

    def _watch_attributes(self, table: dict[str, Any]) -> None:
        """Notice writes to the attributes of an object; call it before they are read."""
        if versions_see_attributes():
            self._watch(table)
        else:
            self._attributes.append((table, _flat(table)))

    def _watch_items(self, items: Collection[Any]) -> None:
        if not items:
            self._empty.append(items)
        elif as_bytes(items) is not None:
            self._data.append(items)
        else:
            self._lists.append((items, list(items)))


def _flat(table: dict[str, Any]) -> list[Any]:
    """Names and values."""
    return [*table, *table.values()]


def _same_items(one: Collection[Any], other: Collection[Any]) -> bool:
    """Whether two collections hold the very same objects."""
    return len(one) == len(other) and all(map(is_, one, other))
