"""Configurations that differ by module path: what is included, excluded, overridden."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

from toma_fx.errors import ConfigError, UnknownNameError, nearest
from toma_fx.methods.checks import fits, is_number, shorten, with_tuples

Fields = Mapping[str, Any] | tuple[tuple[str, Any], ...]
"""{field: value}, or the same as pairs."""
Overrides = Mapping[str, Mapping[str, Any]] | tuple[tuple[str, Fields], ...]
"""{module path pattern: {field: value}}, or the same as nested tuples."""


class ByPath:
    """For frozen dataclasses with `include`, `exclude` and `overrides` (shell wildcards).

    Class attributes:
        overridable: fields that `overrides` may set. prefix: of the names of fields in errors.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    overrides: Overrides
    overridable: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str] = ""

    def at(self, path: str) -> Self:
        """The configuration that holds for the module `path`, overrides applied."""
        fields: dict[str, Any] = {}
        for pattern, values in self._overrides():
            if fnmatchcase(path, pattern):
                fields.update(dict(values))
        return self._with(fields) if fields else self

    def admits(self, path: str) -> bool:
        """Whether `include` and `exclude` admit the module `path`."""
        included = not self.include or any(fnmatchcase(path, p) for p in self.include)
        return included and not any(fnmatchcase(path, p) for p in self.exclude)

    def path_patterns(self) -> tuple[str, ...]:
        """Every module path pattern that the configuration mentions."""
        return (*self.include, *self.exclude, *(pattern for pattern, _ in self._overrides()))

    def require(
        self, valid: bool, name: str, expected: str, error: type[ConfigError] = ConfigError
    ) -> None:
        """Raise `error` about the field `name` unless its value is `valid`."""
        if not valid:
            got, where = shorten(getattr(self, name)), f"{self.prefix}{name}"
            hint = _hint_number(name, getattr(self, name))
            raise error(
                f"{name} is out of range", where=where, expected=expected, got=got, hint=hint
            )

    # -- as plain values ------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        out["overrides"] = {pattern: dict(values) for pattern, values in self._overrides()}
        return out

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that `to_dict` gave, also after a turn through JSON.

        Raises:
            UnknownNameError: a field that there is not. ConfigError: a value out of its domain, or
                the fields are of another method.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                "no fields",
                where=f"{cls.__name__}.from_dict",
                expected="a mapping of fields, as to_dict() gives it",
                got=type(values).__name__,
            )
        fields, name = dict(values), getattr(cls, "name", None)
        method = fields.pop("method", name)
        if method != name:
            raise ConfigError(
                "these are the fields of another method",
                where=f"{cls.__name__}.from_dict",
                expected=repr(name),
                got=repr(method),
                hint="toma_fx.optimize(model, values, method=...) takes fields of any method",
            )
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for each in fields:
            if each not in known:
                raise UnknownNameError(
                    f"unknown field {each!r}", where=cls.__name__, hint=nearest(each, known)
                )
        return cls(**{each: with_tuples(value) for each, value in fields.items()})

    def _with(self, fields: Mapping[str, Any]) -> Self:
        """The configuration of one path: no overrides, some fields replaced."""
        one: Any = self
        copy: Self = dataclasses.replace(one, **{"overrides": (), **fields})
        return copy

    def _overrides(self) -> Iterable[tuple[str, Any]]:
        overrides: Any = self.overrides
        return overrides.items() if isinstance(overrides, Mapping) else overrides

    def _freeze_overrides(self) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
        """Overrides as nested tuples, each validated by building the configuration it leads to."""
        form = "{module path pattern: {field: value}}"
        self.require(fits(self.overrides, Overrides), "overrides", form)
        frozen = []
        for pattern, values in self._overrides():
            for name in dict(values):
                if name not in self.overridable:
                    raise UnknownNameError(
                        f"{name!r} cannot be overridden per path",
                        where=f"{self.prefix}overrides[{pattern!r}]",
                        expected=", ".join(self.overridable),
                        hint=nearest(name, self.overridable),
                    )
            self._with(dict(values))
            frozen.append((pattern, tuple(sorted(dict(values).items()))))
        return tuple(frozen)


def _hint_number(name: str, value: Any) -> str:
    """What was probably meant by a number that a field does not take; "" if that can't be told."""
    if isinstance(value, str):
        try:
            return f"a number, without quotes: {float(value):g}"
        except ValueError:
            return ""
    if name == "ratio" and is_number(value) and 1 < value < 100:
        return f"{value:g} % is ratio={value / 100:g}"
    return ""
