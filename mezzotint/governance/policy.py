"""What may be drawn, and how it leaves: a TOML file of a few tables, with a default that is safe."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mezzotint import files
from mezzotint.errors import InputError

OFF_NAME, DEFAULT = "off", Path(__file__).parent / "default.toml"


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Prompts(_Table):
    """Which words may be said."""

    deny: tuple[str, ...] = ()  # words and phrases
    deny_patterns: tuple[str, ...] = ()  # regular expressions, searched in the folded text
    allow: tuple[str, ...] = ()  # where there are any, the only words that a prompt may use
    classes: tuple[str, ...] = ()  # where there are any, the classes that may be drawn
    longest: int = Field(default=2000, ge=1, le=100_000)  # characters
    plug: str = ""  # module:function that is asked, too

    @field_validator("deny_patterns")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        import re

        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from error
        return patterns


class Pictures(_Table):
    """Which pictures may leave."""

    unsafe: float | Literal[False] = 0.8  # score of the classifier from which a picture is withheld
    copies: float | Literal[False] = 0.5  # distance to the nearest training image over the usual one
    plug: str = ""  # module:function that is asked, too


class Watermark(_Table):
    """Whether pictures are marked: always refuses what cannot be."""

    mode: Literal["always", "where possible", "off"] = "where possible"
    key: str = ""  # a file; the user's own key, made at first use, where left out


class Signature(_Table):
    """Whether pictures carry signed credentials."""

    mode: Literal["always", "off"] = "always"
    certificates: str = ""  # a folder; the user's own, made at first use, where left out
    authority: str = ""  # address of a time-stamping service


class Use(_Table):
    """What the pictures are for, and what happens where a licence forbids it."""

    use: Literal["unstated", "research", "non-commercial", "commercial"] = "unstated"
    forbidden: Literal["stop", "record"] = "stop"


class Log(_Table):
    """Where everything is written down."""

    file: str | Literal[False] = ""  # the user's own log where left out


class Policy(_Table):
    """All rules under which a pipeline works."""

    name: str
    prompts: Prompts = Prompts()
    pictures: Pictures = Pictures()
    watermark: Watermark = Watermark()
    signature: Signature = Signature()
    licence: Use = Use()
    audit: Log = Log()

    @property
    def digest(self) -> str:
        """SHA-256 over all rules."""
        return files.sha256_json(self.model_dump(mode="json"))

    @property
    def off(self) -> bool:
        """Whether nothing is asked, marked or signed; that is written into the record."""
        return self.name == OFF_NAME


OFF = Policy(
    name=OFF_NAME, prompts=Prompts(longest=100_000), pictures=Pictures(unsafe=False, copies=False),
    watermark=Watermark(mode="off"), signature=Signature(mode="off"), licence=Use(forbidden="record"),
    audit=Log(file=False),
)  # fmt: skip


def read_policy(source: str | Path | None = None) -> Policy:
    """The policy of a file; the packaged default for None, no rules at all for "off".

    InputError says which key is wrong, and the nearest valid name.
    """
    if source == OFF_NAME:
        return OFF
    path = DEFAULT if source is None else Path(source)
    return _checked(files.read_toml(path, "policy"), path)


def _checked(content: dict[str, Any], at: Path) -> Policy:
    if content.get("name") == OFF_NAME:
        raise InputError(f"{at}: the name 'off' is taken by the policy without rules: choose another")
    try:
        return Policy.model_validate(content)
    except ValidationError as error:
        first, *rest = error.errors()
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            near = get_close_matches(str(first["loc"][-1]), _names(Policy), n=1)
            message = f"unknown key{f', nearest valid name: {near[0]}' if near else ''}"
        more = f" (and {len(rest)} more)" if rest else ""
        raise InputError(f"{at}: {where}: {message}{more}") from error


def _names(table: type[BaseModel]) -> list[str]:
    found: list[str] = []
    for name, field in table.model_fields.items():
        found.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _names(field.annotation)
    return found
