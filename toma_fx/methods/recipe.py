"""Recipes: a configuration that was found for a model, in a file that travels.

recipe = toma_fx.tune(pipe, cases, speedup=1.8)
recipe.save("recipe.json")
pipe.unet = toma_fx.optimize(pipe.unet, toma_fx.Recipe.load("recipe.json"))
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from toma_fx.errors import RecipeError
from toma_fx.files import write_file
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.checks import with_tuples
from toma_fx.methods.config import METHODS, make_config

VERSION = 1
"""Version of the form of the file; readers refuse others."""
FILE = "recipe.json"
"""Name of the file in a folder or a repository of the hub."""
_SUFFIXES = {".json", ".yaml", ".yml"}


@dataclass(frozen=True)
class Recipe:
    """A configuration, which model it is for, and what was measured with it.

    Attributes:
        config: which tokens merge where and when, and which steps compute.
        model: class of the denoiser; "" for any. architecture: fingerprint of its configuration,
            whatever its weights, adapters and dtype; "" for any.
        measured: what was found out about it, as JSON-able values; for people.
    """

    config: MethodConfig
    model: str = ""
    architecture: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    def check_model(self, model: str, architecture: str) -> None:
        """Raise unless the recipe is for this model.

        Raises:
            RecipeError: it is for another one.
        """
        wanted = self.model or model, self.architecture or architecture
        if wanted != (model, architecture):
            raise RecipeError(
                "the recipe is for another model",
                where="recipe",
                expected=f"{self.model} of architecture {self.architecture[:12]}",
                got=f"{model} of architecture {architecture[:12]}",
                hint="toma_fx.tune finds one for this model; recipe.config is the configuration "
                "alone, which any model takes that has such modules",
            )

    # -- files ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out: dict[str, Any] = {"version": VERSION, **values, "config": self.config.to_dict()}
        return out

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(
        cls, data: Any, where: str = "recipe", methods: tuple[type[MethodConfig], ...] = ()
    ) -> Self:
        """From JSON-able values.

        Args:
            where: of errors. methods: classes of methods that are not built in.

        Raises:
            RecipeError: not of this form. UnknownNameError, ConfigError: a configuration that
                there is not.
        """
        if not isinstance(data, dict) or data.get("version") != VERSION:
            got = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise _malformed(where, f"a recipe of version {VERSION}", repr(got))
        names = {f.name for f in dataclasses.fields(cls)}
        values = {name: value for name, value in data.items() if name != "version"}
        if not {"config"} <= values.keys() <= names:
            raise _malformed(where, "the fields " + ", ".join(sorted(names)), str(sorted(values)))
        for name, kind in (("config", dict), ("model", str), ("architecture", str),
                           ("measured", dict)):  # fmt: skip
            if not isinstance(values.get(name, kind()), kind):
                raise _malformed(where, f"{name} as {kind.__name__}", repr(values[name])[:80])
        return cls(**{**values, "config": _config_of(values["config"], methods)})

    def save(self, path: str | Path) -> None:
        """Write a file, as JSON or, by its name, YAML; one that is there is replaced at once.

        Raises:
            RecipeError: neither .json nor .yaml.
        """
        path = Path(path)
        if is_yaml_file(path):
            import yaml

            data = json.loads(self.to_json())  # tuples become lists, as a reader sees them
            text = yaml.safe_dump(data, sort_keys=False)
        else:
            text = self.to_json() + "\n"
        write_file(path, text)

    @classmethod
    def load(cls, path: str | Path, methods: tuple[type[MethodConfig], ...] = ()) -> Self:
        """Read a file, or the one in a folder.

        Args:
            methods: classes of methods that are not built in.

        Raises:
            RecipeError: no such file, or not a recipe. As `from_dict`.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        is_yaml = is_yaml_file(path)
        try:
            text = path.read_text(encoding="utf-8")
            if is_yaml:
                import yaml

                data = yaml.safe_load(text)
            else:
                data = json.loads(text)
        except OSError as error:
            raise _malformed(str(path), "a file that can be read", str(error)) from error
        except Exception as error:  # YAML's errors, JSON's, and text that is not UTF-8
            got = str(error).splitlines()[0]
            raise _malformed(str(path), "YAML" if is_yaml else "JSON", got) from error
        return cls.from_dict(data, str(path), methods)

    # -- hub ------------------------------------------------------------------------------------

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish it as `recipe.json` in a repository of the Hugging Face hub, by its mixin.

        Args:
            repo_id: as "name/repository". options: of huggingface_hub's
                `ModelHubMixin.push_to_hub` (private, token, revision, ...).

        Returns:
            The address of the commit.
        """
        return str(_hub_class()(self).push_to_hub(repo_id, **options))

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Read the `recipe.json` of a repository of the hub, or of a folder.

        Args:
            options: of huggingface_hub's `hf_hub_download` (revision, token, cache_dir, ...).

        Raises:
            RecipeError: it can't be had, or is none. As `from_dict`.
        """
        if Path(source).is_dir():
            return cls.load(source)
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(str(source), FILE, **options)
        except OSError as error:  # what the hub's errors are, too
            got = str(error).splitlines()[0]
            raise _malformed(str(source), "a folder, or a repository of the hub", got) from error
        return cls.load(path)


def _config_of(data: Mapping[str, Any], methods: tuple[type[MethodConfig], ...]) -> MethodConfig:
    """The configuration that `MethodConfig.to_dict` gave."""
    fields = {name: with_tuples(value) for name, value in data.items() if name != "method"}
    by_name = {cls.name: cls for cls in (*METHODS, *methods)}
    method = data.get("method", METHODS[0].name)
    return make_config(True, by_name.get(method, method), fields)


def is_yaml_file(path: Path) -> bool:
    """Whether a file of a recipe is YAML by its name, not JSON.

    Raises:
        RecipeError: neither.
    """
    if path.suffix not in _SUFFIXES:
        raise _malformed(str(path), "a name that ends in .json, .yaml or .yml", path.name)
    return path.suffix != ".json"


def _malformed(where: str, expected: str, got: str) -> RecipeError:
    return RecipeError("not a recipe", where=where, expected=expected, got=got)


def _hub_class() -> Any:
    """A recipe as huggingface_hub's mixin wants it; imported late, since that takes a while."""
    from huggingface_hub import ModelHubMixin

    class OnHub(ModelHubMixin, library_name="toma_fx", tags=["toma_fx", "recipe"]):
        def __init__(self, recipe: Recipe) -> None:
            self.recipe = recipe

        def _save_pretrained(self, save_directory: Path) -> None:
            self.recipe.save(save_directory / FILE)

    return OnHub
