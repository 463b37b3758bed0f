"""Textual inversion: words of their own, each a few vectors for each text encoder (Gal et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import InputError

Vectors = dict[str, Tensor]  # (n, D) by text encoder: text_encoder, text_encoder_2, text_encoder_3

# The names that files of several encoders give them; the first one of each is what we write.
ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
    "t5xxl": "text_encoder_3",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
    "text_encoders_2": "text_encoder_3",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
}
T5 = "text_encoder_3"  # reads the letters of a word that has no vectors for it, and may be left out of a model
FAMILIES = {
    (768,): "Stable Diffusion 1.x",
    (1024,): "Stable Diffusion 2.x",
    (768, 1280): "Stable Diffusion XL",
    (1280,): "the Stable Diffusion XL refiner",
}


def read_words(data: Mapping[str, Any] | Tensor, name: str, encoders: Mapping[str, int]) -> dict[str, Vectors]:
    """The words of an embedding file and their vectors by text encoder, all in float32.

    `data` is the file as loaded, `name` the word where the file has none (its own name without the ending), `encoders`
    the width of the token embeddings of each encoder that can take words, by part. Known forms: {word: vectors} as in
    learned_embeds; the web interface's string_to_param and emb_params; clip_l and clip_g for two encoders, with t5
    for three, or their folders' names. Vectors for T5 are used where both the file and the model have it.
    InputError where the widths are another family's, naming it.
    """
    return {word: _placed(word, vectors, encoders) for word, vectors in _words(data, name).items()}


def write_words(words: Mapping[str, Vectors]) -> dict[str, Tensor]:
    """The tensors of an embedding file: {word: (n, D)} of one encoder, and {encoder: (n, D)} of one word for several.

    ValueError for several words of several encoders, for which there is no published form.
    """
    if all(len(vectors) == 1 for vectors in words.values()):
        return {word: next(iter(vectors.values())).contiguous() for word, vectors in words.items()}
    ((_, vectors),) = words.items()
    published = {part: key for key, part in reversed(ENCODERS.items())}
    return {published[part]: matrix.contiguous() for part, matrix in vectors.items()}


def family(data: Mapping[str, Any] | Tensor) -> str | None:
    """Which models the words of a file are for, by the widths of their vectors."""
    for vectors in _words(data, "?").values():
        return FAMILIES.get(tuple(matrix.shape[1] for matrix in vectors.values()))
    return None


def summary(data: Mapping[str, Any] | Tensor, name: str, said: str | None = None) -> dict[str, Any] | None:
    """The words of a file, how many vectors each has and for which models they are; None where it is no such file.

    `said` is the family that the file's header names; without one the widths tell it.
    """
    try:
        words = _words(data, name)
    except InputError:
        return None
    found = said or family(data)
    vectors = {word: max(len(matrix) for matrix in table.values()) for word, table in words.items()}
    return None if found is None else {"words": vectors, "family": found}


def _words(data: Mapping[str, Any] | Tensor, name: str) -> dict[str, Vectors]:
    """{word: {encoder, or "" where the file names none: (n, D)}}."""
    if isinstance(data, Tensor):
        return {name: {"": _matrix(name, data)}}
    if "string_to_param" in data:
        parameters = data["string_to_param"]
        if not isinstance(parameters, Mapping):
            raise InputError("the embedding's string_to_param is no table: this is no textual inversion file.")
        if len(parameters) != 1:
            raise InputError(f"the embedding holds {len(parameters)} parameters where it should hold one.")
        return {str(data.get("name") or name): {"": _matrix(name, next(iter(parameters.values())))}}
    if "emb_params" in data:
        return {name: {"": _matrix(name, data["emb_params"])}}
    if data.keys() & ENCODERS.keys():
        if unknown := sorted(data.keys() - ENCODERS.keys()):
            raise InputError(f"the embedding has vectors for '{unknown[0]}', which no model here reads.")
        return {name: {ENCODERS[key]: _matrix(key, value) for key, value in sorted(data.items(), key=_in_order)}}
    if not data:
        raise InputError("the embedding file is empty.")
    vectors = {word: value for word, value in data.items() if isinstance(value, Tensor)} or data  # notes may stand by
    return {word: {"": _matrix(word, value)} for word, value in vectors.items()}


def _in_order(item: tuple[str, Any]) -> int:
    return list(ENCODERS).index(item[0])


def _matrix(key: str, value: Any) -> Tensor:
    """(n, D) from a matrix or a single vector."""
    if not isinstance(value, Tensor) or value.ndim not in (1, 2) or not torch.is_floating_point(value):
        raise InputError(f"'{key}' is not a vector or a few: this is no textual inversion file of a known form.")
    return torch.atleast_2d(value.detach()).float()


def _placed(word: str, vectors: Vectors, encoders: Mapping[str, int]) -> Vectors:
    """Vectors by encoder, every encoder of the model having some and each of its width."""
    if "" in vectors and len(encoders) == 1:
        vectors = {next(iter(encoders)): vectors[""]}
    # the refiner reads with the second encoder of the base model, so the base's words serve it as well
    found = {part: matrix for part, matrix in vectors.items() if part in encoders}
    surplus = bool(vectors.keys() - found.keys() - {T5}) and "text_encoder" in encoders
    needed = {part: width for part, width in encoders.items() if part != T5 or part in found}
    ours = [key for key, part in ENCODERS.items() if part in needed and part not in found]
    if found and not surplus and ours:
        raise InputError(f"the word '{word}' has no vectors for {ours[0]}, which this model reads as well.")
    if surplus or {part: matrix.shape[1] for part, matrix in found.items()} != needed:
        widths = tuple(matrix.shape[1] for matrix in vectors.values())
        fits = FAMILIES.get(widths, "another model")
        wanted = " and ".join(map(str, encoders.values()))
        raise InputError(
            f"the word '{word}' has vectors of {' and '.join(map(str, widths))} numbers, this model reads {wanted}.\n"
            f"It is for {fits}."
        )
    return found
