"""Public entry points: `optimize`, `explain`, `summary` and `restore`."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast, overload

from torch import nn

from toma_fx.capture.architecture import architecture_of
from toma_fx.capture.guard import ModelGuard
from toma_fx.capture.model import check_model
from toma_fx.compat.compilers import is_compiled
from toma_fx.compat.libraries import accelerate_hook
from toma_fx.errors import ConfigError, ModelTypeError
from toma_fx.graph.dump import dumping
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.checks import check_count
from toma_fx.methods.config import make_config
from toma_fx.methods.planning import merging
from toma_fx.methods.recipe import Recipe
from toma_fx.run.arguments import check_leaves, plain_numbers
from toma_fx.run.calls import call_of
from toma_fx.run.denoiser import OptimizedDenoiser, optimized_of
from toma_fx.run.pipelines import COMPONENTS, leave_generations, tell_generations
from toma_fx.run.programs import Specialization
from toma_fx.run.ranks import Ranks, rank_of
from toma_fx.run.report import Report, Summary, make_report, make_summary
from toma_fx.run.tracing import tracing

T = TypeVar("T")


@overload
def optimize(
    model: nn.Module,
    toma: bool | str | MethodConfig | Recipe | Mapping[str, Any] = ...,
    *,
    method: str | MethodConfig | type[MethodConfig] | None = ...,
    example_inputs: Any = ...,
    max_signatures: int = ...,
    like: nn.Module | None = ...,
    parallel: Any = ...,
    **options: Any,
) -> OptimizedDenoiser: ...


@overload
def optimize(
    model: T,
    toma: bool | str | MethodConfig | Recipe | Mapping[str, Any] = ...,
    *,
    method: str | MethodConfig | type[MethodConfig] | None = ...,
    example_inputs: Any = ...,
    max_signatures: int = ...,
    like: nn.Module | None = ...,
    parallel: Any = ...,
    **options: Any,
) -> T: ...


def optimize(
    model: Any,
    toma: bool | str | MethodConfig | Recipe | Mapping[str, Any] = True,
    *,
    method: str | MethodConfig | type[MethodConfig] | None = None,
    example_inputs: Any = None,
    max_signatures: int = 8,
    like: nn.Module | None = None,
    parallel: Any = None,
    **options: Any,
) -> Any:
    """Token merging for a denoiser, or for the denoiser of a diffusers pipeline.

    Args:
        model: a denoiser of diffusers (docs/denoisers.md lists those tested), any module with
            residual attention (docs/own-models.md), or a pipeline: its denoiser, or both of two.
        toma: True for the method's defaults, a preset of ToMA by its name (`toma_fx.PRESETS`), a
            configuration, a mapping of its fields, a `Recipe`, or False to turn merging off.
        method: a built-in method by its name ("toma" if not given; `toma_fx.METHODS` are all), or,
            built in or your own, a configuration of a method or its class (docs/methods.md).
        example_inputs: keyword arguments of a call (a dict), positional ones (a tuple), or a pair
            (args, kwargs). Given, the model is captured now and for this signature alone; else at
            the first call of each signature.
        max_signatures: graphs that are kept; one is made for every combination of input shapes,
            adapters and position grids, and the one unused longest makes room for a new one.
        like: what was optimized of the same denoiser. Graphs that it has are used, and compiled
            programs where they fit: where the two configurations differ only in the schedule.
        parallel: a DeviceMesh of one dimension, a process group, or a `Parallel`: its processes
            share the merged tokens of each step (docs/parallel.md). All of them make the same calls
            with the same inputs, and all have the results.
        options: fields of the method's configuration, replacing those of `toma` or `method`.

    Returns:
        The optimized denoiser (a stand-in for the original, which is not modified); or the same
        pipeline with it, whose calls tell it which generation and step they are at. What is
        optimized already is optimized anew from the original, with these settings alone.

    Raises:
        ConfigError: a field out of its domain (`UnknownNameError`, `TileError` are kinds of it), or
            a recipe for another model (`RecipeError`).
        ModelTypeError: no denoiser found, or it is an autoencoder, or it or parts of it are
            compiled already.
        TrainingModeError: the model is in training mode.
        ParallelError: there are no such processes.
        CaptureError: with example inputs; otherwise it comes at the first call, as do
            `CompanionError`, `NoMergeSites`, `RankMismatchError`, and `ParallelError` where tokens
            can't be shared.
    """
    config = _config_of(toma, method, options)
    check_count("max_signatures", max_signatures)
    ranks = None if parallel is None else Ranks(parallel)

    def wrap(inner: nn.Module) -> OptimizedDenoiser:
        original = _require_original(inner, toma)
        known = _like(like, original)
        optimized = OptimizedDenoiser(original, config, max_signatures, known, ranks)
        if example_inputs is not None:
            optimized.fix(*call_of(example_inputs))
        return optimized

    if isinstance(model, nn.Module):
        return wrap(model)
    denoisers = {name: wrap(restore(inner)) for name, inner in find_components(model).items()}
    for name, denoiser in denoisers.items():
        setattr(model, name, denoiser)
    tell_generations(model)
    return model


def _like(like: Any, original: nn.Module) -> OptimizedDenoiser | None:
    """What `like=` means for a denoiser.

    Raises:
        ConfigError: it is not an optimized form of the same one.
    """
    optimized = optimized_of(like)
    if like is not None and (optimized is None or optimized.denoiser is not original):
        raise ConfigError(
            "like= is not of this model",
            where="like",
            expected=f"what toma_fx.optimize returned for the same {type(original).__name__}",
            got=type(like).__name__ if optimized is None else "that of another model",
        )
    return optimized


def restore(model: T) -> T:
    """The original denoiser of an optimized one, or a pipeline with its original denoiser.

    What is not optimized is returned as it is. Hooks of model CPU offload move to the original.

    Raises:
        ModelTypeError: neither a module nor a pipeline with a denoiser.
    """
    if not isinstance(model, nn.Module):
        for name, inner in find_components(model).items():
            if optimized_of(inner) is not None:
                setattr(model, name, restore(inner))
        leave_generations(model)
        return model
    optimized = optimized_of(model)
    if optimized is None:
        return model
    hook = accelerate_hook(optimized)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(optimized)
        add_hook_to_module(optimized.denoiser, hook)
    return cast(T, optimized.denoiser)


def summary(model: Any) -> Summary:
    """What is active in an optimized denoiser or pipeline, and how many steps of each kind ran.

    Of a pipeline with two denoisers it is about the first; give it `pipe.transformer_2` for the
    other. The result prints as a table and converts with `to_json()`.

    Raises:
        ModelTypeError: neither a module nor a pipeline with a denoiser.
    """
    inner = denoiser_of(model)
    return make_summary(inner, optimized_of(inner))


def explain(
    model: Any,
    example_inputs: Any,
    toma: bool | str | MethodConfig | Recipe | Mapping[str, Any] | None = None,
    *,
    method: str | MethodConfig | type[MethodConfig] | None = None,
    dump: str | Path | None = None,
    parallel: Any = None,
    **options: Any,
) -> Report:
    """What `optimize` would do for these inputs, or does, if the model is optimized.

    A model on the meta device will do: then nothing is computed.

    Args as for `optimize`, and:
        toma: None for the configuration of an optimized model, or True.
        parallel: also a number of processes, which need not be there. Tokens and FLOPs are then
            those of one of them. None is what the model has, if it is optimized; 1 is one process.
        dump: folder for the graphs before and after each pass, as text; what the environment
            variable `TOMA_FX_DUMP` names if not given.

    Returns:
        A report that prints what is alike in a line each; `full()` and `tree()` print all of it,
        `to_json()` and `to_html()` are for machines and browsers.

    Raises:
        NoMergeSites: nothing can be merged; its message lists every reason.
        CompanionError: another library acts inside the forward pass.
        ParallelError: processes can't share the tokens.
    """
    inner = denoiser_of(model)
    optimized = optimized_of(inner)
    if toma is None:
        toma = optimized.config_toma if optimized and method is None else True
    config = _config_of(toma, method, options)
    denoiser = _require_original(inner, toma)
    if parallel is None:
        rank = optimized._ranks.rank if optimized and optimized._ranks else None
    else:
        rank = rank_of(parallel)
    args, kwargs = plain_numbers(*call_of(example_inputs))
    check_leaves(args, kwargs)
    guard = ModelGuard(denoiser, runs=False)
    guard.companions.check_merging(merging(config))
    with dumping(dump), tracing(), guard.companions.kernel():
        return make_report(Specialization.make(denoiser, args, kwargs, config, ranks=rank))


def find_components(pipeline: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline, by the attributes that hold them."""
    attributes = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    modules = {name: inner for name, inner in attributes.items() if isinstance(inner, nn.Module)}
    if modules:
        return modules
    kind = pipeline if isinstance(pipeline, type) else type(pipeline)
    if isinstance(pipeline, type):
        hint = f"give an object, not its class: {kind.__name__}.from_pretrained(...)"
    elif isinstance(pipeline, (str, PathLike)):
        hint = "load it first: DiffusionPipeline.from_pretrained(...), then optimize that"
    elif pipeline is None:
        hint = "was it loaded? a pipeline holds None for a component that it was made without"
    else:
        hint = "give the denoiser itself, as the pipeline calls it"
    raise ModelTypeError(
        "no denoiser found",
        where=f"class {kind.__name__}" if isinstance(pipeline, type) else kind.__name__,
        expected="a torch.nn.Module, or a pipeline with " + " or ".join(COMPONENTS),
        got=repr(pipeline) if isinstance(pipeline, str) else kind.__name__,
        hint=hint,
    )


