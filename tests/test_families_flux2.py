"""FLUX.2 against the reference's pipelines: dev, klein base and klein distilled, from folders and original files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_flux2 as reference
import torch
from PIL import Image, ImageDraw
from reference_flux2 import BASE, DEV, DISTILLED, PROMPTS, RUNS, Wish, compared, error, latents, ours, picture, theirs

import mezzotint as mz
from mezzotint import images
from mezzotint.backbones.flux2_config import Flux2Config, flux2_dev, klein_4b, klein_9b
from mezzotint.contract import GuidanceFacts
from mezzotint.errors import InputError
from mezzotint.families import flux2
from mezzotint.families.family import Asked
from mezzotint.families.load import gather
from mezzotint.families.model import Model
from mezzotint.generate import settle
from mezzotint.layers.config import write_config

pytest.importorskip("diffusers")
Folder = Callable[[str], Path]
FLUX_LICENCES = ("FLUX [dev] Non-Commercial License v2.0", "Apache-2.0", "FLUX Non-Commercial License")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of a kind, written when first asked for."""
    root, known = tmp_path_factory.mktemp("flux2"), dict[str, Path]()

    def of(kind: str) -> Path:
        if kind not in known:
            known[kind] = reference.write(root / kind.replace(" ", "-"), kind)
        return known[kind]

    return of


@pytest.fixture(scope="module")
def model(folder: Folder) -> Callable[[str], Model]:
    known: dict[str, Model] = {}

    def of(kind: str) -> Model:
        if kind not in known:
            known[kind] = reference.remembering(mz.load(folder(kind)))
        return known[kind]

    return of


Opened = Callable[[str], Model]


@pytest.mark.parametrize("kind", [DEV, BASE])
def test_every_part_equals_the_reference(folder: Folder, model: Opened, kind: str) -> None:
    assert max(reference.parts(folder(kind), model(kind))) < 1e-5


@pytest.mark.parametrize(("kind", "wish"), [(kind, wish) for kind in RUNS for wish in RUNS[kind]], ids=str)
def test_whole_runs_equal_the_reference(folder: Folder, model: Opened, kind: str, wish: Wish) -> None:
    assert compared(folder(kind), model(kind), wish) < 2e-5


def test_whatever_steers_the_picture_moves_it(model: Opened) -> None:
    """So that agreement with the reference is agreement about each of these."""
    ways: dict[str, list[tuple[Wish, dict[str, Any]]]] = {
        DEV: [
            (Wish(1, prompts=("a steel plate with scratches",)), {}),
            (Wish(1, prompts=("a crack",), guidance=2.0), {}),
            (Wish(1, prompts=("a crack",), references=(picture(64, 64, 1),)), {}),
        ],
        BASE: [(Wish(1, prompts=("a crack",)), {"negative": "blurry, out of focus"})],
    }
    for kind, others in ways.items():
        before = latents(ours(model(kind), Wish(1, prompts=("a crack",))))
        for wish, more in others:
            assert error(latents(ours(model(kind), wish, **more)), before) > 2e-3


def test_pictures_equal_the_references(folder: Folder, model: Opened) -> None:
    wish = Wish(2)
    for found, expected in zip(ours(model(DISTILLED), wish), theirs(folder(DISTILLED), wish, "pil"), strict=True):
        (picture,) = found.images
        pairs = zip(picture.get_flattened_data(), expected.get_flattened_data(), strict=True)
        assert picture.size == expected.size == (96, 64)
        assert max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)) <= 1


