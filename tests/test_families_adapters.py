"""LoRA and textual inversion in whole runs, against the reference's pipelines with the same files."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_adapters import (
    CONSISTENCY,
    JOINT,
    KERNELS,
    LINEAR,
    TEXT,
    apart,
    by_file,
    by_peft,
    divided,
    file,
    first_embedding,
    fresh,
    invented,
    klein,
    learned,
    loaded,
    request,
    sd1,
    sd2,
    sd35,
    sdxl,
    spelled,
    theirs,
    trained,
    vectors,
    web_interface,
)
from safetensors.torch import save_file
from torch import Tensor

import mezzotint as mz
from mezzotint.adapters import BACKBONE, modules_of
from mezzotint.errors import InputError
from mezzotint.families.adapt import adapted, original_names, read_lora, with_words

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

SAME = 2e-4  # relative, of the final latents
ONE, TWO = (BACKBONE, "text_encoder"), (BACKBONE, "text_encoder", "text_encoder_2")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize(
    ("style", "endings"),
    [
        ("diffusers", (*CONSISTENCY, *TEXT)),
        ("older", (*LINEAR, *TEXT)),
        ("processors", (*LINEAR[:4], *TEXT[:4])),
        ("lora_te", (*CONSISTENCY, *TEXT)),
    ],
)
def test_stable_diffusion_1_in_every_spelling(
    place: Path, tmp_path: Path, style: str, endings: tuple[str, ...]
) -> None:
    model = loaded(sd1(place))
    tensors = spelled(invented(model, endings, ONE), style)
    wish = request(model, sampler="ddim")
    assert by_file(sd1(place), tmp_path / "lora.safetensors", wish, tensors) < SAME


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_consistency_adapter_draws_in_four_steps(place: Path, tmp_path: Path, guidance: float) -> None:
    model = loaded(sd1(place))
    tensors = spelled(invented(model, CONSISTENCY), "kohya")
    wish = request(model, sampler="lcm", steps=4, guidance=guidance, negative="")
    assert by_file(sd1(place), tmp_path / "lcm.safetensors", wish, tensors) < SAME


@pytest.mark.parametrize("original", [False, True])
def test_stable_diffusion_xl_with_both_text_encoders(place: Path, tmp_path: Path, original: bool) -> None:
    """kohya's files with the folder's blocks, and with input_blocks and output_blocks."""
    model = loaded(sdxl(place))
    rows = original_names(model) if original else []
    tensors = spelled(invented(model, (*CONSISTENCY, *TEXT), TWO), "kohya", rows)
    assert any("output_blocks_" in key for key in tensors) == original
    wish = request(model, sampler="euler")
    assert by_file(sdxl(place), tmp_path / "lora.safetensors", wish, tensors) < SAME


def test_stable_diffusion_2_without_convolutional_projections(place: Path, tmp_path: Path) -> None:
    model = loaded(sd2(place))
    tensors = spelled(invented(model, (*LINEAR, *KERNELS), seed=2), "kohya")
    wish = request(model, sampler="dpmpp_2m")
    assert by_file(sd2(place), tmp_path / "lora.safetensors", wish, tensors) < SAME


@pytest.mark.parametrize("dora", [False, True])
def test_a_folder_that_the_reference_has_saved(place: Path, tmp_path: Path, dora: bool) -> None:
    """Ranks, alphas and magnitudes as peft and diffusers write them. (Its text encoder cannot read magnitudes back.)"""
    model, wish = loaded(sd1(place)), request(loaded(sd1(place)), sampler="ddim")
    expected = theirs(trained(sd1(place), tmp_path / "lora", dora), wish)
    assert apart(mz.generate(model, wish).latents, expected) > 1e-2
    assert apart(mz.generate(model, replace(wish, lora=[(tmp_path / "lora", 1.0)])).latents, expected) < SAME


def test_stable_diffusion_3_under_the_folders_names(place: Path, tmp_path: Path) -> None:
    model = loaded(sd35(place))
    changes = invented(model, (*JOINT, *TEXT), TWO)
    tensors = spelled(changes, "diffusers", backbone="transformer")
    assert by_file(sd35(place), tmp_path / "lora.safetensors", request(model), tensors) < SAME


@pytest.mark.parametrize("style", ["original", "kohya"])
def test_stable_diffusion_3_with_fused_projections(place: Path, tmp_path: Path, style: str) -> None:
    """The reference does not know these names, so it is given the same changes divided."""
    model, pipeline, wish = loaded(sd35(place)), fresh(sd35(place)), request(loaded(sd35(place)), steps=3)
    rows = original_names(model)
    fused = invented(model, JOINT, original=True)
    assert "joint_blocks.0.x_block.attn.qkv" in fused[BACKBONE]
    scaled = {n: (d, u * (a / len(d) if style == "kohya" else 1), a) for n, (d, u, a) in fused[BACKBONE].items()}
    tensors = spelled(divided({BACKBONE: scaled}, rows), "diffusers", backbone="transformer")
    pipeline.load_lora_weights(str(file(tmp_path / "theirs.safetensors", tensors)))
    made = file(tmp_path / "ours.safetensors", spelled(fused, style))
    found = mz.generate(model, replace(wish, lora=[(made, 1.0)])).latents
    assert apart(found, theirs(pipeline, wish)) < SAME


@pytest.mark.parametrize("style", ["diffusers", "original", "kohya"])
def test_flux_2_in_every_spelling(place: Path, tmp_path: Path, style: str) -> None:
    model = loaded(klein(place))
    changes = invented(model, (*JOINT, "embedder"), original=style != "diffusers")
    tensors = spelled(changes, style, backbone="transformer")
    wish = request(model, steps=3)
    assert by_file(klein(place), tmp_path / "lora.safetensors", wish, tensors) < SAME


def test_several_adapters_at_their_weights(place: Path, tmp_path: Path) -> None:
    """set_adapters with a negative weight and with none; beside the weights and merged into them."""
    model, pipeline, wish = loaded(sdxl(place)), fresh(sdxl(place)), request(loaded(sdxl(place)), sampler="euler")
    files = [
        file(tmp_path / f"{i}.safetensors", spelled(invented(model, endings, TWO, seed=i), "diffusers"))
        for i, endings in enumerate([(*CONSISTENCY, *TEXT), (*LINEAR, *TEXT), ("to_k", "q_proj")])
    ]
    for i, made in enumerate(files):
        pipeline.load_lora_weights(str(made), adapter_name=f"number_{i}")
    for weights in ((0.7, -0.4, 0.0), (0.0, 0.0, 1.3)):
        pipeline.set_adapters([f"number_{i}" for i in range(3)], list(weights))
        expected = theirs(pipeline, wish)
        lora = list(zip(files, weights, strict=True))
        assert apart(mz.generate(model, replace(wish, lora=lora)).latents, expected) < SAME
        assert apart(mz.generate(adapted(model, lora, merged=True), wish).latents, expected) < SAME


def test_merged_weights_are_the_references(place: Path, tmp_path: Path) -> None:
    model, pipeline = loaded(sd1(place)), fresh(sd1(place))
    made = file(tmp_path / "lora.safetensors", spelled(invented(model, (*CONSISTENCY, *TEXT), ONE), "diffusers"))
    pipeline.load_lora_weights(str(made))
    pipeline.fuse_lora(lora_scale=0.6)
    pipeline.unload_lora_weights()
    merged = adapted(model, [(made, 0.6)], merged=True)
    assert merged.text is not None
    found = merged.backbone.state_dict() | merged.text.networks["text_encoder"].state_dict()
    texts = {f"text_model.{key}": value for key, value in pipeline.text_encoder.state_dict().items()}
    expected = pipeline.unet.state_dict() | texts
    assert found.keys() == expected.keys()
    assert max((found[key] - value).abs().max().item() for key, value in expected.items()) < 1e-6


def test_the_base_is_what_it_was_and_requests_do_not_disturb_each_other(place: Path, tmp_path: Path) -> None:
    model, wish = loaded(sd1(place)), request(loaded(sd1(place)), sampler="euler", steps=2)
    assert model.text is not None
    networks = [model.backbone, *model.text.networks.values()]
    tensors = [network.state_dict(keep_vars=True) for network in networks]
    values = [{name: tensor.detach().clone() for name, tensor in one.items()} for one in tensors]
    first, second = (
        file(tmp_path / f"{i}.safetensors", spelled(invented(model, (*CONSISTENCY, *TEXT), ONE, seed=i), "diffusers"))
        for i in (1, 2)
    )
    word = learned(tmp_path / "learned_embeds.safetensors", {"<plate>": vectors(2, 64)})
    wishes = [
        wish,
        replace(wish, lora=[(first, 1.0)]),
        replace(wish, lora=[(second, -0.5)], embedding=[word], prompt="a <plate>"),
    ]
    alone = [mz.generate(model, one).latents for one in wishes]
    assert min(apart(one, alone[0]) for one in alone[1:]) > 1e-2
    for order in ((2, 1, 0), (1, 2, 0)):
        for i in order:
            assert torch.equal(mz.generate(model, wishes[i]).latents, alone[i])
    for network, kept, value in zip(networks, tensors, values, strict=True):
        after = network.state_dict(keep_vars=True)
        assert all(after[name] is tensor and torch.equal(tensor, value[name]) for name, tensor in kept.items())
    assert "<plate>" not in getattr(model.text, "vocabulary").words()  # noqa: B009 - a Clip


def test_pain_03_a_lora_trained_for_another_prediction_is_refused(place: Path, tmp_path: Path) -> None:
    model = loaded(sd1(place))
    tensors = spelled(invented(model, LINEAR), "kohya")
    for said in ("v", "epsilon"):
        save_file(tensors, tmp_path / f"{said}.safetensors", {"modelspec.prediction_type": said})
    with pytest.raises(InputError, match=r"v\.safetensors was trained to predict velocity, and .* predicts epsilon"):
        read_lora(model, tmp_path / "v.safetensors")
    assert read_lora(model, tmp_path / "epsilon.safetensors").facts.prediction == "epsilon"


def test_pain_19_a_lora_that_matches_nothing_is_an_error(place: Path, tmp_path: Path) -> None:
    """Keys without a place stop the run, with their number, a list, and the family that the file is for."""
    model = loaded(sd1(place))
    good = spelled(invented(model, LINEAR), "kohya")
    foreign = {key.replace("lora_unet_", "lora_unet_other_"): value for key, value in good.items()}
    count = len(good) // 3
    with pytest.raises(InputError, match=rf"{count} of {count} modules have no place in this model \(lora_unet_other_"):
        mz.generate(model, request(model, lora=[(file(tmp_path / "a.safetensors", foreign), 1.0)]))
    partly = good | dict(list(foreign.items())[:6])
    with pytest.raises(InputError, match=r"2 of \d+ modules have no place in this model \(lora_unet_other_"):
        mz.generate(model, request(model, lora=[(file(tmp_path / "b.safetensors", partly), 1.0)]))
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    published = {f"{stem}.lora_down.weight": torch.ones(4, 2048), f"{stem}.lora_up.weight": torch.ones(640, 4)}
    with pytest.raises(InputError, match=r"(?s)x\.safetensors.*for Stable Diffusion XL"):
        mz.generate(model, request(model, lora=[(file(tmp_path / "x.safetensors", published), 1.0)]))
    with pytest.raises(InputError, match="no such LoRA"):
        mz.generate(model, request(model, lora=[(tmp_path / "missing.safetensors", 1.0)]))
    with pytest.raises(InputError, match="has no LoRA: none of pytorch_lora_weights"):
        mz.generate(model, request(model, lora=[(place, 1.0)]))


@pytest.mark.parametrize("dora", [False, True])
def test_a_folder_that_peft_has_saved(tmp_path: Path, dora: bool) -> None:
    """A class-conditional transformer, which has no pipeline that reads adapters; whole and file alone."""
    from networks import randomise

    from mezzotint.backbones.dit import DiT, DiTConfig
    from mezzotint.codec import Codec
    from mezzotint.codec.pixels import Pixels, PixelsConfig
    from mezzotint.conditioning import Conditioning
    from mezzotint.families.model import Model

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8}
    reference = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=10, norm_num_groups=1).eval()
    randomise(reference)
    network = DiT(DiTConfig.from_config(dict(reference.config))).eval()
    network.load_state_dict(reference.state_dict())
    contract: Any = type("Facts", (), {"family": "dit"})
    model = Model(contract, network, Codec(Pixels(PixelsConfig(in_channels=4))))
    told = by_peft(
        reference, tmp_path / "peft", ["to_q", "to_out.0", "net.0.proj", "norm1.emb.timestep_embedder.linear_1"], dora
    )
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 700.0]), torch.tensor([3, 10])
    for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        with torch.no_grad():
            found = adapted(model, [(path, 1.0)]).backbone(x, t, Conditioning(label=label))
            expected = told(x, timestep=t, class_labels=label).sample
            assert apart(found, expected) < 1e-5
            assert apart(network(x, t, Conditioning(label=label)), expected) > 1e-2


def test_attaching_to_a_large_model_copies_nothing_of_it() -> None:
    """The published XL network with an adapter on every attention projection, without its numbers."""
    from mezzotint.adapters import attach, read
    from mezzotint.backbones.published_unets import sdxl as published
    from mezzotint.backbones.unet import UNet

    with torch.device("meta"):
        network = UNet(published())
        tensors: dict[str, Tensor] = {}
        for name, shape in modules_of(network).items():
            if name.endswith(LINEAR[:4]):
                stem = f"unet.{name}"
                tensors |= {f"{stem}.lora_A.weight": torch.empty(16, shape[1])}
                tensors |= {f"{stem}.lora_B.weight": torch.empty(shape[0], 16)}
    start = time.perf_counter()
    adapter = read(tensors, {}, {BACKBONE: modules_of(network)})
    found = attach(network, BACKBONE, [(adapter, 0.8)])
    assert time.perf_counter() - start < 5
    assert adapter.facts.modules == 560
    base = network.state_dict(keep_vars=True)
    assert all(base[name] is tensor for name, tensor in found.state_dict(keep_vars=True).items())


@pytest.mark.parametrize("form", ["learned_embeds.safetensors", "learned_embeds.bin", "web.pt", "scarred-cell.pt"])
def test_words_in_every_published_file(place: Path, tmp_path: Path, form: str) -> None:
    """One vector or several, in the prompt and in the negative one, before and beyond the cut."""
    folder, at = sd1(place), tmp_path / form
    rows = vectors(1 if form.endswith("safetensors") else 3, 64)
    match form:
        case "web.pt":
            word, told = "scarredcell", web_interface(at, "scarredcell", rows)
        case "scarred-cell.pt":  # the file has no name for it
            word, told = "scarred-cell", {"scarred-cell": rows}
            first_embedding(at, rows)
        case _:
            word = "<plate>"
            told = learned(at, {word: rows})
    model, pipeline = loaded(folder), fresh(folder)
    pipeline.load_textual_inversion(told if isinstance(told, dict) else str(told))
    prompt = f"a {word} with {word}, the cell, " + f"scratches on the dark {word} area, " * 14
    for said, against in ((prompt, f"{word}, blurry"), ("the cell", f"blurry {word}")):
        wish = request(model, said, sampler="euler", steps=2, negative=against)
        expected = theirs(pipeline, wish)
        with pytest.warns(UserWarning, match="left out") if said == prompt else nullcontext():
            plain, found = mz.generate(model, wish).latents, mz.generate(model, replace(wish, embedding=[at])).latents
        assert apart(found, expected) < SAME
        assert apart(plain, expected) > 1e-3


def width(encoder: Any) -> int:
    return encoder.config.hidden_size


def test_words_for_two_encoders(place: Path, tmp_path: Path) -> None:
    model, pipeline = loaded(sdxl(place)), fresh(sdxl(place))
    rows = {"clip_l": vectors(2, width(pipeline.text_encoder)), "clip_g": vectors(2, width(pipeline.text_encoder_2), 1)}
    made = file(tmp_path / "plate.safetensors", rows)
    pipeline.load_textual_inversion(rows["clip_l"], "plate", pipeline.tokenizer, pipeline.text_encoder)
    pipeline.load_textual_inversion(rows["clip_g"], "plate", pipeline.tokenizer_2, pipeline.text_encoder_2)
    wish = request(model, "the plate, on a cell", sampler="euler", steps=3, negative="dark plate")
    expected = theirs(pipeline, wish)
    assert apart(mz.generate(model, replace(wish, embedding=[made])).latents, expected) < SAME
    assert apart(mz.generate(model, wish).latents, expected) > 1e-3


def test_words_for_stable_diffusion_3(place: Path, tmp_path: Path) -> None:
    """Both CLIPs learn the word, T5 reads its letters; the reference's loader knows each encoder alone."""
    model, pipeline = loaded(sd35(place)), fresh(sd35(place))
    rows = {"clip_l": vectors(1, width(pipeline.text_encoder)), "clip_g": vectors(1, width(pipeline.text_encoder_2), 1)}
    made = file(tmp_path / "plate.safetensors", rows)
    loader = diffusers.StableDiffusionPipeline.load_textual_inversion
    base = type(pipeline)
    able: Any = type(base.__name__, (base, diffusers.loaders.TextualInversionLoaderMixin), {})
    pipeline.__class__ = able
    loader(pipeline, rows["clip_l"], "plate", pipeline.tokenizer, pipeline.text_encoder)
    loader(pipeline, rows["clip_g"], "plate", pipeline.tokenizer_2, pipeline.text_encoder_2)
    wish = request(model, "the plate, on a cell", steps=3, negative="dark plate")
    expected = theirs(pipeline, wish)
    assert apart(mz.generate(model, replace(wish, embedding=[made])).latents, expected) < SAME
    assert apart(mz.generate(model, wish).latents, expected) > 1e-3


