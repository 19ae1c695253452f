"""Independent eager implementation of step caching: block updates kept from step to step.

It patches whole blocks of diffusers' `UNet2DConditionModel` and `FluxTransformer2DModel`, and uses
nothing of the package. A step either computes, or uses what earlier computed steps left:

    computes   the model runs as it is; every place keeps u = x_out - x_in and the timestep t
    cached     a place is replaced by x_out = x_in + u_hat(t)

u_hat is the Newton polynomial through the newest samples (t0, u0), (t1, u1), (t2, u2):

    order 0    u0
    order 1    u0 + (t - t0) u01                               u01 = (u0 - u1) / (t0 - t1)
    order 2    u0 + (t - t0) u01 + (t - t0) (t - t1) u012      u012 = (u01 - u12) / (t0 - t2)

A quotient of equal timesteps counts as 0. With fewer samples the order is lower. With fitted
weights u_hat is the sum of weights times samples, by the entry with the nearest timestep.

Places by scope:

    stack   Flux: all blocks together, image tokens from `x_embedder` to `norm_out`.
            UNet: the blocks of each `Transformer2DModel`, from `proj_in` to `proj_out`.
    block   Flux: every block; double blocks update image and text, single blocks [text, image].
            UNet: every `BasicTransformerBlock`.
    deep    UNet: the hidden states that enter the last up block are kept themselves, x_out = u_hat,
            and nothing runs that only leads to them (DeepCache, arXiv:2312.00858).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Sample = tuple[float, Tensor]
"""(timestep, update) of a computed step."""


def newton(samples: Sequence[Sample], t: float) -> Tensor:
    """The polynomial through all samples, newest first, at `t`."""
    times = [time for time, _ in samples]
    column = [update for _, update in samples]
    value, factor = column[0], 1.0
    for width in range(1, len(samples)):
        column = [
            _slope(column[i], column[i + 1], times[i] - times[i + width])
            for i in range(len(column) - 1)
        ]
        factor *= t - times[width - 1]
        value = value + factor * column[0]
    return value


def _slope(newer: Tensor, older: Tensor, time: float) -> Tensor:
    return torch.zeros_like(newer) if time == 0 else (newer - older) / time


@dataclass
class Pass:
    """What one pass of a generation keeps: how many calls began, and the samples of each place."""

    calls: int = 0
    samples: dict[str, list[Sample]] = field(default_factory=dict)


@dataclass
class Reference:
    """The state of a patched model.

    Attributes:
        order: of extrapolation. computes: whether each step computes.
        time: the timestep of the current call. current: the pass that calls belong to.
        fitted: (timestep, weights of the samples, the newest first) instead of the polynomial.
    """

    order: int
    computes: Sequence[bool]
    fitted: Sequence[tuple[float, Sequence[float]]] = ()
    passes: dict[str, Pass] = field(default_factory=dict)
    current: str = ""
    time: float = 0.0

    @contextmanager
    def pass_(self, name: str) -> Iterator[None]:
        """Calls inside belong to the pass `name`, which counts its own steps."""
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    @property
    def computing(self) -> bool:
        """Whether the current step computes."""
        return self.computes[self._pass.calls - 1]

    def begin(self, timestep: Any) -> None:
        """A call of the model begins, with one timestep for the whole batch."""
        times = torch.as_tensor(timestep).flatten()
        assert bool((times == times[0]).all()), "the pictures of a batch have several timesteps"
        assert self._pass.calls < len(self.computes), "more calls than steps"
        self._pass.calls += 1
        self.time = float(times[0])

    def keep(self, place: str, update: Tensor) -> None:
        """Add a sample of a place."""
        samples = self._pass.samples.setdefault(place, [])
        samples.insert(0, (self.time, update))
        del samples[self.order + 1 :]

    def update(self, place: str) -> Tensor:
        """What a place adds at the current, cached step."""
        assert place in self._pass.samples, f"{place}: no step has been computed"
        samples = self._pass.samples[place]
        if self.fitted:
            _, weights = min(self.fitted, key=lambda entry: abs(entry[0] - self.time))
            pairs = zip(weights, samples, strict=False)
            return sum((w * u for w, (_, u) in pairs), torch.zeros(()))
        return newton(samples, self.time)

    @property
    def _pass(self) -> Pass:
        return self.passes.setdefault(self.current, Pass())


@contextmanager
def cached_blocks(
    model: nn.Module,
    *,
    scope: str,
    order: int,
    computes: Sequence[bool],
    fitted: Sequence[tuple[float, Sequence[float]]] = (),
) -> Iterator[Reference]:
    """Patch `model`; its calls inside, of each pass, are the steps of one generation."""
    reference = Reference(order, computes, fitted)
    signature = inspect.signature(type(model).forward)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reference.begin(signature.bind(module, *args, **kwargs).arguments["timestep"])

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        PATCHES[type(model).__name__, scope](model, reference, stack)
        yield reference


def _replace(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module another `forward` until the stack is closed."""
    before = vars(module).get("forward")
    module.forward = forward
    if before is None:
        stack.callback(delattr, module, "forward")
    else:
        stack.callback(setattr, module, "forward", before)


# -- Flux -----------------------------------------------------------------------------------------


