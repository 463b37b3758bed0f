"""What a synthetic defect set is made of: one flat TOML file, which is also what the command line fills in."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzotint.errors import InputError
from mezzotint.files import read_toml

FILE = "recipe.toml"
FREE = ("count", "out")  # may change between two runs into the same folder


class Recipe(BaseModel):
    """The whole run; what is left out is answered by the model's contract."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Path  # the model folder
    good: Path  # images without defects, to paint on
    out: Path  # the folder of the data set
    count: Annotated[int, Field(ge=1)] = 32  # images to paint
    seed: Annotated[int, Field(ge=0)] = 0  # image i depends on seed and i alone
    kinds: tuple[str, ...] = ()  # of defects, in turn; () all the model knows
    type: str | None = None  # of the good images, for models that know several, where metadata.jsonl does not say
    defects: Path | None = None  # real defects, to compare with
    masks: Path | None = None  # masks to use instead of drawn ones: MASKS/KIND/*.png, or *.png for any kind
    training: Path | None = None  # the model's training images, to look for copies
    sampler: str | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(ge=0)] | None = None
    policy: str | None = None  # a TOML file, or "off"; the default policy where left out


def read(path: Path) -> Recipe:
    """Read a TOML recipe; `out` is out/NAME after the file's name where it says nothing. InputError names the key."""
    path = Path(path)
    content = read_toml(path)
    content.setdefault("out", f"out/{path.stem}")
    return check(content, str(path))


def check(content: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain data; the first mistake becomes an InputError that names the key and `where`."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, list(Recipe.model_fields), n=1, cutoff=0.0)[0]
            raise InputError(f"{where}: unknown key {key} (nearest valid name: {near})") from error
        if first["type"] == "missing":
            raise InputError(f"{where}: {key} is missing") from error
        raise InputError(f"{where}: {key}: {first['msg']}, found {first['input']!r}") from error


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that reads back equal; keys without a value are left out."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in content.items())


def changes(old: Recipe, new: Recipe) -> list[str]:
    """What differs between two recipes and must not where a folder is continued, as "key: old -> new"."""

    def told(value: Any) -> Any:
        return value.resolve() if isinstance(value, Path) else value  # however a place is named, it is the same

    pairs = [(key, getattr(old, key), getattr(new, key)) for key in Recipe.model_fields if key not in FREE]
    return [f"{key} was {_shown(a)}, now {_shown(b)}" for key, a, b in pairs if told(a) != told(b)]


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Path) else repr(value)