def denoiser_of(model: Any) -> nn.Module:
    """A module, or the first denoiser of a pipeline."""
    return model if isinstance(model, nn.Module) else next(iter(find_components(model).values()))


def _config_of(toma: Any, method: Any, options: Mapping[str, Any]) -> MethodConfig:
    """The configuration that is meant; of a recipe, its own."""
    return make_config(toma.config if isinstance(toma, Recipe) else toma, method, options)


def _require_original(model: nn.Module, toma: Any) -> nn.Module:
    """The original of `model`, which must be in evaluation mode, not compiled, and that of a
    recipe, if `toma` is one."""
    model = restore(model)
    check_model(model)
    if all(callable(getattr(model, name, None)) for name in ("encode", "decode")):
        raise ModelTypeError(
            "an autoencoder is no denoiser",
            where=type(model).__name__,
            expected="a module that works in forward()",
            got="one that works in encode() and decode(), which nothing would merge in",
            hint="give the denoiser: pipe.unet or pipe.transformer, or the pipeline itself",
        )
    if is_compiled(model):
        raise ModelTypeError(
            "the model is compiled already",
            where="model",
            expected="the model itself",
            got="the result of torch.compile",
            hint="optimize first: toma_fx.optimize(model).compile(), "
            "or torch.compile(model, backend='toma_fx')",
        )
    for path, part in model.named_modules():
        if is_compiled(part):
            raise ModelTypeError(
                "parts of the model are compiled already",
                where=path,
                expected="the model itself; a captured graph would not use the compiled parts",
                got=f"{type(part).__name__} compiled by torch.compile or compile_repeated_blocks",
                hint="optimize first: toma_fx.optimize(model).compile(); to take the compilation "
                "back: for m in model.modules(): m._compiled_call_impl = None",
            )
    if isinstance(toma, Recipe):
        toma.check_model(*architecture_of(model))
    return model