def test_words_beside_those_that_a_model_was_saved_with(place: Path, tmp_path: Path) -> None:
    """A folder whose tokenizer has new words already, and more rows than words, as enlarged tables have."""
    folder, pipeline = tmp_path / "grown", fresh(sd1(place))
    pipeline.load_textual_inversion({"<old>": vectors(2, 64)})
    pipeline.text_encoder.resize_token_embeddings(49416)
    pipeline.save_pretrained(folder)
    made = learned(tmp_path / "learned_embeds.safetensors", {"<new>": vectors(3, 64, 1)})
    pipeline = fresh(folder)
    pipeline.load_textual_inversion(str(made))
    model = mz.load(folder)
    wish = request(model, "an <old> cell, a <new> crack", sampler="euler", steps=2)
    assert apart(mz.generate(model, replace(wish, embedding=[made])).latents, theirs(pipeline, wish)) < SAME
    with pytest.raises(InputError, match="has '<old>' already"):
        adapted(model, embedding=[learned(tmp_path / "again.safetensors", {"<old>": vectors(1, 64)})])


def test_words_of_another_family_are_refused_by_name(place: Path, tmp_path: Path) -> None:
    model = loaded(sd1(place))
    for rows, family in (
        ({"<a>": vectors(1, 1024)}, "2.x"),
        ({"clip_l": vectors(1, 768), "clip_g": vectors(1, 1280)}, "XL"),
    ):
        made = file(tmp_path / "words.safetensors", rows)
        with pytest.raises(InputError, match=f"(?s)words.safetensors.*It is for Stable Diffusion {family}"):
            with_words(model, [made])
    with pytest.raises(InputError, match=r"(?s)this model reads.*It is for Stable Diffusion XL"):
        with_words(loaded(klein(place)), [made])
    with pytest.raises(InputError, match="no such embedding"):
        with_words(model, [tmp_path / "missing.pt"])
    odd = tmp_path / "odd.pt"
    torch.save({"string_to_param": 5}, odd)
    with pytest.raises(InputError, match="no table"):
        with_words(model, [odd])


def test_an_adapter_comes_with_its_facts(place: Path, tmp_path: Path) -> None:
    model = loaded(sd1(place))
    header = {"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "a plate"}
    made = file(tmp_path / "lora.safetensors", spelled(invented(model, LINEAR), "kohya"), header)
    facts = read_lora(model, made).facts
    assert (facts.format, facts.base, facts.words, facts.ranks) == ("kohya", "sd_v1", ("a plate",), (3, 4))
