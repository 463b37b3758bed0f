"""Language models whose hidden states steer FLUX.2: Mistral Small 3.2 for dev, Qwen3 for klein."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.text.encoder import Reading
from mezzotint.text.rows import Words, grown, learned, vectors_at, whole
from mezzotint.text.vocabulary import Vocabulary, open_tokenizer
from mezzotint.text.weights import MISSING, digest, fill, read_folder, write_folder

MISTRAL_LAYERS, QWEN3_LAYERS = (10, 20, 30), (9, 18, 27)  # of 40 and of 36
PREFIXES = ("language_model.model.", "model.language_model.", "model.")  # of the decoder, in files of several writers
SETTINGS = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "sliding_window",
)  # fmt: skip
TABLE = "embed_tokens"  # of token vectors
BREAK = chr(10)
# What FLUX.2 dev was trained to read before every prompt: a constant of the weights, like a special token.
MISTRAL_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    f"relationships, object{BREAK}attribution and actions without speculation."
)


@dataclass(frozen=True, slots=True)
class Template:
    """The conversation around a prompt; `dropped` are words that would be read as pictures."""

    before: str
    after: str
    dropped: tuple[str, ...] = ()

    def around(self, prompt: str) -> str:
        for word in self.dropped:
            prompt = prompt.replace(word, "")
        return f"{self.before}{prompt}{self.after}"


MISTRAL = Template(f"<s>[SYSTEM_PROMPT]{MISTRAL_SYSTEM}[/SYSTEM_PROMPT][INST]", "[/INST]", ("[IMG]",))
QWEN3 = Template(
    f"<|im_start|>user{BREAK}",
    f"<|im_end|>{BREAK}<|im_start|>assistant{BREAK}<think>{BREAK * 2}</think>{BREAK * 2}",
)


@dataclass
class LanguageModel:
    """A decoder read at several layers, joined on channels; 0 would be the embeddings, n the output of the nth layer.

    Only the layers up to the last one read are in `network`. `rest` are the file's other tensors, mapped and not
    loaded, so that `save` writes a whole model; `names` are the file's names for the network's tensors.
    """

    network: Any  # a transformers decoder without its head
    vocabulary: Vocabulary
    template: Template
    layers: tuple[int, ...]
    names: Mapping[str, str]
    rest: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    folder: str = "text_encoder"
    name: str = "llm"

    pooled_width: int | None = None
    stands_for_nothing: Literal["encoded", "zeros"] = "encoded"

    def __post_init__(self) -> None:
        self.width: int = self.network.config.hidden_size * len(self.layers)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The one network, by its folder."""
        return {self.folder: self.network}

    def with_networks(self, networks: Mapping[str, nn.Module]) -> LanguageModel:
        """The same encoder with another network in its place, where there is one for its folder."""
        return replace(self, network=cast("Any", networks.get(self.folder, self.network)))

    def tables(self) -> Mapping[str, Tensor]:
        """The one table of token vectors, by its folder."""
        return {self.folder: cast("Tensor", self.network.get_submodule(TABLE).weight)}

    def vectors(self, text: str) -> Mapping[str, Tensor]:
        """The vectors of the tokens of a text, by folder."""
        return {self.folder: vectors_at(self.network, TABLE, self.vocabulary.known(text))}

    def with_words(self, words: Words) -> LanguageModel:
        """The same encoder with new words; this one stays as it is."""
        network, vocabulary = grown(self.network, TABLE, self.vocabulary, words, self.folder, self.name)
        return replace(self, network=network, vocabulary=vocabulary)

    def readings(self, digests: bool = True) -> tuple[Reading, ...]:
        """The layers; padding is masked inside the language model, but the backbone sees its states."""
        config = self.network.config
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", getattr(config, "rope_theta", None))
        settings = {key: getattr(config, key, None) for key in SETTINGS}
        settings |= {"rope_theta": theta, "before": self.template.before, "after": self.template.after}
        found = digest(settings, whole(self.network), self.vocabulary.words()) if digests else ""
        return (Reading(self.name, found, self.layers, self.vocabulary.length, "mask", "none", self.width),)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens that each prompt takes, template and all, nothing cut."""
        return self.vocabulary.lengths([self.template.around(prompt) for prompt in prompts])

    def encode(self, prompts: Sequence[str], chunked: bool = False) -> Conditioning:
        """tokens (B, N, layers * D), N the fixed length; a longer prompt is cut with a warning, template and all."""
        if chunked:
            raise InputError("a language model cannot read a prompt in pieces: give it a greater length")
        ids, real = self.vocabulary.rows([self.template.around(prompt) for prompt in prompts], tail=self.template.after)
        device = self.network.embed_tokens.weight.device
        states = self.network(
            input_ids=ids[:, 0].to(device), attention_mask=real[:, 0].long().to(device), output_hidden_states=True,
            use_cache=False,
        ).hidden_states  # fmt: skip
        return Conditioning(tokens=torch.cat([states[layer] for layer in self.layers], dim=-1))

    def empty(self, count: int = 1) -> Conditioning:
        """The encoded "", template and all, `count` times."""
        return self.encode([""]).map(lambda tensor: tensor.repeat_interleave(count, 0))

    def to(self, device: str | torch.device) -> LanguageModel:
        """Move the layers that are read, in place."""
        self.network.to(device=torch.device(device))
        return self

    def save(self, root: Path) -> None:
        """Write the whole model and its tokenizer, the layers that are never read included.

        InputError where it has learnt words: its head, which is in the file too, has not.
        """
        if learned(self.network):
            raise InputError(f"{self.name} cannot be written with new words in it: keep those in their own file")
        read = {self.names[name]: tensor for name, tensor in self.network.state_dict().items()}
        write_folder(Path(root) / self.folder, self.settings, {**self.rest, **read})
        self.vocabulary.save(Path(root) / "tokenizer")


def load_folder(
    folder: Path,
    tokenizer_folder: Path,
    dtype: torch.dtype | None = torch.bfloat16,
    layers: tuple[int, ...] | None = None,
    length: int = 512,
    name: str | None = None,
) -> LanguageModel:
    """A Mistral 3 or Qwen3 from its folder and its tokenizer's (or processor's); `dtype` None keeps the file's."""
    config, tensors = read_folder(folder)
    tokenizer = open_tokenizer("AutoTokenizer", tokenizer_folder)
    return from_tensors(config, tensors, tokenizer, dtype, layers, length, Path(folder).name, name, at=folder)


