"""Standing where a module stood: a view of it that loaders, hooks and pipelines take for it."""

from __future__ import annotations

from types import MethodType
from typing import Any, Self

from torch import nn

from toma_fx.capture.guard import ModelGuard
from toma_fx.capture.replaced import replacement
from toma_fx.compat.libraries import (
    WRAPPING,
    accelerate_hook,
    diffusers_hooks,
)
from toma_fx.compat.pytorch import apply_to_tensors, hook_tables, share_tables
from toma_fx.errors import CompanionError
from toma_fx.run.around import AroundForward


class StandIn(nn.Module):
    """A view of a module, for subclasses that run something else in its place.

    Modules, parameters and buffers are the same dictionaries, attributes and methods that it does
    not define are the original's, and `isinstance` and `__class__` say the original's class, as
    diffusers' loaders expect.

    Attributes:
        denoiser: the original model, never modified.
    """

    denoiser: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super(StandIn, self).__init__()  # noqa: UP008 - __class__ is a property here
        share_tables(self, model)
        own = self.__dict__
        own["denoiser"] = model
        own["__module__"] = type(model).__module__
        own["training"] = False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["denoiser"])

    def __getattr__(self, name: str) -> Any:
        if name in WRAPPING:  # hooks on the original are not hooks on this
            raise AttributeError(name)
        return getattr(self.__dict__["denoiser"], name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(self.__dict__["denoiser"]), *self.__dict__, *dir(type(self))})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":
            self.denoiser.training = value
        model = self.__dict__.get("denoiser")
        if name == "forward" and model is not None:
            self._replace_forward(value)
            return
        inner = model is not None and name not in self.__dict__ and name not in WRAPPING
        if inner and (hasattr(model, name) or isinstance(value, (nn.Module, nn.Parameter))):
            setattr(model, name, value)
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self.denoiser, name)

    def _replace_forward(self, function: Any) -> None:
        """Put a function around `forward`, or the stand-in's own back."""
        own = self.__dict__
        if isinstance(function, AroundForward):
            function = function.function
        if function == MethodType(type(self).forward, self):
            own.pop("forward", None)
        else:
            own["forward"] = AroundForward(type(self.denoiser).__name__, function)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the original, in place; graphs follow."""
        self.denoiser.to(*args, **kwargs)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        apply_to_tensors(self.denoiser, fn, recurse)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the original's mode; calls in training mode are refused."""
        self.denoiser.train(mode)
        object.__setattr__(self, "training", mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's."""
        return self.denoiser.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the original; graphs share its parameters."""
        return self.denoiser.load_state_dict(*args, **kwargs)

    def _apply_offload_hook(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, step: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Honor offload hooks that the call passes by: weights and inputs on their device.

        Those are the hooks of the original, and in a `step` those of the stand-in.
        """
        own, hook = accelerate_hook(self), accelerate_hook(self.denoiser)
        if own is not None:
            hook = own if step else None
        if hook is None:
            return args, kwargs
        if getattr(hook, "offload", False):
            ModelGuard(self.denoiser)  # raises, and says what can't work
        moved: tuple[tuple[Any, ...], dict[str, Any]] = hook.pre_forward(
            self.denoiser, *args, **kwargs
        )
        return moved

    def _refuse_own_hooks(self) -> None:
        """Refuse hooks on the stand-in that a call would run and a `step` would not."""
        names = [type(h).__name__ for h in diffusers_hooks(self).values()]
        hooks = [h for table in hook_tables(self) for h in table.values()]
        names += [getattr(h, "__qualname__", repr(h)) for h in hooks]
        around = self.__dict__.get("forward")
        origin = None if around is None else replacement("", around.function)
        if origin is not None and origin.package not in ("accelerate", "diffusers"):
            names.append(f"{origin.name} of {origin.module} (forward)")
        if names:
            raise CompanionError(
                "hooks on the optimized denoiser do not act in a step",
                where="step(inputs, state)",
                expected="an optimized denoiser without hooks of its own",
                got=", ".join(names),
                hint="call the denoiser itself, inside own_state() for a state apart; "
                "or denoiser.denoiser.register_forward_hook, which is captured",
            )