@pytest.mark.parametrize("size", [(64, 64), (1024, 1024), (1072, 1040), (1360, 768)])
def test_levels_follow_size_and_steps_as_the_references_do(model: Opened, size: tuple[int, int]) -> None:
    """Below and above 4300 tokens; the reference works its levels out in float32."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    plain = reference.scheduler("flow_euler")
    for steps in (1, 4, 20, 28, 50):
        mu = compute_empirical_mu(size[0] * size[1] // 256, steps)
        plain.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy(), mu=mu)
        path = settle(model(DEV), mz.Request(width=size[0], height=size[1], steps=steps)).path
        torch.testing.assert_close(torch.tensor([s.now.t for s in path.steps]), plain.timesteps, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("width", "height", "mode"),
    [(64, 64, "RGB"), (101, 83, "RGB"), (70, 130, "L"), (1024, 1024, "RGB"), (1500, 900, "RGB"), (2100, 530, "RGBA")],
)
def test_references_are_prepared_as_the_reference_prepares_them(width: int, height: int, mode: str) -> None:
    """Shrunk where they have more than 1024 x 1024 pixels, then their centre cut to whole tokens."""
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    given, prepare = picture(width, height, 5).convert(mode), Flux2ImageProcessor(vae_scale_factor=16)
    expected = prepare._resize_if_exceeds_area(given, 1024**2)
    across, down = (side // 16 * 16 for side in expected.size)
    expected = prepare.preprocess(expected, height=down, width=across, resize_mode="crop")
    found = images.bounded(given, 1024**2, 16)
    torch.testing.assert_close(images.to_tensor(found, *found.size), expected, rtol=0, atol=1e-6)


def test_pictures_too_small_or_too_long_to_look_at_are_refused(model: Opened) -> None:
    for size in ((63, 200), (600, 70)):
        with pytest.raises(InputError, match=f"at least 64 pixels and at most 8 to 1: this one is {size[0]}x{size[1]}"):
            mz.generate(model(DISTILLED), mz.Request(prompt="a", references=[Image.new("RGB", size)]))


@pytest.mark.parametrize(("strength", "aligned"), [(1.0, True), (0.6, True), (0.6, False)])
def test_repainting_equals_the_reference(folder: Folder, model: Opened, strength: float, aligned: bool) -> None:
    """klein's inpainting pipeline shows the network the picture too, as its first reference.

    Without a mask ours is image to image, which the reference has only as a mask that is white everywhere.
    """
    wish = Wish(4, guidance=4.0, prompts=PROMPTS[:1], references=(picture(96, 64, 6), picture(80, 96, 7)))
    mask = Image.new("L", (96, 64), 0 if aligned else 255)
    if aligned:
        ImageDraw.Draw(mask).rectangle((32, 16, 79, 47), fill=255)
    said: dict[str, Any] = {"generator": torch.Generator().manual_seed(wish.seed)} if strength < 1 else {}
    width, height = wish.size or (0, 0)
    expected = theirs(
        folder(BASE), wish, kind="Flux2KleinInpaintPipeline", image=wish.references[0], strength=strength,
        mask_image=mask, image_reference=wish.references[1], width=width, height=height, **said,
    )  # fmt: skip
    more = {"mask": mask} if aligned else {}
    found = latents(ours(model(BASE), wish, image=wish.references[0], strength=strength, **more))
    assert error(found, expected) < 2e-5


# Original files.


@pytest.mark.parametrize(("kind", "prefix"), [(DEV, ""), (DISTILLED, "model.diffusion_model.")])
def test_the_original_file_is_the_same_model(
    folder: Folder, model: Opened, tmp_path: Path, kind: str, prefix: str
) -> None:
    """Beside it the autoencoder's own file and the folders of the language model, or all of them with --parts."""
    root = folder(kind)
    file = reference.original(root, tmp_path / "model.safetensors", prefix)
    if kind == DEV:
        found = mz.load(file, parts=root)
    else:
        reference.original_vae(root, tmp_path / "ae.safetensors")
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(root / name, tmp_path / name)
        found = mz.load(file, distilled=kind == DISTILLED)
    assert found.contract == model(kind).contract
    wish = Wish(1, prompts=PROMPTS[:1])
    assert error(latents(ours(found, wish)), latents(ours(model(kind), wish))) < 1e-6


