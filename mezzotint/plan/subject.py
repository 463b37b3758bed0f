"""What is planned for: a model by its configurations and contract, without its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mezzotint.checkpoints import read_json
from mezzotint.codec import Codec, LatentSpace
from mezzotint.codec.pixels import PixelsConfig
from mezzotint.conditioning import Conditioning
from mezzotint.contract import Contract, DtypeFacts, LatentFacts, Licence, TextFacts, read_contract
from mezzotint.errors import InputError
from mezzotint.families.assemble import HALVES, codec_dtypes
from mezzotint.families.family import Asked, Family, unanswered
from mezzotint.families.load import gather, is_native
from mezzotint.families.materials import Materials, read_folder
from mezzotint.families.model import Model
from mezzotint.families.parts import AUTOENCODERS, BACKBONES, Part, configured
from mezzotint.families.registry import FAMILIES
from mezzotint.plan import zoo
from mezzotint.plan.encoders import LENGTHS, Encoder
from mezzotint.plan.trace import Traced, imaginary, outlined

MINILM: dict[str, Any] = {  # the packaged encoder of our own models: all-MiniLM-L6-v2's shape
    "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 30522, "hidden_size": 384,
    "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model that could be loaded, as far as plans need it."""

    name: str
    title: str
    contract: Contract
    backbone: tuple[Part, Any]  # kind and configuration
    codec: tuple[Part, Any]
    encoders: tuple[Encoder, ...]
    notes: tuple[str, ...] = ()
    traces: dict[Any, Traced] = field(default_factory=dict[Any, Traced], compare=False, repr=False)  # seen already

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters by part: backbone, codec, each text encoder (of language models the layers that are read)."""
        return {name: sum(p.numel() for p in network.parameters()) for name, network in self._outlines.items()}

    @cached_property
    def besides(self) -> dict[str, int]:
        """Numbers stored besides by part: tables of positions, statistics."""
        return {name: sum(b.numel() for b in network.buffers()) for name, network in self._outlines.items()}

    @cached_property
    def _outlines(self) -> dict[str, nn.Module]:
        with outlined():
            parts = {"backbone": self.backbone[0].network(self.backbone[1])}
            parts["codec"] = self.codec[0].network(self.codec[1])
            return parts | {encoder.folder: encoder.build() for encoder in self.encoders}

    def outline(self, part: str) -> nn.Module:
        """A part on the meta device."""
        return self._outlines[part]

    def once(self, key: Any, make: Callable[[], Traced]) -> Traced:
        """A trace by what it depends on; made where it was not seen yet."""
        if key not in self.traces:
            self.traces[key] = make()
        return self.traces[key]

    def model(self, dtype: torch.dtype, codec_dtype: torch.dtype | None = None) -> Model:
        """The model without text and without numbers, made inside `imagined`."""
        backbone = imaginary(self.outline("backbone"), dtype)
        autoencoder = imaginary(self.outline("codec"), codec_dtype or dtype)
        space = LatentSpace(self.contract.latent.scale, self.contract.latent.shift)
        return Model(self.contract, backbone, Codec(autoencoder, space))

    def outlined(self) -> Model:
        """The same on the meta device: enough to settle a request."""
        latent = self.contract.latent
        return Model(self.contract, self.outline("backbone"), Codec(self.outline("codec"), latent.space()))

    @property
    def tokens(self) -> int:
        """Tokens of text that the backbone reads."""
        beside = max((e.length for e in self.encoders if e.kind != "t5"), default=0)
        return beside + sum(e.length for e in self.encoders if e.kind == "t5") + self.zeros

    @property
    def zeros(self) -> int:
        """Tokens of zeros that stand where Stable Diffusion 3 would read T5, which may be left out."""
        absent = bool(self.encoders) and all(encoder.kind != "t5" for encoder in self.encoders)
        return LENGTHS["t5"] if self.contract.family == "sd35" and absent else 0

    def conditioning(self, count: int, size: tuple[int, int], dtype: torch.dtype) -> Conditioning:
        """What the backbone reads for `count` images of width x height, without numbers."""
        contract, latent = self.contract, self.contract.latent
        text, h, w = contract.text, size[1] // latent.factor, size[0] // latent.factor
        masked = bool(self.encoders) and self.encoders[0].kind == "bert"
        return Conditioning(
            tokens=torch.zeros(count, self.tokens, text.width, dtype=dtype) if text else None,
            mask=torch.ones(count, self.tokens, dtype=torch.bool) if text and masked else None,
            pooled=torch.zeros(count, text.pooled, dtype=dtype) if text and text.pooled else None,
            time_ids=torch.zeros(count, len(contract.picture), dtype=dtype) if contract.picture else None,
            label=torch.zeros(count, dtype=torch.long) if contract.classes else None,
            guidance=torch.zeros(count, dtype=dtype) if contract.guidance.embedded else None,
            concat=None if contract.inpaint is None
            else torch.zeros(count, contract.inpaint**2 + latent.channels, h, w, dtype=dtype),
        )  # fmt: skip


def find(name: str, asked: Asked | None = None, parts: Path | None = None) -> Subject:
    """A published model by name, or a model folder or file by its path; InputError says what is known.

    Of files only configurations and headers are read.
    """
    path = Path(name)
    if not path.exists():
        family, materials = zoo.find(name)
        return of(name.lower(), family, materials, asked or Asked())
    if is_native(path):
        return native(path)
    family, materials = gather(path, parts)
    return of(name, family, materials, asked or Asked())


def of(name: str, family: Family, materials: Materials, asked: Asked) -> Subject:
    """The subject that a family makes of its parts."""
    question = unanswered(family, materials, asked)
    if question:
        raise InputError(f"{materials.path}: {question.text}")
    facts = family.facts(materials, asked)
    material = materials.material(family.backbone, f"without it there is no {family.title}")
    backbone = configured(BACKBONES, material.config, material.at)
    codec = _codec(family, materials, backbone[1])
    facts.setdefault("dtypes", DtypeFacts(backbone=HALVES, codec=codec_dtypes(materials, family)))
    encoders = tuple(
        Encoder(part, found.config, LENGTHS.get(_kind(found.config), 77))
        for part, found in sorted(materials.parts.items())
        if part.startswith("text_encoder") and family.text is not None
    )
    notes = list(family.notes(materials))
    if family.text is not None and not encoders:
        notes.append("the text encoders are not here and not counted")
    contract = Contract(
        family=family.name,
        latent=_latent(codec),
        text=_text(backbone[1], facts, encoders) if family.text is not None else None,
        licence=Licence(weights=family.licence(materials)),
        **facts,
    )
    return Subject(name, family.title, contract, backbone, codec, encoders, tuple(notes))


def native(path: Path) -> Subject:
    """A folder of Mezzotint's own training."""
    contract = read_contract(path)
    found = [folder for folder in (path / "unet", path / "transformer") if (folder / "config.json").is_file()]
    if not found:
        raise InputError(f"{path} has no backbone: neither unet/config.json nor transformer/config.json is there")
    backbone = configured(BACKBONES, read_json(found[0] / "config.json"), found[0])
    codec = configured(AUTOENCODERS, read_json(path / "vae" / "config.json"), path / "vae" / "config.json")
    materials = read_folder(path)
    encoders: tuple[Encoder, ...] = ()
    if contract.text is not None:
        parts = {part: m for part, m in materials.parts.items() if part.startswith("text_encoder")}
        if contract.family in FAMILIES and parts:
            encoders = tuple(
                Encoder(part, m.config, LENGTHS.get(_kind(m.config), 77)) for part, m in sorted(parts.items())
            )
        else:
            config = parts["text_encoder"].config if "text_encoder" in parts else MINILM
            config = {**config, "model_type": "bert"}
            encoders = (Encoder("text_encoder", config, contract.text.encoders[0].length),)
    return Subject(str(path), f"native ({contract.family})", contract, backbone, codec, encoders)