def _flux_blocks(model: Any) -> list[tuple[str, nn.Module]]:
    names = ("transformer_blocks", "single_transformer_blocks")
    return [(f"{name}.{i}", b) for name in names for i, b in enumerate(getattr(model, name))]


def _flux_stack(model: Any, reference: Reference, stack: ExitStack) -> None:
    entered: list[Tensor] = []

    def embed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        entered[:] = [output]

    def leave(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not reference.computing:
            return (entered[0] + reference.update("stack"), *args[1:])
        reference.keep("stack", args[0] - entered[0])
        return args

    def skip(block: nn.Module) -> Callable[..., Any]:
        def forward(
            hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            if reference.computing:
                original = type(block).forward
                return original(block, hidden_states, encoder_hidden_states, *args, **kwargs)
            return encoder_hidden_states, hidden_states

        return forward

    stack.callback(model.x_embedder.register_forward_hook(embed).remove)
    stack.callback(model.norm_out.register_forward_pre_hook(leave).remove)
    for _, block in _flux_blocks(model):
        _replace(stack, block, skip(block))


def _flux_block(model: Any, reference: Reference, stack: ExitStack) -> None:
    def double(name: str, block: nn.Module) -> Callable[..., Any]:
        def forward(
            hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            image, text = hidden_states, encoder_hidden_states
            if not reference.computing:
                new_text = text + reference.update(name + ".text")
                return new_text, image + reference.update(name + ".image")
            new_text, new_image = type(block).forward(block, image, text, *args, **kwargs)
            reference.keep(name + ".text", new_text - text)
            reference.keep(name + ".image", new_image - image)
            return new_text, new_image

        return forward

    def single(name: str, block: nn.Module) -> Callable[..., Any]:
        def forward(
            hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            image, text = hidden_states, encoder_hidden_states
            joined, count = torch.cat([text, image], 1), text.shape[1]
            if not reference.computing:
                joined = joined + reference.update(name)
                return joined[:, :count], joined[:, count:]
            outputs = type(block).forward(block, image, text, *args, **kwargs)
            reference.keep(name, torch.cat(outputs, 1) - joined)
            return outputs

        return forward

    for name, block in _flux_blocks(model):
        _replace(stack, block, (single if name.startswith("single") else double)(name, block))


# -- UNet -----------------------------------------------------------------------------------------


def _transformers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if type(m).__name__ == "Transformer2DModel"]


def _around(name: str, blocks: Sequence[nn.Module], reference: Reference, stack: ExitStack) -> None:
    """One place around blocks that run one after the other."""
    entered: list[Tensor] = []

    def wrap(block: nn.Module) -> Callable[..., Tensor]:
        compute = block.forward  # that of a block that merges, in a model that is patched to

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if block is blocks[0]:
                entered[:] = [hidden_states]
            last = block is blocks[-1]
            if not reference.computing:
                return hidden_states + reference.update(name) if last else hidden_states
            output: Tensor = compute(hidden_states, *args, **kwargs)
            if last:
                reference.keep(name, output - entered[0])
            return output

        return forward

    for block in blocks:
        _replace(stack, block, wrap(block))


def _unet_stack(model: Any, reference: Reference, stack: ExitStack) -> None:
    for name, transformer in _transformers(model):
        _around(name, list(transformer.transformer_blocks), reference, stack)


def _unet_block(model: Any, reference: Reference, stack: ExitStack) -> None:
    for name, transformer in _transformers(model):
        for i, block in enumerate(transformer.transformer_blocks):
            _around(f"{name}.{i}", [block], reference, stack)


def _unet_deep(model: Any, reference: Reference, stack: ExitStack) -> None:
    """The last up block takes `conv_in` and the layers of the first down block, sampler aside."""
    first, last = model.down_blocks[0], model.up_blocks[-1]
    assert len(last.resnets) == 1 + len(first.resnets), "the last up block needs other down blocks"

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if reference.computing:
            reference.keep("deep", kwargs["hidden_states"])
            return args, kwargs
        return args, {**kwargs, "hidden_states": reference.update("deep")}

    def skip(module: nn.Module, results: Callable[[Tensor], Any]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if reference.computing:
                return type(module).forward(module, hidden_states, *args, **kwargs)
            return results(hidden_states)

        return forward

    def same(x: Tensor) -> Tensor:
        return x

    def with_residuals(count: int) -> Callable[[Tensor], Any]:
        # the model takes residuals from the end of a list: their number matters, not what they are
        return lambda x: (x, (x,) * count)

    stack.callback(last.register_forward_pre_hook(enter, with_kwargs=True).remove)
    for sampler in first.downsamplers or ():
        _replace(stack, sampler, skip(sampler, same))
    for block in model.down_blocks[1:]:
        count = len(block.resnets) + len(block.downsamplers or ())
        _replace(stack, block, skip(block, with_residuals(count)))
    for block in (model.mid_block, *model.up_blocks[:-1]):
        _replace(stack, block, skip(block, same))


PATCHES: dict[tuple[str, str], Callable[[Any, Reference, ExitStack], None]] = {
    ("FluxTransformer2DModel", "stack"): _flux_stack,
    ("FluxTransformer2DModel", "block"): _flux_block,
    ("UNet2DConditionModel", "stack"): _unet_stack,
    ("UNet2DConditionModel", "block"): _unet_block,
    ("UNet2DConditionModel", "deep"): _unet_deep,
}
