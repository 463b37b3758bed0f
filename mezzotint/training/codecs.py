"""An autoencoder on its own: what the vae method starts from and writes, and what latents are made with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mezzotint.checkpoints import open_tensors, read_json, write_folder
from mezzotint.codec import Codec
from mezzotint.contract import FILE as CONTRACT
from mezzotint.contract import Licence, check_codec, read_contract
from mezzotint.errors import InputError
from mezzotint.families.assemble import built, codec_of, space_of
from mezzotint.families.flux2 import VAE_SECTION
from mezzotint.families.load import gather, is_native
from mezzotint.families.materials import INDEX, section_part, shapes_of
from mezzotint.families.native import AUTOENCODERS, SPACE, read_autoencoder, write_autoencoder
from mezzotint.families.parts import configured
from mezzotint.files import write_json
from mezzotint.governance.licences import UNSTATED


@dataclass(frozen=True, slots=True)
class Found:
    """A codec in float32, the folder or file that its weights came from, and the licence that they came under."""

    codec: Codec
    at: Path
    licence: Licence


def write_codec(codec: Codec, path: Path, facts: dict[str, Any] | None = None) -> Path:
    """Write config.json, weights and latent_space.json as a folder, whole or not at all."""

    def write(folder: Path) -> None:
        write_autoencoder(codec, folder, facts or {})
        # marks a folder that may be replaced by a newer one of its kind
        write_json(folder / INDEX, {"_class_name": "MezzotintCodec", "digest": codec.digest()})

    return write_folder(path, write)


def read_codec(path: Path) -> tuple[Codec, Path]:
    """The codec of anything that `find` takes, and the folder or file that its weights came from."""
    found = find(path)
    return found.codec, found.at


def find(path: Path) -> Found:
    """The codec of an autoencoder's folder, or of a model: a folder of any family, or an original single file.

    The latent space is the model's: of its contract, latent_space.json, the stored statistics, or scaling_factor and
    shift_factor. InputError where there is neither.
    """
    path = Path(path)
    if path.is_dir() and not is_native(path):
        if (path / "config.json").is_file() and read_json(path / "config.json").get("_class_name") in AUTOENCODERS:
            return _in_model(path) or _alone(path)
        if not (path / INDEX).is_file() and not any(path.glob("*/config.json")):
            raise InputError(f"{path} is neither an autoencoder folder (config.json is missing) nor a model folder.")
    if not path.exists():
        raise InputError(f"no such autoencoder or model: {path}")
    return _of_model(path)


def _of_model(path: Path) -> Found:
    if path.is_dir() and is_native(path):
        contract, at = read_contract(path), path / "vae"
        codec = read_autoencoder(at, contract.latent.space())
        check_codec(contract, path / CONTRACT, codec, at)
        return Found(codec, at, contract.licence)
    if path.is_file() and "bn.running_mean" in shapes_of(tensors := open_tensors(path)):  # FLUX.2's, published alone
        material = section_part(VAE_SECTION, tensors, path)
        network = built(*configured(AUTOENCODERS, material.config, path), material, torch.float32)
        return Found(Codec(network, space_of(network)), path, Licence(weights=UNSTATED))
    family, materials = gather(path)
    codec = codec_of(materials, family, torch.float32)
    at = materials.parts[family.codec].at if family.codec else path
    return Found(codec, at, Licence(weights=family.licence(materials)))


def _in_model(folder: Path) -> Found | None:
    """What the model says of a part of it, whose own files may not know its latent space or licence."""
    model = folder.parent
    if (folder / SPACE).is_file() or not ((model / INDEX).is_file() or (model / CONTRACT).is_file()):
        return None
    try:
        found = _of_model(model)
    except InputError:
        if is_native(model):
            raise
        return None  # parts of a model that is not known here
    return found if found.at == folder else None


def _alone(folder: Path) -> Found:
    stated = read_json(folder / SPACE) if (folder / SPACE).is_file() else {}
    licence = Licence(weights=str(stated.get("licence") or UNSTATED), data=stated.get("data_licence"))
    return Found(read_autoencoder(folder), folder, licence)
