"""T5's encoder (Raffel et al. 2020) as a prompt encoder for SD 3.x, and the zeros that stand in for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.text.encoder import Reading
from mezzotint.text.rows import Words, grown, size, vectors_at, whole
from mezzotint.text.vocabulary import Vocabulary, open_tokenizer
from mezzotint.text.weights import MISSING, digest, fill, read_folder, write_folder

if TYPE_CHECKING:
    from transformers import T5EncoderModel

SETTINGS = (
    "d_kv", "num_heads", "feed_forward_proj", "relative_attention_num_buckets", "relative_attention_max_distance",
    "layer_norm_epsilon",
)  # fmt: skip
TABLE = "encoder.embed_tokens"  # of token vectors, the one that is read
SHARED, TIED = "shared.weight", f"{TABLE}.weight"  # one table under two names


@dataclass
class T5:
    """A T5 encoder read at its last layer; as SD 3.x was trained, it sees its padding."""

    network: T5EncoderModel
    vocabulary: Vocabulary
    folder: str = "text_encoder_3"
    name: str = "t5"
    settings: Mapping[str, Any] | None = None

    pooled_width: int | None = None
    stands_for_nothing: Literal["encoded", "zeros"] = "encoded"

    def __post_init__(self) -> None:
        self.width: int = self.network.config.d_model

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The one network, by its folder."""
        return {self.folder: self.network}

    def with_networks(self, networks: Mapping[str, nn.Module]) -> T5:
        """The same encoder with another network in its place, where there is one for its folder."""
        return replace(self, network=cast("Any", networks.get(self.folder, self.network)))

    def tables(self) -> Mapping[str, Tensor]:
        """The one table of token vectors, by its folder."""
        return {self.folder: cast("Tensor", self.network.get_submodule(TABLE).weight)}

    def vectors(self, text: str) -> Mapping[str, Tensor]:
        """The vectors of the tokens of a text, by folder."""
        return {self.folder: vectors_at(self.network, TABLE, self.vocabulary.known(text))}

    def with_words(self, words: Words) -> T5:
        """The same encoder with new words; this one stays as it is."""
        network, vocabulary = grown(self.network, TABLE, self.vocabulary, words, self.folder, self.name)
        return replace(self, network=network, vocabulary=vocabulary)

    def readings(self, digests: bool = True) -> tuple[Reading, ...]:
        """The last layer, the length, the padding token."""
        settings = {key: getattr(self.network.config, key) for key in SETTINGS}
        found = digest(settings, self._tensors(), self.vocabulary.words()) if digests else ""
        padding = self.vocabulary.tokenizer.convert_ids_to_tokens(self.vocabulary.pad)
        return (Reading(self.name, found, (-1,), self.vocabulary.length, padding, "none", self.width),)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt takes, start and end included, nothing cut."""
        return self.vocabulary.lengths(prompts)

    def encode(self, prompts: Sequence[str], chunked: bool = False) -> Conditioning:
        """tokens (B, N, D) at the chosen length; a longer prompt is cut with a warning, never read in pieces."""
        if chunked:
            raise InputError("T5 cannot read a prompt in pieces: give it a greater length")
        ids = self.vocabulary.rows(prompts)[0][:, 0].to(self.network.shared.weight.device)  # (B, N)
        return Conditioning(tokens=self.network(input_ids=ids).last_hidden_state)

    def empty(self, count: int = 1) -> Conditioning:
        """The encoded "", `count` times."""
        return self.encode([""]).map(lambda tensor: tensor.repeat_interleave(count, 0))

    def to(self, device: str | torch.device) -> T5:
        """Move the network, in place."""
        self.network.to(device=torch.device(device))  # pyright: ignore[reportCallIssue, reportArgumentType]
        return self

    def save(self, root: Path) -> None:
        """Write the network's folder and the tokenizer's: text_encoder_3 and tokenizer_3."""
        config = {**(self.settings or {}), "architectures": ["T5EncoderModel"], "model_type": "t5"}
        config["vocab_size"] = size(self.network, TABLE)
        tensors = {name: tensor for name, tensor in self._tensors().items() if name != TIED}
        write_folder(Path(root) / self.folder, config, tensors)
        self.vocabulary.save(Path(root) / self.folder.replace("text_encoder", "tokenizer"))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = whole(self.network)
        return {**tensors, SHARED: tensors[TIED]}


@dataclass
class NoT5:
    """The zeros that SD 3.x reads where T5 was left out to save memory."""

    length: int = 256
    width: int = 4096
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32

    pooled_width: int | None = None
    stands_for_nothing: Literal["encoded", "zeros"] = "zeros"

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """None."""
        return {}

    def readings(self, digests: bool = True) -> tuple[Reading, ...]:
        """No network, zeros throughout."""
        return (Reading("none", "", (), self.length, "zeros", "none", self.width),)

    def with_networks(self, networks: Mapping[str, nn.Module]) -> NoT5:
        """Itself."""
        return self

    def tables(self) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def vectors(self, text: str) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def with_words(self, words: Words) -> NoT5:
        """Itself: zeros stand for every word."""
        return self

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Nothing is read."""
        return [0] * len(prompts)

    def encode(self, prompts: Sequence[str], chunked: bool = False) -> Conditioning:
        """tokens (B, N, D) of zeros."""
        return self.empty(len(prompts))

    def empty(self, count: int = 1) -> Conditioning:
        """The same zeros."""
        return Conditioning(tokens=torch.zeros(count, self.length, self.width, device=self.device, dtype=self.dtype))

    def to(self, device: str | torch.device) -> NoT5:
        """Make the zeros on another device."""
        self.device = device
        return self

    def save(self, root: Path) -> None:
        """Nothing to write."""


def load_folder(
    folder: Path,
    tokenizer_folder: Path,
    dtype: torch.dtype | None = torch.float32,
    length: int = 256,
    name: str | None = None,
) -> T5:
    """A T5 encoder from its folder and its tokenizer's; `dtype` None keeps the file's."""
    config, tensors = read_folder(folder)
    tokenizer = open_tokenizer("T5TokenizerFast", tokenizer_folder)
    return from_tensors(config, tensors, tokenizer, dtype, length, Path(folder).name, name, at=folder)


def from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    dtype: torch.dtype | None = torch.float32,
    length: int = 256,
    folder: str = "text_encoder_3",
    name: str | None = None,
    at: object = "the T5 encoder",
) -> T5:
    """A T5 encoder from config.json's content and tensors under the published names; a decoder's are passed over."""
    try:
        from transformers import T5Config, T5EncoderModel
    except ImportError as error:
        raise InputError(MISSING) from error
    if length < 2 or tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise InputError(
            f"{at}: T5 reads 2 tokens or more (not {length}), with a tokenizer that has an end and padding"
        )
    held = {key: value for key, value in tensors.items() if not key.startswith(("decoder.", "lm_head."))}
    table = held.get(SHARED, held.get(TIED))
    held |= {} if table is None else {SHARED: table, TIED: table}
    still = {**config, "dropout_rate": 0.0}  # where others train with it, too
    network = fill(lambda: T5EncoderModel(T5Config(**still)), config.get("num_layers", 6), held, dtype, at)
    network.encoder.embed_tokens.weight = network.shared.weight
    vocabulary = Vocabulary(tokenizer, length, tokenizer.pad_token_id, end=tokenizer.eos_token_id)
    return T5(network, vocabulary, folder, name or folder, dict(config))