def _kind(config: Mapping[str, Any]) -> str:
    said = str(config.get("model_type") or "clip")
    return "clip" if said.startswith("clip") else said


def _codec(family: Family, materials: Materials, backbone: Any) -> tuple[Part, Any]:
    if not family.codec:
        return AUTOENCODERS["Pixels"], PixelsConfig(in_channels=int(backbone.in_channels))
    if family.codec not in materials.parts:
        raise InputError(f"{materials.path} has no {family.codec}: give the folder that has one with --parts")
    material = materials.parts[family.codec]
    return configured(AUTOENCODERS, material.config, material.at)


def _latent(codec: tuple[Part, Any]) -> LatentFacts:
    """Scale and shift do not change what anything costs; statistics are stood in for by one of each channel."""
    with outlined():
        network: Any = codec[0].network(codec[1])
    whitened = hasattr(network, "bn")
    scale: Any = (1.0,) * network.latent_channels if whitened else getattr(codec[1], "scaling_factor", None) or 1.0
    shift: Any = (0.0,) * network.latent_channels if whitened else getattr(codec[1], "shift_factor", None) or 0.0
    return LatentFacts(codec="", channels=network.latent_channels, factor=network.factor,
                       pixel_channels=network.pixel_channels, scale=scale, shift=shift)  # fmt: skip


def _text(backbone: Any, facts: Mapping[str, Any], encoders: tuple[Encoder, ...]) -> TextFacts:
    """Widths of what the backbone reads."""
    width = getattr(backbone, "joint_attention_dim", None) or getattr(backbone, "cross_attention_dim", 0)
    pooled = getattr(backbone, "pooled_projection_dim", None)
    if getattr(backbone, "addition_embed_type", None) == "text_time":
        told = int(backbone.addition_time_embed_dim) * len(facts.get("picture", ()))
        pooled = int(backbone.projection_class_embeddings_input_dim) - told
    return TextFacts(encoders=(), width=int(width), pooled=pooled)
