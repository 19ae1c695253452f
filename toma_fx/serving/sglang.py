"""The diffusers back end of SGLang-Diffusion, with merged tokens and cached steps.

    worker:  entry point `sglang.multimodal_gen.plugins` -> register -> a hook after build_pipeline
             build_pipeline(server_args) -> pipeline -> optimize_built(pipeline, server_args)

SGLang batches whole requests: each call of the pipeline is a generation, which the optimized
pipeline tells its denoisers. The plug-in is found wherever both packages are installed, so it does
nothing unless the environment asks for it:

    TOMA_FX_SGLANG='{"ratio": 0.5, "cache": "balanced"}' sglang serve --backend diffusers ...

Contract: SGLang 0.5.23, `multimodal_gen/runtime/platforms/plugins.py` and its `HookRegistry`.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from toma_fx.api import optimize
from toma_fx.errors import ConfigError, MissingPackageError
from toma_fx.export.packages import import_package
from toma_fx.methods.recipe import Recipe
from toma_fx.run.denoiser import OptimizedDenoiser
from toma_fx.run.pipelines import COMPONENTS

VARIABLE = "TOMA_FX_SGLANG"
"""Variable of the environment: options of `toma_fx.optimize` as a JSON object, besides `recipe`,
the path of a recipe, and `compile`, whether the programs are compiled."""
TARGET = "sglang.multimodal_gen.runtime.pipelines_core.build_pipeline"
_log = logging.getLogger("toma_fx.serving")


def register() -> None:
    """Ask SGLang to call `optimize_built`; the entry point `sglang.multimodal_gen.plugins`.

    Options are read later: SGLang logs what a plug-in raises here, and goes on without it.
    """
    if not os.environ.get(VARIABLE):
        return
    name = "sglang.multimodal_gen.runtime.platforms.plugins"
    plugins = import_package(
        name,
        lambda _: MissingPackageError(
            "the plug-in needs SGLang", where=name, hint="pip install 'sglang[diffusion]'"
        ),
    )
    plugins.HookRegistry.register(TARGET, optimize_built, plugins.HookType.AFTER)


def optimize_built(pipeline: Any, server_args: Any) -> Any:
    """Optimize the denoisers of a pipeline that SGLang has built; what it raises ends the worker.

    Args:
        pipeline: of the diffusers back end. server_args: of SGLang.

    Returns:
        The same pipeline.

    Raises:
        ConfigError: SGLang's own models are not those of diffusers; they, or the denoisers, are
            compiled or cached by SGLang already; or the options are none. As `toma_fx.optimize`.
    """
    options = read_options(os.environ.get(VARIABLE, ""))
    inner = getattr(pipeline, "diffusers_pipe", None)
    if inner is None:
        raise ConfigError(
            "only the diffusers back end of SGLang can be optimized", where=VARIABLE,
            expected="a pipeline of diffusers", got=type(pipeline).__name__,
            hint=f"--backend diffusers, or unset {VARIABLE}",
        )  # fmt: skip
    for name, hint in (
        ("cache_dit_config", '"cache": "balanced" is a cache of toma_fx'),
        ("enable_torch_compile", '"compile": true compiles what toma_fx made'),
    ):
        if getattr(server_args, name):
            raise ConfigError(
                f"{name} changes the denoiser before it can be optimized", where=name,
                expected="nothing", got=repr(getattr(server_args, name)), hint=hint,
            )  # fmt: skip
    compiled = options.pop("compile", False)
    inner = optimize(inner, **options)
    parts = {name: getattr(inner, name, None) for name in COMPONENTS}
    for name, part in parts.items():
        if isinstance(part, OptimizedDenoiser):
            if compiled:
                part.compile()
            _log.info("%s of %s is optimized: %s", name, type(inner).__name__, options)
    return pipeline


def read_options(text: str) -> dict[str, Any]:
    """Options of `toma_fx.optimize`, and "compile", of the variable's text.

    Raises:
        ConfigError: no JSON object, `compile` that is no boolean, or a recipe beside `toma`.
            RecipeError: a file that is no recipe.
    """
    try:
        options = json.loads(text)
    except ValueError as error:
        raise _refusal(f"{text!r}: {error}") from error
    if not isinstance(options, dict) or not isinstance(options.get("compile", False), bool):
        raise _refusal(repr(text))
    if "recipe" in options:
        if "toma" in options or not isinstance(options["recipe"], str):
            raise _refusal(repr(text))
        options["toma"] = Recipe.load(options.pop("recipe"))
    return options


def _refusal(got: str) -> ConfigError:
    return ConfigError(
        "the variable holds no options", where=VARIABLE, got=got,
        expected='a JSON object as {"ratio": 0.5, "compile": true}, or {"recipe": "file.json"}',
    )  # fmt: skip
