"""Captions of the pictures that the latent models draw, and their words as numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from toma_fx.errors import UnknownNameError, nearest

TEXT_TOKENS = 16
"""Words of a prompt, at most."""

SUBJECTS: tuple[str, ...] = (
    "an astronaut",
    "a cat",
    "a cup of coffee",
    "a rocket",
    "a pagoda",
    "a dahlia",
    "a desert",
    "a lake",
    "an otter",
    "ocean waves",
    "an osprey",
    "the colosseum",
    "a planet",
    "a city",
    "spices",
    "a fig",
    "paintbrushes",
    "a dandelion",
    "blue flowers",
    "green hills",
)
LIGHTS = ("", "black and white", "at night", "at sunset", "in fog")
SIDES = ("", "mirrored")
DISTANCES = ("", "close-up")


def caption(subject: str, *attributes: str) -> str:
    """A text like "a photo of a cat, at night, mirrored"; empty attributes are left out."""
    return ", ".join([f"a photo of {subject}", *filter(None, attributes)])


PROMPTS = tuple(caption(*parts) for parts in product(SUBJECTS, LIGHTS, SIDES, DISTANCES))
"""All 400 captions that the models know."""


HELD_OUT = tuple(p for i, p in enumerate(PROMPTS) if p.count(",") > 1 and i * 7919 % 400 < 92)
"""The 61 captions of `PROMPTS` of which no picture was trained on.

All have two or three attributes, so that every word was seen, and are scattered by a fixed rule.
"""
VOCABULARY = ("", *sorted({w for p in PROMPTS for w in re.findall(r"[\w-]+", p)}))
"""Words of `PROMPTS`; the first is the padding."""


def tokenize(prompt: str) -> list[int]:
    """Indices into `VOCABULARY` of the words of a prompt.

    Raises:
        UnknownNameError: a word is not in the vocabulary, or there are more than `TEXT_TOKENS`.
    """
    words = re.findall(r"[\w-]+", prompt.lower())
    for word in words:
        if word not in VOCABULARY:
            raise UnknownNameError(
                "the model does not know a word of the prompt",
                where=f"prompt {prompt!r}",
                expected='a caption such as "a photo of a cat, at sunset, mirrored"',
                got=repr(word),
                hint=nearest(word, VOCABULARY[1:]),
            )
    if len(words) > TEXT_TOKENS:
        raise UnknownNameError(
            "the prompt is too long",
            where=f"prompt {prompt!r}",
            expected=f"at most {TEXT_TOKENS} words",
            got=f"{len(words)} words",
        )
    return [VOCABULARY.index(word) for word in words]


def token_ids(prompts: Sequence[str]) -> Tensor:
    """Padded indices of the words of each prompt, [B, TEXT_TOKENS] int64."""
    ids = torch.zeros(len(prompts), TEXT_TOKENS, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        words = tokenize(prompt)
        row[: len(words)] = torch.tensor(words, dtype=torch.int64)
    return ids
