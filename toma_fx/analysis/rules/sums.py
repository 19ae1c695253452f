"""The rule of einsum: a sum of products by letters."""

from __future__ import annotations

from toma_fx.analysis.factors import Keys, Refused
from toma_fx.analysis.facts import Positional, Transfer
from toma_fx.analysis.labels import Label, Layout, meet, rows_of
from toma_fx.analysis.rules.base import Call, carries_positions, rule
from toma_fx.analysis.rules.compute import count_tokens
from toma_fx.graph.nodes import UNKNOWN


@rule("einsum", linear=True)
def einsum(call: Call) -> Transfer:
    """Each letter keeps its axis; rows of tokens stay unsummed.

    Keys whose shares add up to 1 may be summed, as attention does, and tokens that are counted.
    """
    equation, operands = str(call.arg(0)).replace(" ", ""), call.tensors
    inputs, arrow, output = equation.partition("->")
    words = inputs.split(",")
    layouts = [call.layout(x) for x in operands]
    repeated = any(len(set(word)) < len(word) for word in (*words, output))
    if not arrow or "." in equation or repeated or len(operands) != len(words):
        raise Refused("an einsum of this form")
    labels: dict[str, Label] = {}
    shares: set[str] = set()
    for word, layout in zip(words, layouts, strict=True):
        for letter, label in zip(word, layout, strict=True):
            known = labels.get(letter, label)
            if _are_shares(known, label) or _are_shares(label, known):
                shares.add(letter)
                continue
            labels[letter] = meet(known, label)
    held = any(carries_positions(x) for x in layouts)
    counted: list[Positional] = []
    for letter, label in labels.items():
        if not held or letter in output or letter in shares:
            continue
        # the last operand that is summed over tokens weighs them
        last = max(i for i, word in enumerate(words) if letter in word)
        weight = count_tokens(operands[last], layouts[last], words[last].index(letter))
        if weight is not None and weight.tokens == label.tokens:
            counted.append(weight)
        elif label.positions or label.axes:
            raise Refused("a sum over the token axis or its batch")
    tables = _find_tables(call, words, layouts, labels)
    scores = _label_scores(words, output, labels)
    return Transfer(scores, positionals=tables, counted=tuple(counted))


def _are_shares(keys: Label, values: Label) -> bool:
    """Whether a sum over keys and their values is an average: softmax was taken."""
    if not (keys.keys and values.tokens and keys.keys.normal):
        return False
    return not (keys.is_product or values.is_product) and (
        keys.keys.tokens.segments == values.tokens.segments
    )


def _label_scores(words: list[str], output: str, labels: dict[str, Label]) -> Layout:
    """The labels of the result; of two token axes the last is the keys of attention."""
    result = [labels[letter] for letter in output]
    if sum(bool(label.positions) for label in result) > 1:
        last = result[-1]
        scores = last.tokens and not last.is_product and output[-1] in words[-1]
        if sum(bool(label.tokens) for label in result) != 2 or not scores or last.tokens is None:
            if not (last.keys and sum(bool(label.positions) for label in result) == 2):
                raise Refused("two token axes in one value")
        elif last.tokens:
            result[-1] = Label((Keys(last.tokens),))
    return tuple(result)


def _find_tables(
    call: Call, words: list[str], layouts: list[Layout], labels: dict[str, Label]
) -> tuple[Positional, ...]:
    """Operands that line up with tokens without carrying them; they need the rows of the batch."""
    out = []
    for word, layout, operand in zip(words, layouts, call.tensors, strict=True):
        full = tuple(labels[letter] for letter in word)
        rows = rows_of(tuple(labels.values()))
        for dim, (label, own) in enumerate(zip(full, layout, strict=True)):
            found = label.tokens
            if found is None or own.positions or own.size == 1 != label.size:
                if own.positions and found and own.positions.segments != found.segments:
                    raise Refused(f"different tokens meet in {word[dim]!r}")
                continue
            if found.length >= UNKNOWN:
                raise Refused("a table over as many tokens as the data says")
            if rows_of(full) != rows:
                raise Refused("a table over tokens that has no batch")
            out.append(Positional(operand.name, full, dim))
    return tuple(out)
