"""What the header of an adapter file says: alphas as newer diffusers writes them, and the notes of kohya's trainer."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mezzotint.errors import InputError

DIFFUSERS = (
    "lora_adapter_metadata"  # JSON in the header of a safetensors file; peft keeps the same in adapter_config.json
)
CONTRACT = "mezzotint"  # what the weights of ours were trained under (contract.HEADER)
WORDS = 8
# Patterns are regular expressions out of a stranger's file: names with dots, and a few "anything" between them, are all
# that is read, so that none can take forever.
PATTERN = re.compile(r"\^?[\w.\\-]*(\.\*[\w.\\-]*){0,3}\$?")


@dataclass(frozen=True, slots=True)
class Settings:
    """A peft configuration, as far as it says how strong an adapter is."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict[str, float])  # alpha by regular expression of the module
    stabilised: bool = False

    def alpha_of(self, module: str) -> float | None:
        """The alpha of a module: a pattern speaks for names that end in it, from a dot on."""
        for pattern, alpha in self.patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.alpha


def settings(metadata: Mapping[str, str]) -> dict[str, Settings]:
    """Settings by the prefix of the part ("" for a file of one part); empty where the header has none."""
    data = _json(metadata, DIFFUSERS)
    prefixes = {key.removesuffix("lora_alpha") for key in data if key.endswith("lora_alpha")}
    found: dict[str, Settings] = {}
    for prefix in prefixes:
        alpha, patterns = data[f"{prefix}lora_alpha"], data.get(f"{prefix}alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(isinstance(a, (int, float)) for a in (alpha, *patterns.values())):
            raise InputError(
                f"the header's {prefix}lora_alpha or {prefix}alpha_pattern has something other than numbers."
            )
        for pattern in patterns:
            _check_pattern(pattern)
        stabilised = bool(data.get(f"{prefix}use_rslora", False))
        found[prefix.removesuffix(".")] = Settings(float(alpha), patterns, stabilised)
    return found


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"the header's alpha pattern {pattern[:60]!r} is no regular expression: {error}") from error
    if not PATTERN.fullmatch(pattern):
        raise InputError(f"the header's alpha pattern {pattern[:60]!r} is not read: only names, with .* between them.")


def base(metadata: Mapping[str, str]) -> str | None:
    """What the trainer wrote about the model it started from."""
    keys = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
    said = [metadata[key] for key in keys if metadata.get(key, "None") not in ("", "None")]
    return ", ".join(said) or None


def prediction(metadata: Mapping[str, str]) -> str | None:
    """What the trainer wrote about the prediction type: epsilon or v."""
    return metadata.get("modelspec.prediction_type")


def words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The trigger phrase, or else the most frequent tags of the captions."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        return tuple(word for part in phrase.split(",") if (word := part.strip()))
    counts: Counter[str] = Counter()
    for tags in _json(metadata, "ss_tag_frequency").values():
        if isinstance(tags, dict):
            counts.update({tag.strip(): count for tag, count in tags.items() if isinstance(count, int)})
    return tuple(tag for tag, _ in counts.most_common(WORDS))


def _json(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    text = metadata.get(key)
    if not text:
        return {}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the header's {key} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"the header's {key} is not a JSON object.")
    return data
