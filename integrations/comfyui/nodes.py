"""The nodes: what they ask for, and which options of `toma_fx.optimize` that means."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import toma_fx
from toma_fx.errors import ConfigError
from toma_fx.serving import comfyui

CATEGORY = "advanced/model"
AS_METHOD, NO_CACHE, NO_PRESET = "as the method has it", "none", "as set above"
METHODS = [kind.name for kind in toma_fx.METHODS if "ratio" in {f.name for f in fields(kind)}]
"""Methods that merge a share of the tokens; others are for recipes."""
SCOPES = ("sublayer", "block", "stack", "keys")
"""How far tokens stay merged: for one attention or MLP, a block, all blocks between two
convolutions; or the keys and values of attention alone."""


class TomaMergeTokens:
    """A MODEL that samples with merged tokens, cached steps, or both."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Fewer tokens in attention and MLPs, and steps that reuse what earlier ones computed. "
        "Pictures change a little. What the model can't do merged runs as before; the log says why."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The widgets, as ComfyUI asks for them."""
        ratio = {"default": 0.5, "min": 0.0, "max": 0.9, "step": 0.05,
                 "tooltip": "share of the tokens that merge; 0 merges none"}  # fmt: skip
        return {
            "required": {
                "model": ("MODEL",),
                "enabled": ("BOOLEAN", {"default": True}),
                "method": (METHODS, {"default": METHODS[0]}),
                "ratio": ("FLOAT", ratio),
                "scope": ([AS_METHOD, *SCOPES], {"default": AS_METHOD}),
                "cache": ([NO_CACHE, *toma_fx.CACHES], {"default": NO_CACHE}),
            },
            "optional": {
                "preset": ([NO_PRESET, *toma_fx.PRESETS], {"default": NO_PRESET, "tooltip":
                           "instead of method, ratio, scope and cache"}),
                "recipe": ("STRING", {"default": "", "tooltip":
                           "path of a recipe, instead of all of these"}),
                "compile": ("BOOLEAN", {"default": False, "tooltip": "compile what was made; the "
                                        "first steps of every size take minutes"}),
            },
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, recipe: str | None = "", **_: Any) -> Any:
        """The time of the recipe's file: ComfyUI runs the node again when it is another one."""
        path = Path(recipe or "")
        return path.stat().st_mtime_ns if path.is_file() else ""

    def apply(
        self, model: Any, enabled: bool, method: str, ratio: float, scope: str, cache: str,
        preset: str = NO_PRESET, recipe: str = "", compile: bool = False,
    ) -> tuple[Any]:  # fmt: skip
        """The MODEL with these settings, or without any.

        Raises:
            ConfigError: a preset and a recipe; a setting that contradicts another.
        """
        if not enabled:
            return (comfyui.restore(model),)
        if recipe and preset != NO_PRESET:
            raise ConfigError(
                "a preset and a recipe", where="recipe", expected="one of them",
                got=f"{preset!r} and {recipe!r}",
            )  # fmt: skip
        if recipe:
            return (comfyui.accelerate(model, toma_fx.Recipe.load(recipe), compile=compile),)
        if preset != NO_PRESET:
            return (comfyui.accelerate(model, preset, compile=compile),)
        chosen = options(method, ratio, scope, cache)
        return (comfyui.accelerate(model, compile=compile, **chosen),)


class TomaRestoreModel:
    """A MODEL as it was before it was given settings."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = CATEGORY
    DESCRIPTION = "Samples as before Merge Tokens."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The widgets, as ComfyUI asks for them."""
        return {"required": {"model": ("MODEL",)}}

    def apply(self, model: Any) -> tuple[Any]:
        """The MODEL without settings."""
        return (comfyui.restore(model),)


def options(method: str, ratio: float, scope: str, cache: str) -> dict[str, Any]:
    """Options of `toma_fx.optimize` that the widgets mean."""
    chosen: dict[str, Any] = {"method": method, "ratio": ratio}
    if scope != AS_METHOD:
        chosen["scope"] = scope
    if cache != NO_CACHE:
        chosen["cache"] = cache
    return chosen


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "TomaMergeTokens": TomaMergeTokens,
    "TomaRestoreModel": TomaRestoreModel,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "TomaMergeTokens": "Merge Tokens (toma_fx)",
    "TomaRestoreModel": "Restore Model (toma_fx)",
}
