"""A stage that draws the pictures of rows, for Ray Data and whatever else maps batches of columns.

rows = ray.data.read_json("prompts.jsonl", lines=True)      # prompt, and seed or index
rows = rows.map_batches(
    toma_fx.DrawPictures, fn_constructor_args=("./my-sdxl", "recipe.json"),
    fn_constructor_kwargs={"dtype": "bfloat16", "steps": 30},
    batch_size=16, num_gpus=1, compute=ray.data.ActorPoolStrategy(size=8),
)
rows.write_parquet("pictures")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toma_fx.errors import ConfigError
from toma_fx.measure.cases import Case, batches_of, naming
from toma_fx.measure.prompts import parse_item
from toma_fx.measure.records import png
from toma_fx.measure.subjects import subject_of
from toma_fx.models.named import EMBEDDED, load_embedded, load_pipeline
from toma_fx.offline.generate import recipe_of

FIELDS = ("negative_prompt", "width", "height")
"""Columns that are arguments of the pipeline's call."""


class DrawPictures:
    """Adds a column `png`, the file of a picture, to a batch of rows given as columns.

    Columns that are read: `prompt`; `seed`, or `index`, for the seed `seed` + index; and, where a
    row has them, `negative_prompt`, `width` and `height`. Others stay as they are.

    With `batch=1`, as by default, pictures do not depend on how the rows are cut into batches, and
    are those of `toma_fx.generate`, byte by byte.

    Args:
        model: name of an embedded model, folder or hub id of a pipeline, or what
            `toma_fx.generate` takes.
        recipe: as of `toma_fx.generate`.
        dtype, device: of a pipeline that is loaded (default float32, and the GPU if there is one).
        seed: of the row with index 0.
        settings: fields of `Settings`: steps, guidance, height, width, batch, compile, ...

    Raises:
        ConfigError, ModelTypeError: a model, a recipe or settings that can't be.
    """

    def __init__(
        self,
        model: Any,
        recipe: Any = None,
        *,
        dtype: str | None = None,
        device: str | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self._config, self._seed = recipe_of(recipe), seed
        if isinstance(model, str):
            load = load_embedded if model in EMBEDDED else load_pipeline
            model = load(model, dtype, device)
        elif dtype is not None or device is not None:
            raise ConfigError(
                "a model that is loaded has its dtype and device",
                where="dtype" if dtype is not None else "device",
                expected="none",
                got=str(dtype or device),
            )
        self._subject = subject_of(model, settings)

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """The columns, and the pictures.

        Raises:
            ConfigError: a row that is no prompt, or has no seed.
        """
        cases = self._cases(rows)
        self._subject.check(cases)
        files: dict[int, bytes] = {}
        for batch in batches_of(cases, self._subject.settings.batch):
            own = [cases[index] for index in batch]
            with naming(*own):
                pictures = self._subject.draw(own, self._config)
            for index, picture in zip(batch, pictures, strict=True):
                files[index] = png(picture.nan_to_num())
        return {**rows, "png": [files[index] for index in range(len(cases))]}

    def _cases(self, rows: Mapping[str, Any]) -> list[Case]:
        names = [name for name in ("prompt", "seed", "index", *FIELDS) if name in rows]
        columns: list[Sequence[Any]] = [[_plain(value) for value in rows[name]] for name in names]
        cases = []
        for number, values in enumerate(zip(*columns, strict=True)):
            row = {n: v for n, v in zip(names, values, strict=True) if v is not None}
            where = f"row {number} of the batch"
            index = row.pop("index", None)
            prompt, own, options, _ = parse_item(row, where)
            if own is None and type(index) is not int:
                raise ConfigError(
                    "a row has no seed",
                    where=where,
                    expected="a whole number in the column seed, or in index",
                    got=f"seed {row.get('seed')!r}, index {index!r}",
                    hint="the order of rows is not kept, so their place can't give the seed",
                )
            chosen = self._seed + index if own is None else own
            cases.append(Case(prompt, chosen, options, where))
        return cases


def _plain(value: Any) -> Any:
    """A value of a column as Python has it, or None where the row has none.

    Whole numbers of a column in which some rows have none come as floats, NaN for none; beyond
    2**53 they are not exact and stay floats, which nothing takes.
    """
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and value != value:
        return None
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else value
