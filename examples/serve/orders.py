"""Requests of `POST /v1/images/generations`, checked before they reach a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toma_fx.errors import ConfigError, UnknownNameError, nearest

MOST_PICTURES, MOST_STEPS, LARGEST_SEED = 8, 100, 2**31
IGNORED = ("user",)
"""Fields of OpenAI's interface that change no picture."""


@dataclass(frozen=True)
class Order:
    """What a client asks for.

    Attributes:
        prompt: one that the model knows. n: pictures. steps: of each. seed: of the first picture;
            each next one has the next seed. stream: send events. preview_every: steps between two
            previews of a picture, 0 for none.
    """

    prompt: str
    n: int = 1
    steps: int = 20
    seed: int = 0
    stream: bool = False
    preview_every: int = 0


def read_order(body: Any, model: str, prompts: Sequence[str], size: int) -> Order:
    """A request, of a body in JSON.

    Args:
        model: that is served. prompts: that it draws. size: pixels a side.

    Raises:
        ConfigError: a field is unknown, missing or out of its domain (`UnknownNameError`).
    """
    if not isinstance(body, dict):
        raise ConfigError("the body is not a JSON object", where="body", got=type(body).__name__)
    fields = {name: value for name, value in body.items() if name not in IGNORED}
    _check_choice(fields, "model", (model,))
    _check_choice(fields, "size", (f"{size}x{size}", "auto"))
    _check_choice(fields, "response_format", ("b64_json",))
    prompt = fields.pop("prompt", None)
    if prompt not in prompts:
        raise UnknownNameError(
            "the embedded models draw their own prompts only", where="prompt",
            got=repr(prompt), hint=nearest(str(prompt), prompts),
        )  # fmt: skip
    stream = fields.pop("stream", False)
    if not isinstance(stream, bool):
        raise ConfigError("stream is not a boolean", where="stream", got=repr(stream))
    order = Order(
        prompt,
        n=_number(fields, "n", 1, 1, MOST_PICTURES),
        steps=_number(fields, "steps", 20, 1, MOST_STEPS),
        seed=_number(fields, "seed", 0, 0, LARGEST_SEED),
        stream=stream,
        preview_every=_number(fields, "preview_every", 5, 1, MOST_STEPS) if stream else 0,
    )
    if fields:
        raise UnknownNameError(
            "fields that nothing reads", where=", ".join(sorted(fields)),
            expected="model, prompt, n, size, response_format, steps, seed, stream; with stream "
            "also preview_every",
        )  # fmt: skip
    return order


def _check_choice(fields: dict[str, Any], name: str, choices: Sequence[str]) -> None:
    value = fields.pop(name, choices[0])
    if value not in choices:
        raise ConfigError(
            f"{name} is not served", where=name, expected=" or ".join(choices), got=repr(value)
        )


def _number(fields: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = fields.pop(name, default)
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(
            f"{name} is out of range", where=name,
            expected=f"a whole number from {low} to {high}", got=repr(value),
        )  # fmt: skip
    return value