def test_what_a_klein_file_is_must_be_said_once(folder: Folder, tmp_path: Path) -> None:
    root = folder(BASE)
    silent = reference.original(root, tmp_path / "klein.safetensors")
    with pytest.raises(InputError, match="--distilled yes or --distilled no"):
        mz.load(silent, parts=root)
    with pytest.raises(InputError, match="--distilled yes or --distilled no"):
        mz.load(silent, parts=root, prediction="flow")
    for word in ("yes", "no"):
        marked = reference.original(root, tmp_path / f"{word}.safetensors", header={"mezzotint.distilled": word})
        family, materials = gather(marked, root)
        guidance = family.facts(materials, Asked())["guidance"]
        assert (guidance.distilled, guidance.scale) == ((True, 1.0) if word == "yes" else (False, 4.0))
        with pytest.raises(InputError, match="its files say that it is"):
            mz.load(marked, parts=root, distilled=word == "no")


def test_a_folder_says_what_it_is(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its files say that it is distilled"):
        mz.load(folder(DISTILLED), distilled=False)
    with pytest.raises(InputError, match="dev, which has one kind"):
        mz.load(folder(DEV), distilled=True)
    shutil.copytree(folder(DISTILLED), tmp_path / "klein")
    (tmp_path / "klein" / "model_index.json").unlink()
    with pytest.raises(InputError, match="nothing says whether this is klein distilled"):
        mz.load(tmp_path / "klein")
    family, materials = gather(tmp_path / "klein")
    assert family.facts(materials, Asked(distilled=True))["guidance"].distilled


def test_a_converted_klein_still_says_what_it_is(folder: Folder, model: Opened, tmp_path: Path) -> None:
    """And an autoencoder whose settings its original file could not say stays where it is."""
    for kind in (BASE, DISTILLED):
        done = mz.convert(folder(kind), tmp_path / kind / "klein.safetensors", "single-file")
        assert [file.name for file in done.files] == ["klein.safetensors", "ae.safetensors"]
        again = mz.convert(done.files[0], tmp_path / f"{kind} again", "diffusers", parts=folder(kind))
        for path in (done.files[0], *again.files):
            family, materials = gather(path, folder(kind))
            assert family.asks(materials) is None
            assert family.facts(materials, Asked())["guidance"] == model(kind).contract.guidance
    with pytest.raises(InputError, match="norm_num_groups"):
        mz.convert(folder(DEV), tmp_path / "dev.safetensors", "single-file")


def test_what_a_file_lacks_is_named_with_its_remedy(folder: Folder, tmp_path: Path) -> None:
    file = reference.original(folder(DEV), tmp_path / "flux2-dev.safetensors")
    with pytest.raises(InputError, match=r"has no|no vae"):
        mz.load(file)
    reference.original_vae(folder(BASE), tmp_path / "ae.safetensors")
    with pytest.raises(InputError, match="text_encoder"):
        mz.load(file)
    shutil.copytree(folder(DEV) / "text_encoder", tmp_path / "text_encoder")
    with pytest.raises(InputError, match="tokenizer"):
        mz.load(file)


# Contracts.


@pytest.mark.parametrize(
    ("config", "quick", "licence", "guidance", "steps"),
    [
        (flux2_dev(), None, FLUX_LICENCES[0], {"distilled": True, "embedded": True, "scale": 4.0}, 50),
        (klein_4b(), False, FLUX_LICENCES[1], {"dropout": 0.1, "scale": 4.0}, 50),
        (klein_4b(), True, FLUX_LICENCES[1], {"distilled": True}, 4),
        (klein_9b(), False, FLUX_LICENCES[2], {"dropout": 0.1, "scale": 4.0}, 50),
        (klein_9b(), True, FLUX_LICENCES[2], {"distilled": True}, 4),
    ],
    ids=["dev", "klein 4B base", "klein 4B", "klein 9B base", "klein 9B"],
)
def test_published_folders_are_known_by_their_settings(
    tmp_path: Path, config: Flux2Config, quick: bool | None, licence: str, guidance: dict[str, Any], steps: int
) -> None:
    """config.json, model_index.json and the scheduler's file alone: no weights are touched."""
    for name in ("transformer", "scheduler"):
        (tmp_path / name).mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(write_config(config, "Flux2Transformer2DModel")))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(reference.SCHEDULER))
    index: dict[str, Any] = {"_class_name": "Flux2Pipeline" if quick is None else "Flux2KleinPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index | ({"is_distilled": True} if quick else {})))
    family, materials = gather(tmp_path)
    facts = family.facts(materials, Asked())
    assert family.asks(materials) is None and family.pipeline(materials) == index["_class_name"]
    assert family.licence(materials) == licence
    assert facts["guidance"] == GuidanceFacts(**guidance)
    assert (facts["sampling"].sampler, facts["sampling"].steps) == ("flow_euler", steps)
    assert (facts["process"], facts["size"], facts["references"]) == (flux2.TRAINED, (1024, 1024), 1024**2)


def test_the_statistics_are_the_latent_space(folder: Folder, model: Opened) -> None:
    statistics = reference.opened(folder(DEV)).vae.bn
    latent = model(DEV).contract.latent
    assert isinstance(latent.scale, tuple) and isinstance(latent.shift, tuple) and len(set(latent.scale)) == 128
    torch.testing.assert_close(torch.tensor(latent.scale), (statistics.running_var + 1e-4).rsqrt())
    torch.testing.assert_close(torch.tensor(latent.shift), statistics.running_mean)
    assert (latent.channels, latent.factor) == (128, 16)


def test_a_distilled_klein_cannot_be_guided(model: Opened) -> None:
    wrong: list[dict[str, Any]] = [{"guidance": 4.0}, {"negative": "blurry"}]
    for more in wrong:
        with pytest.raises(InputError, match="this model is distilled"):
            mz.generate(model(DISTILLED), mz.Request(prompt="a", width=64, height=64, **more))
    assert settle(model(DISTILLED), mz.Request()).guidance.scale == 1.0
    with pytest.raises(InputError, match="this model is distilled and has none"):
        mz.generate(model(DEV), mz.Request(prompt="a", width=64, height=64, negative="blurry"))


def test_klein_kv_draws_from_text_and_looks_at_nothing(folder: Folder, model: Opened, tmp_path: Path) -> None:
    """Its references are seen at time 0 and apart from all else: as ordinary ones they would be seen wrongly."""
    shutil.copytree(folder(DISTILLED), tmp_path / "kv")
    index = json.loads((tmp_path / "kv" / "model_index.json").read_text())
    index["_class_name"] = "Flux2KleinKVPipeline"
    del index["is_distilled"]  # which is its default
    (tmp_path / "kv" / "model_index.json").write_text(json.dumps(index))
    found = mz.load(tmp_path / "kv")
    assert (found.contract.guidance, found.contract.sampling) == (
        model(DISTILLED).contract.guidance,
        model(DISTILLED).contract.sampling,
    )
    with pytest.raises(InputError, match="cannot look at pictures"):
        mz.generate(found, mz.Request(prompt="a", references=[picture(64, 64, 1)]))


# The language model.


@pytest.mark.parametrize(("kind", "layers"), [(DEV, 30), (BASE, 27)])
def test_layers_that_are_not_read_are_not_loaded_and_the_rest_is_not_copied(
    folder: Folder, kind: str, layers: int
) -> None:
    family, materials = gather(folder(kind))
    assert family.text is not None
    encoder = family.text(materials, torch.float32)
    assert encoder is not None
    held, mapped = encoder.networks["text_encoder"].state_dict(), materials.parts["text_encoder"].tensors
    assert materials.parts["text_encoder"].config.get("num_hidden_layers", 31) > layers
    assert {name.split(".")[1] for name in held if name.startswith("layers.")} == {str(i) for i in range(layers)}
    assert {tensor.data_ptr() for tensor in held.values()} <= {tensor.data_ptr() for tensor in mapped.values()}


def test_every_part_is_in_the_format_asked_for(folder: Folder) -> None:
    half = mz.load(folder(DISTILLED), dtype=torch.bfloat16)
    for part in ("text", "backbone", "codec"):
        dtypes = {p.dtype for network in half.networks(part).values() for p in network.parameters()}
        assert dtypes == {torch.bfloat16}, part
    found = mz.generate(half, mz.Request(prompt="a", width=64, height=80, steps=1, references=[picture(64, 64, 1)]))
    assert found.images[0].size == (64, 80)
