"""What a training run is: one typed TOML file; unknown keys are refused with the nearest valid name."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mezzotint.errors import InputError
from mezzotint.files import read_toml
from mezzotint.training.tables import Inpaint, Loss, Optimiser, Recipe, Section, Vae

__all__ = ["Inpaint", "Loss", "Optimiser", "Recipe", "Vae", "changes", "check", "read", "to_toml"]

# tables without which a method cannot start
NEEDS: dict[str, tuple[str, ...]] = {
    "full": (),
    "vae": ("vae",),
    "patch-pca": ("patch_pca",),
    "lora": ("base", "lora"),
    "dreambooth": ("base", "dreambooth"),
    "textual-inversion": ("base", "textual_inversion"),
    "controlnet": ("base", "controlnet"),
    "lcm": ("base", "lcm"),
}
# keys that may change when a run goes on: they do not touch the weights
FREE = (
    "threads", "parallel", "recompute", "log_every", "checkpoints", "previews", "out", "validation", "sampling",
    "licence", "data_licence",
)  # fmt: skip


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe, apply `a.b=value` overrides, and check every key and value.

    `out` is runs/NAME after the recipe's file name where it says nothing.
    """
    path = Path(path)
    content = read_toml(path)
    for override in overrides:
        _apply(content, override)
    content.setdefault("out", f"runs/{path.stem}")
    return check(content, str(path))


def check(content: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain data; the first mistake becomes an InputError that names the key and `where`."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        found = sorted(_merged(error.errors()), key=lambda one: one["type"] != "extra_forbidden")  # misspellings first
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise InputError(f"{where}: {_explain(found[0])}{more}") from error
    recipe._at = Path(where)
    if recipe.batch % recipe.accumulation:
        raise InputError(f"{where}: batch {recipe.batch} must be a multiple of accumulation {recipe.accumulation}.")
    for name in NEEDS[recipe.method]:
        if getattr(recipe, name) is None:
            raise InputError(f"{where}: method '{recipe.method}' needs a [{name}] table.")
    if recipe.base is not None and recipe.backbone is not None:
        raise InputError(f"{where}: [backbone] makes a new network and [base] names one: leave one of them out.")
    if recipe.method == "full" and recipe.base is None and recipe.backbone is None:
        raise InputError(
            f"{where}: method 'full' needs a [base] table to train on, or a [backbone] table to start anew."
        )
    return recipe


def changes(old: Recipe, new: Recipe) -> list[str]:
    """Keys in which two recipes differ and which a resumed run must not change, as "key: old -> new"."""
    return [
        f"{key}: {a!r} in the checkpoint, {b!r} in the recipe"
        for key, a, b in _differences("", old.model_dump(mode="json"), new.model_dump(mode="json"))
        if key.split(".")[0] not in FREE
    ]


def to_toml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as TOML that reads back equal; keys without a value are left out."""
    return "\n".join(_table("", recipe.model_dump(mode="json"))).strip() + "\n"


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set takes key=value, for instance optimiser.rate=1e-4; got '{override}'.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string
    table = content
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {override}: '{part}' is a value, not a table.")
    table[parts[-1]] = parsed


def _merged(errors: Sequence[Any]) -> list[dict[str, Any]]:
    """The errors by key: a key that may have several types comes with an error for each of them."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for error in errors:
        loc = tuple(error["loc"])
        about_a_type = len(loc) > 1 and isinstance(loc[-1], str) and loc[-1] not in _fields([str(loc[0])])
        key = loc[:-1] if about_a_type and error["type"] not in ("extra_forbidden", "missing") else loc
        if key in merged:
            merged[key]["msg"] += f", or {error['msg'][0].lower()}{error['msg'][1:]}"
        else:
            merged[key] = {**error, "loc": key}
    return list(merged.values())


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *tables, wrong = (str(part) for part in error["loc"])
        here = _fields(tables)
        everywhere = {name: f"[{table}], as {table}.{name}" for table, names in _tables().items() for name in names}
        if wrong in everywhere:
            return f"unknown key {where}: it belongs into {everywhere[wrong]}"
        close = difflib.get_close_matches(wrong, here, n=1, cutoff=0.0)
        return f"unknown key {where} (nearest valid name: {close[0] if close else ', '.join(here)})"
    if error["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, found {error['input']!r}"


def _tables() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, info in Recipe.model_fields.items():
        for kind in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                found[name] = list(kind.model_fields)
    return found


def _fields(tables: list[str]) -> list[str]:
    return _tables().get(tables[0], []) if tables else list(Recipe.model_fields)


def _differences(key: str, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: list[tuple[str, Any, Any]] = []
        for name in dict.fromkeys([*a, *b]):
            found += _differences(f"{key}.{name}" if key else name, a.get(name), b.get(name))
        return found
    return [] if a == b else [(key, a, b)]


def _table(name: str, content: dict[str, Any]) -> list[str]:
    plain = {k: v for k, v in content.items() if v is not None and not isinstance(v, dict)}
    nested = {k: v for k, v in content.items() if isinstance(v, dict)}
    lines = ["", f"[{name}]"] if name else []
    lines += [f"{_key(k)} = {_value(v)}" for k, v in plain.items()]
    for k, v in nested.items():
        lines += _table(f"{name}.{_key(k)}" if name else _key(k), v)
    return lines


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _value(name)


def _value(value: Any) -> str:
    import json

    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(k)} = {_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
