"""Faults of text and guidance: encoders, layers, padding, captions, labels, strength, an untrained branch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from patient import Patient, Unfit, backbone, contract, generator, resealed, rows, settings, tensors, uniform
from torch import Tensor

TABLES = ("class_embedding.weight", "embedding_table.weight")  # rows of classes
LONG = (
    "a detailed electroluminescence photograph taken in a dark laboratory with a cooled camera during the quality "
    "control of a production line where every single wafer is contacted by probes and driven with its nominal current "
    "so that it glows in the near infrared and shows its grains and its fingers and its busbars and all the rest ; "
)


def encoders(patient: Patient) -> list[Path]:
    return sorted(folder for folder in patient.path.glob("text_encoder*") if folder.is_dir())


def redrawn(name: str, tensor: Tensor, draw: torch.Generator) -> Tensor:
    """Other random weights of the same mean and deviation: another training that ended as well as this one."""
    if tensor.ndim < 1 or not tensor.is_floating_point() or tensor.numel() < 2 or name.startswith("text_projection"):
        return tensor
    return tensor.mean() + tensor.std() * torch.randn(tensor.shape, generator=draw)


def encoder_other(sealed: bool) -> Callable[[Patient, Random], Patient]:
    """Another text encoder of the same shape."""

    def seed(patient: Patient, rng: Random) -> Patient:
        draw = generator(rng)
        for folder in encoders(patient):
            with tensors(folder / "model.safetensors") as found:
                for name, tensor in found.items():
                    found[name] = redrawn(name, tensor, draw)
        if sealed:
            resealed(patient)
        return patient

    return seed


def words_permuted(patient: Patient, rng: Random) -> Patient:
    """Another vocabulary: words have other numbers. Here the rows of the table change places instead."""
    draw = generator(rng)
    for folder in encoders(patient):
        with tensors(folder / "model.safetensors") as found:
            for name in found:
                if name.endswith(("token_embedding.weight", "shared.weight")):
                    found[name] = found[name][torch.randperm(len(found[name]), generator=draw)]
    return patient


def layer_added(patient: Patient, rng: Random) -> Patient:
    """The whole encoder where a model was trained on its last layer but one, as Stable Diffusion 2 on OpenCLIP."""
    draw = generator(rng)
    for folder in encoders(patient):
        config = folder / "config.json"
        count = json.loads(config.read_text())["num_hidden_layers"]
        with tensors(folder / "model.safetensors") as found:
            last = f"encoder.layers.{count - 1}."
            for name in [name for name in found if last in name]:
                found[name.replace(last, f"encoder.layers.{count}.")] = redrawn(name, found[name], draw)
        settings(config, num_hidden_layers=count + 1)
    return patient


def layer_dropped(patient: Patient, rng: Random) -> Patient:
    """CLIP's last layer left out, so that the layer that is read by its distance from the end is an earlier one."""
    for folder in encoders(patient):
        config = folder / "config.json"
        told = json.loads(config.read_text())
        if "num_hidden_layers" not in told:  # T5
            continue
        count = told["num_hidden_layers"]
        with tensors(folder / "model.safetensors") as found:
            for name in [name for name in found if f"encoder.layers.{count - 1}." in name]:
                del found[name]
        settings(config, num_hidden_layers=count - 1)
    return patient


def padding(patient: Patient, rng: Random) -> Patient:
    """The other of the two paddings that CLIPs are trained with."""
    changed = False
    for file in sorted(patient.path.glob("tokenizer*/special_tokens_map.json")):
        told = json.loads(file.read_text())
        pad = told.get("pad_token")
        pad = pad["content"] if isinstance(pad, dict) else pad
        if pad not in ("!", "<|endoftext|>"):  # T5's
            continue
        settings(file, pad_token="<|endoftext|>" if pad == "!" else "!")
        changed = True
    if not changed:
        raise Unfit("its tokenizer names no padding of CLIP")
    return patient


def truncated(patient: Patient, rng: Random) -> Patient:
    """What tells images apart stands behind two hundred words."""

    def longer(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["text"] = LONG * 4 + line["text"]

    return rows(patient, longer, 300)


def deaf(patient: Patient, rng: Random) -> Patient:
    """Conditioning reaches the network a thousand times too weak, as by a layer frozen at its start."""
    factor = uniform(rng, 1e-4, 1e-2)
    with backbone(patient) as found:
        crossing = [name for name in found if ".attn2.to_out.0." in name]
        tables = [name for name in found if name.endswith(TABLES)]
        joint = [
            name for name in found if name.startswith(("context_embedder.weight", "time_text_embed.text_embedder"))
        ]
        for name in crossing or joint:
            found[name] *= factor
        if not crossing and not joint:
            for name in tables:
                found[name] = found[name].mean(0) + factor * (found[name] - found[name].mean(0))
    return patient


def captions_shuffled(patient: Patient, rng: Random) -> Patient:
    """Captions of other images."""

    def shuffle(lines: list[dict[str, Any]]) -> None:
        texts = [line["text"] for line in lines]
        rng.shuffle(texts)
        for line, text in zip(lines, texts, strict=True):
            line["text"] = text

    return rows(patient, shuffle, 300)


def labels_rolled(patient: Patient, rng: Random) -> Patient:
    """Labels count another list of classes than the model's."""
    count = len(patient.contract["classes"]["names"])
    by = rng.randint(1, count - 1)

    def roll(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line.get("label") is not None:
                line["label"] = (line["label"] + by) % count

    return rows(patient, roll, 300)


def table_permuted(patient: Patient, rng: Random) -> Patient:
    """The rows of the class table in another order: converted with another list of classes."""
    count = len(patient.contract["classes"]["names"])
    order = list(range(count))
    while any(i == j for i, j in enumerate(order)):
        rng.shuffle(order)
    with backbone(patient) as found:
        for name in found:
            if name.endswith(TABLES):
                found[name][:count] = found[name][:count][order]
    return patient


# Guidance.


def guided(low: float, high: float) -> Callable[[Patient, Random], Patient]:
    """Another guidance scale recommended."""

    def seed(patient: Patient, rng: Random) -> Patient:
        scale = round(uniform(rng, low, high), 1)
        contract(patient, lambda facts: facts["guidance"].update(scale=scale))
        return patient

    return seed


def distilled_as_base(patient: Patient, rng: Random) -> Patient:
    """Guidance was distilled into the network, and its files say that it is an ordinary base."""
    plain = {"dropout": 0.1, "distilled": False, "embedded": False, "scale": round(uniform(rng, 5.0, 9.0), 1)}
    contract(patient, lambda facts: facts.update(guidance=plain))
    contract(patient, lambda facts: facts["sampling"].update(sampler="ddim", steps=25, from_image="rest"))
    return patient


def distilled_published(patient: Patient, rng: Random) -> Patient:
    """Its weights alone in the files of the base, as converted by a tool that knows no such models."""
    import shutil

    out = patient.scratch / "published"
    shutil.copytree(patient.nest.model("sd1-epsilon"), out)
    (file,) = (patient.path / "unet").glob("*.safetensors")
    shutil.copy(file, out / "unet" / file.name)
    return replace(patient, path=out)


def branch_untrained(patient: Patient, rng: Random) -> Patient:
    """The row for "no class" is as PyTorch draws tables, though the contract says that it was trained."""
    draw, null = generator(rng), patient.contract["classes"]["null"]
    if null is None:
        raise Unfit("it has no row for no class")
    with backbone(patient) as found:
        for name in found:
            if name.endswith(TABLES):
                found[name][null] = torch.randn(found[name].shape[1:], generator=draw)
    return patient