def from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    dtype: torch.dtype | None = torch.bfloat16,
    layers: tuple[int, ...] | None = None,
    length: int = 512,
    folder: str = "text_encoder",
    name: str | None = None,
    at: object = "the language model",
) -> LanguageModel:
    """A language model from config.json's content and tensors under the published names.

    `layers` and the template are those of FLUX.2 by `model_type`: mistral3 (dev) or qwen3 (klein).
    """
    kind = config.get("model_type")
    if kind not in ("mistral3", "qwen3"):
        raise InputError(f"{at}: 'model_type' is {kind!r}; known here: mistral3 (FLUX.2 dev), qwen3 (FLUX.2 klein)")
    template, usual = (MISTRAL, MISTRAL_LAYERS) if kind == "mistral3" else (QWEN3, QWEN3_LAYERS)
    layers = layers or usual
    decoder = {"model_type": "mistral", **config.get("text_config", {})} if kind == "mistral3" else dict(config)
    total = decoder.get("num_hidden_layers")
    if not isinstance(total, int) or not all(0 <= layer <= total for layer in layers):
        raise InputError(f"{at} has {total} layers, so layers {layers} cannot be read")
    last = max(layers)
    decoder |= {"num_hidden_layers": last, "attention_dropout": 0.0}
    if isinstance(decoder.get("layer_types"), list):
        decoder["layer_types"] = decoder["layer_types"][:last]
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in tensors), "")
    held, rest = _divided(tensors, prefix, last, normed=last == total)
    network = fill(lambda: build(decoder, normed=last == total), last, held, dtype, at)
    pad = tokenizer.pad_token_id
    if pad is None:
        raise InputError(f"the tokenizer of {at} has no padding token")
    vocabulary = Vocabulary(tokenizer, length, pad, side=tokenizer.padding_side)
    names = {key: f"{prefix}{key}" for key in held}
    return LanguageModel(
        network, vocabulary, template, layers, names, rest, dict(config), folder, name or folder
    )  # fmt: skip


def _divided(
    tensors: Mapping[str, Tensor], prefix: str, last: int, normed: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The decoder's tensors that are needed, by its own names, and all others by the file's."""
    held: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(prefix)
        parts = own.split(".")
        layer = parts[0] == "layers" and parts[1].isdigit() and int(parts[1]) < last
        needed = name.startswith(prefix) and (layer or parts[0] == "embed_tokens" or (normed and parts[0] == "norm"))
        (held if needed else rest)[own if needed else name] = tensor
    return held, rest


def build(config: Mapping[str, Any], normed: bool) -> Any:
    """A decoder without its head, and without its final norm where only earlier layers are read."""
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise InputError(MISSING) from error
    network = AutoModel.from_config(AutoConfig.for_model(**config))
    if not normed:
        network.norm = nn.Identity()
    return network
