"""Random layouts and values for the tests of operators; nothing is told by a size."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.analysis.tokens_of_rows import World
from toma_fx.analysis.factors import Axis, Factor, Keys, Plain, Segment, Tokens
from toma_fx.analysis.labels import ONE, Label, Layout, fold, plain


@dataclass(frozen=True)
class Ref:
    """An operand in the arguments of a call."""

    name: str


@dataclass
class Case:
    """A call of an operator: its arguments, and the values and layouts of the operands in them."""

    world: World
    target: Callable[..., Any] = torch.ops.aten.alias.default
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)


@dataclass
class Draw:
    """Draws the operands of one case.

    Attributes:
        image, other: pictures with as many tokens. text: tokens without a picture.
        ids: what says where tokens lie.
    """

    rng: random.Random
    case: Case

    def __post_init__(self) -> None:
        w = self.case.world
        self.world = w
        self.image = Segment("image", w.count, w.grid, self.rng.choice(["image", "sequence"]))
        self.other = Segment("other", w.count, w.grid, "image")
        self.text = Segment("text", w.text, None, "sequence")
        self.ids = Segment("ids", w.count, w.grid, "ids")

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> None:
        """The call that is tested."""
        self.case.target = getattr(target, "default", target)
        self.case.args, self.case.kwargs = args, kwargs

    def segments(self) -> tuple[Segment, ...]:
        """Tokens of a sequence: the image, mostly."""
        one, both = (self.image,), (self.text, self.image)
        return self.rng.choices([one, both, both[::-1]], [6, 1, 1])[0]

    def rows(self) -> list[Factor]:
        """Factors that number all rows, or a range of them."""
        w, out = self.world, list[Factor]()
        batch = Axis.whole("batch", w.batch)
        if w.batch == 4 and self.chance(0.25):
            (first,), (second,) = batch.split(2)
            out += [first, second]
        elif w.batch > 1:
            at = self.rng.randrange(w.batch)
            cut = self.chance(0.06)
            out.append(batch.cut(at, w.batch) if cut else batch)
        if w.frames > 1:
            out.append(Axis.whole(w.frame_axis, w.frames))
        return out

    def layout(
        self,
        segments: Sequence[Segment] | None = None,
        *,
        usual: bool = False,
        features: int | None = None,
        rank: int | None = None,
    ) -> Layout:
        """[batch, tokens, channels], or with heads, or in any order, folded anyhow."""
        w, rows = self.world, self.rows()
        t: Factor = Tokens(tuple(segments or self.segments()))
        if rows and self.chance(0.06) and not usual:
            row = rows.pop(self.rng.randrange(len(rows)))
            assert isinstance(row, Axis)
            row = row.cut(at := self.rng.randrange(row.size), at + 1)
            t = Tokens(t.segments, (row,))
        last: list[Factor] = [Plain(features or w.channels)]
        heads: list[Factor] = [Plain(w.heads)] if w.heads > 1 and self.chance(0.4) else []
        style = self.rng.choices(["rows", "heads", "tokens", "any"], [6, 2, 1, 0 if usual else 3])
        order = {
            "rows": [*rows, *heads, t, *last],
            "heads": [*heads, *rows, t, *last],
            "tokens": [t, *rows, *heads, *last],
            "any": self.rng.sample([*rows, *heads, t, *last], len([*rows, *heads, t, *last])),
        }[style[0]]
        return self.fold(order, 0.15, rank)

    def scores(self, normal: bool | None = None) -> Layout:
        """[batch, heads, queries, keys], the batch and heads perhaps folded."""
        normal = self.chance(0.5) if normal is None else normal
        keys = self.pick((self.image,), (self.image,), self.segments(), (self.text,))
        heads: list[Factor] = [Plain(self.world.heads)] if self.world.heads > 1 else []
        lead = self.fold([*self.rows(), *heads], 0.5)
        queries = Label((Tokens(self.segments()),))
        result = (*lead, queries, Label((Keys(Tokens(keys), normal),)))
        return result if self.chance(0.85) else tuple(self.rng.sample(result, len(result)))

    def fold(self, factors: Sequence[Factor], p: float, rank: int | None = None) -> Layout:
        """One dimension for each factor, but now and then one for two, and one of size 1."""
        groups: list[list[Factor]] = []
        for f in factors:
            if groups and (self.chance(p) or (rank and len(groups) == rank)):
                groups[-1].append(f)
            else:
                groups.append([f])
        labels = [fold([Label((f,)) for f in group]) for group in groups]
        while rank and len(labels) < rank:
            labels.insert(0, ONE)
        if not rank and self.chance(0.1):
            labels.insert(self.rng.randrange(len(labels) + 1), ONE)
        return tuple(labels)

    def main(self) -> tuple[Ref, Layout]:
        """The operand that most operators have, scores now and then."""
        layout = self.scores() if self.chance(0.12) else self.layout()
        return self.value(layout), layout

    def value(
        self, layout: Layout | Sequence[int], dtype: torch.dtype = torch.float64, scale: float = 1.0
    ) -> Ref:
        """An operand with a layout; with a shape, one that nothing is known of."""
        known = [x for x in layout if isinstance(x, Label)]
        shape = [x.size if isinstance(x, Label) else x for x in layout]
        seed = self.rng.randrange(2**31)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = x > 0 if dtype == torch.bool else (x * scale).to(dtype)
        name = f"x{len(self.case.values)}"
        self.case.values[name] = x
        if known and not all(label.is_plain for label in known):
            self.case.layouts[name] = tuple(known)
        return Ref(name)

    def partner(self, layout: Layout, dtype: torch.dtype = torch.float64) -> Any:
        """What may meet a value: its like, a table, other tokens, what has its sizes by chance."""
        kinds = ["same", "like", "part", "table", "labeled", "chance", "number"]
        kind = self.rng.choices(kinds, [1, 8, 4, 8, 6, 4, 2])[0]
        if kind == "same":
            return Ref("x0")
        if kind == "number":
            return 0.5
        labels = list(layout)
        if kind == "part":  # all rows stay
            labels = [x if x.tokens or x.axes or self.chance(0.5) else ONE for x in labels]
        elif kind == "table":
            labels = [plain(x.size) if self.chance(0.7) else ONE for x in labels]
        elif kind == "labeled":
            labels = [self.relabel(x) for x in labels]
        elif kind == "chance":
            labels = self.shuffle(labels)
        if kind != "like" and self.chance(0.3):
            lead = self.rng.randrange(len(labels))
            held = kind == "part" and any(x.tokens or x.axes for x in labels[:lead])
            labels = labels if held else labels[lead:]
        return self.value(tuple(labels), dtype)

    def relabel(self, label: Label) -> Label:
        """The label with other tokens in the image's place, rows kept or not."""
        by = self.pick(self.ids, self.other, None)
        out: list[Factor] = []
        for f in label.factors:
            if isinstance(f, (Tokens, Keys)):
                tokens = f if isinstance(f, Tokens) else f.tokens
                names = tuple(by if by and s == self.image else s for s in tokens.segments)
                f = Plain(f.size) if by is None else Tokens(names)
            elif isinstance(f, Axis) and self.chance(0.3):
                return ONE
            out.append(f)
        return fold([Label((f,)) for f in out])

    def shuffle(self, labels: list[Label]) -> list[Label]:
        """Dimensions in another order, if their sizes allow for it."""
        for _ in range(6):
            other = self.rng.sample(labels, len(labels))
            if [x.size for x in other] == [x.size for x in labels] and other != labels:
                return other
        return self.rng.sample(labels, len(labels))

    def dim(self, layout: Layout) -> int:
        """A dimension, from the left or from the right; one of features, mostly."""
        count = len(layout)
        free = [d for d, x in enumerate(layout) if x.is_plain]
        d = self.rng.choice(free) if free and self.chance(0.6) else self.rng.randrange(count)
        return d - count if self.chance(0.5) else d

    def token_dim(self, layout: Layout, instead: int) -> int:
        """The dimension of tokens, mostly, or another."""
        found = next((d for d, x in enumerate(layout) if x.tokens), None)
        if found is None or self.chance(0.4):
            return instead
        return found - len(layout) if self.chance(0.5) else found

    def dims(self, layout: Layout, most: int = 2) -> list[int]:
        """Several dimensions, each once."""
        found = {self.dim(layout) % len(layout) for _ in range(self.rng.randint(1, most))}
        return [d - len(layout) if self.chance(0.5) else d for d in sorted(found)]


def draw_world(rng: random.Random) -> World:
    """A world; in half of them all sizes are 2, or 4."""
    frames = rng.choice([1, 1, 1, 2])
    axis = rng.choice(["frames", "frames", "height"])
    if rng.random() < 0.5:
        size, grid = rng.choice([(2, (1, 2)), (4, (4, 1)), (4, (2, 2)), (4, (1, 4))])
        frames = rng.choice([1, 1, size])
        return World(size, frames, grid, size, size, rng.choice([1, size]), axis)
    grid = rng.choice([(1, 2), (2, 2), (2, 3), (3, 2), (2, 4)])
    return World(
        rng.choice([1, 2, 3, 4]),
        frames,
        grid,
        rng.choice([1, 2, 3]),
        rng.choice([2, 3, 4, 6]),
        rng.choice([1, 2, 3]),
        axis,
    )
