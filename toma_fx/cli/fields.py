"""Options of a command that are fields: of a method's configuration, and of a target.

    toma-fx build ... --method tomesd --ratio 0.4 --cache.every 3 --target onnx --opset 20
                        |               |                           |
                        chooses ToMeSDConfig                        chooses ONNXTarget

jsonargparse reads the fields' values and describes them, from the classes' annotations and
docstrings. The classes need torch: they are looked up when such a command is parsed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toma_fx.errors import ConfigError, UnknownNameError
from toma_fx.export.registry import TARGETS, target_class

EXPLAINS = ".help"
"""How an option ends that explains a field which is a configuration itself, and takes no value."""
SWITCH = ("true", "false")


def choosing_options(*, method: bool = True) -> argparse.ArgumentParser:
    """A parser, for `parents=`, of the options that say which configuration it is."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    if method:
        parser.add_argument("--method", help="how to merge (default toma; see docs/methods.md)")
    parser.add_argument("--preset", help="as balanced, or paper-sdxl")
    parser.add_argument("--recipe", type=Path, help="file that toma_fx.tune has written")
    return parser


class FieldParser(argparse.ArgumentParser):
    """Parser of a command. With `fields=True`, fields of the configuration that the arguments
    choose are options, too, and with a `--target` those of the target.

    The result has what was given of them, by name, as `fields` and `target_fields`, and the preset
    or the recipe, which is read once, as `toma`.
    """

    def __init__(self, *args: Any, fields: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._takes, self._classes = fields, dict[str, type[Any]]()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of any parser, but for the fields.

        Raises:
            UnknownNameError: no such method, preset, target or field.
            ConfigError: a field of another target, a preset and a recipe.
            RecipeError: the recipe can't be read.
        """
        if not self._takes:
            return super().parse_known_args(args, namespace)
        toma, self._classes = _chosen(args)
        given: dict[str, list[str]] = {owner: [] for owner in self._classes}
        own = self._split(list(args), given)
        namespace, rest = super().parse_known_args(own, namespace)
        namespace.toma = toma
        for owner in given:
            setattr(namespace, owner, _values(self._classes[owner], given[owner]))
        if rest and rest[0].startswith("--"):
            self._refuse(_field_name(rest[0]))
        return namespace, rest

    def format_help(self) -> str:
        """The command's own options, and the fields of what the arguments chose."""
        text = super().format_help()
        return text + "".join(f"\n{_reader(kind).format_help()}" for kind in self._classes.values())

    def _split(self, args: list[str], given: Mapping[str, list[str]]) -> list[str]:
        """Move fields and their values to `given`; returns the other arguments."""
        own = []
        while args:
            arg = args.pop(0)
            owner = self._owner(_field_name(arg)) if arg.startswith("--") else None
            if owner is None:
                own.append(arg)
                continue
            flag, equals, value = arg.partition("=")
            flag = flag.replace("-", "_").replace("__", "--", 1)
            kind = _annotations(self._classes[owner])[_field_name(arg)]
            if flag.endswith(EXPLAINS):
                given[owner].append(flag)
                continue
            if not equals:
                if kind == "bool" and (not args or args[0] not in SWITCH):
                    value = "true"
                elif not args:
                    self.error(f"argument {arg}: expected one argument")
                else:
                    value = args.pop(0)
            given[owner].append(f"{flag}={value}")
        return own

    def _owner(self, name: str) -> str | None:
        """Whose field it is: "fields", "target_fields" or nobody's."""
        for owner, kind in self._classes.items():
            if name in _annotations(kind):
                return owner
        return None

    def _refuse(self, name: str) -> None:
        """Raise the error for an option that is no field of what was chosen."""
        from toma_fx.methods.config import check_field_names

        chosen = self._classes.get("target_fields")
        for target in TARGETS if chosen is not None else ():
            if name in _annotations(target_class(target)):
                raise ConfigError(
                    "an option of another target",
                    where=f"--{name}",
                    expected=f"--target {target}",
                    got=f"--target {next(t for t in TARGETS if target_class(t) is chosen)}",
                )
        own = re.findall(r"--([\w-]+)", self.format_usage())
        if near := difflib.get_close_matches(name.replace("_", "-"), own, 1, 0.75):
            raise UnknownNameError(
                f"unknown option --{name}", where=self.prog, hint=f"nearest: --{near[0]}"
            )
        check_field_names(self._classes["fields"], [name])


def _field_name(arg: str) -> str:
    """`--cache.every=3` as "cache"."""
    return arg.removeprefix("--").partition("=")[0].partition(".")[0].replace("-", "_")


def _annotations(kind: type[Any]) -> dict[str, str]:
    """Annotations of the fields, by name."""
    return {field.name: str(field.type) for field in dataclasses.fields(kind)}


def _chosen(args: Sequence[str]) -> tuple[Any, dict[str, type[Any]]]:
    """What the preset or the recipe says, and the classes that the arguments choose.

    Returns:
        (`toma` of `optimize`, classes of the configuration and of the target, if there is one).
    """
    from toma_fx.methods.config import make_config
    from toma_fx.methods.recipe import Recipe

    parser = argparse.ArgumentParser(
        add_help=False, parents=[choosing_options()], allow_abbrev=False
    )
    parser.add_argument("--target")
    chosen, _ = parser.parse_known_args(args)
    toma = config = chosen.preset or True
    if chosen.recipe is not None:
        if chosen.preset:
            raise ConfigError(
                "a preset and a recipe", where="--recipe", expected="one of them", got="both"
            )
        toma = Recipe.load(chosen.recipe)
        config = toma.config
    classes: dict[str, type[Any]] = {"fields": type(make_config(config, chosen.method))}
    if chosen.target in TARGETS:  # if not, the command's own parser says so
        classes["target_fields"] = target_class(chosen.target)
    return toma, classes


def _reader(kind: type[Any]) -> Any:
    """The parser of a class's fields alone."""
    from jsonargparse import ArgumentParser

    reader = ArgumentParser(
        add_help=False, usage=argparse.SUPPRESS, exit_on_error=False, allow_abbrev=False
    )
    reader.add_class_arguments(kind, instantiate=False)
    return reader


def _values(kind: type[Any], words: Sequence[str]) -> dict[str, Any]:
    """The values of the given fields.

    One that is not of its field's type stays as it was written, for the class to refuse in its own
    words, which know the field.
    """
    reader, values = _reader(kind), dict[str, Any]()
    names = dict.fromkeys(map(_field_name, words))
    for name in names:
        own = [word for word in words if _field_name(word) == name]
        try:
            value = reader.parse_args(own, defaults=False).as_dict()[name]
        except argparse.ArgumentError:
            value = _plain(own[-1].partition("=")[2])
        # a field that may be a configuration: its fields, which the class completes
        nested = isinstance(value, dict) and "init_args" in value
        values[name] = value["init_args"] if nested else value
    return values


def _plain(text: str) -> Any:
    """A value of whatever type it looks like."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
