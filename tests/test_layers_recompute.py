"""Activations that are computed again: the same loss and gradients to the last bit, from less that is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomise
from safetensors.torch import load_file
from torch import Tensor, nn
from training_nursery import Nursery, nursery
from training_parts import UNET, full_recipe, image_folder, vae_recipe

from mezzotint.backbones.controlnet import Controlled, ControlNet, ControlNetConfig
from mezzotint.backbones.dit import DiT, DiTConfig
from mezzotint.backbones.flux2 import Flux2
from mezzotint.backbones.flux2_config import Flux2Config
from mezzotint.backbones.mmdit import MMDiT, MMDiTConfig
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.layers import recompute as module
from mezzotint.layers.recompute import blocks, recompute
from mezzotint.text.clip_network import ClipConfig, ClipText
from mezzotint.training import ema, loop, metrics, recipe, state

LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "dropout": 0.1,
}  # fmt: skip
PIXELS = UNetConfig(
    **LEVELS, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=5,
)  # fmt: skip
TEXT = ConditionalUNetConfig(
    **LEVELS, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, transformer_layers_per_block=(1, 2),
)  # fmt: skip
STREAMS = MMDiTConfig(
    sample_size=16, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=14, pos_embed_max_size=20,
    dual_attention_layers=(0,), qk_norm="rms_norm",
)  # fmt: skip
FLUX = Flux2Config(
    in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
)  # fmt: skip
CLASSES = DiTConfig(
    in_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=16, num_embeds_ada_norm=4
)


def controlled() -> nn.Module:
    """A control network on a frozen base."""
    config = replace(ControlNetConfig.of(TEXT), conditioning_embedding_out_channels=(2, 2, 4, 4))
    return Controlled(UNet(TEXT).requires_grad_(False), [ControlNet(config)], [1.0])


BACKBONES: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {  # how many blocks, what is read
    "unet": (lambda: UNet(PIXELS), 8 + 4, ("label",)),
    "text unet": (lambda: UNet(TEXT), 8 + 3 + 2, ("tokens",)),  # two of them in the middle
    "dit": (lambda: DiT(CLASSES), 3, ("label",)),
    "mmdit": (lambda: MMDiT(STREAMS), 3, ("tokens", "pooled")),
    "flux2": (lambda: Flux2(FLUX), 4, ("tokens", "guidance")),
    "control network": (controlled, 8 + 3 + 2 + 4 + 1 + 2, ("tokens", "hints")),
}
PARTS = {
    "tokens": torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2)),
    "pooled": torch.randn(2, 14, generator=torch.Generator().manual_seed(3)),
    "label": torch.tensor([1, 4]),
    "guidance": torch.tensor([1.0, 4.0]),
    "hints": (torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(4)),),
}


def made(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A network in training mode and the loss on it."""
    build, _, parts = BACKBONES[name]
    network = build().train()
    randomise(network)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    told = Conditioning(**{part: PARTS[part] for part in parts})
    return network, lambda network: network(x, torch.tensor([3.0, 700.0]), told).square().mean()


def learned(network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients, and the bytes of activations that the graph keeps outside of recomputed blocks."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in weights:
            kept[place.data_ptr()] = place.nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(network)
    value.backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return float(value.detach()), found, sum(kept.values())


def assert_same(network: nn.Module, loss: Callable[[nn.Module], Tensor], share: float = 0.5) -> dict[str, Tensor]:
    """The same numbers from a recomputed copy, whose graph keeps at most this share of the bytes."""
    again = recompute(copy.deepcopy(network))
    assert list(again.state_dict()) == list(network.state_dict())
    ours, theirs = learned(again, loss), learned(network, loss)
    assert ours[0] == theirs[0] and ours[1].keys() == theirs[1].keys() and ours[1]
    assert not [name for name, gradient in theirs[1].items() if not torch.equal(ours[1][name], gradient)]
    assert ours[2] < share * theirs[2], (ours[2], theirs[2])
    return ours[1]


@pytest.mark.parametrize("name", BACKBONES)
def test_loss_and_gradients_are_the_same_to_the_last_bit(name: str) -> None:
    """Dropout of the U-Nets included; a control network's base keeps nothing of its own."""
    network, loss = made(name)
    assert len(blocks(network)) == BACKBONES[name][1]
    found = assert_same(network, loss)
    assert found.keys() == {key for key, p in network.named_parameters() if p.requires_grad}


def test_in_mixed_precision_too() -> None:
    network, loss = made("text unet")

    def narrow(network: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(network)

    assert_same(network, narrow)


@pytest.mark.parametrize("name", ["text unet", "flux2"])
def test_the_first_adapter_of_a_frozen_network_learns(name: str) -> None:
    """Nothing that goes into the first block asks for a gradient, and its adapter gets one."""
    pytest.importorskip("peft")
    from mezzotint.adapters.targets import choose
    from mezzotint.adapters.training import Settings, trainable

    network, loss = made(name)
    adapted = trainable(network, choose(network, ["attention"]), Settings(rank=2, dropout=0.2), seed=0)
    randomise(adapted)
    found = assert_same(adapted, loss, share=0.7)
    assert all("lora" in key and gradient.abs().max() > 0 for key, gradient in found.items())
    assert next(iter(found)).startswith(("down_blocks.0.attentions.0", "transformer_blocks.0"))


@pytest.mark.parametrize("name", ["clip", "t5", "qwen3", "minilm"])
def test_text_encoders_that_only_pass_gradients_on(name: str) -> None:
    """As for a new word: every layer is frozen, and the vectors in front of them learn."""
    ids = torch.tensor([[1, 5, 9, 2], [1, 7, 2, 2]])
    network: Any
    if name == "clip":
        config = ClipConfig(vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                            num_attention_heads=2)  # fmt: skip
        network, table = ClipText(config, projection=False), "text_model.embeddings.token_embedding.weight"
        count, loss = 3, lambda network: network.norm(network(ids)[-1]).square().mean()
    else:
        transformers = pytest.importorskip("transformers")
        shared = {"vocab_size": 12, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
        if name == "t5":
            shape = transformers.T5Config(vocab_size=12, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=3)
            network, table, count = transformers.T5EncoderModel(shape).eval(), "shared.weight", 6
        elif name == "qwen3":
            shape = transformers.Qwen3Config(
                **shared, intermediate_size=32, num_key_value_heads=1, head_dim=8, use_cache=False
            )
            network, table, count = transformers.Qwen3Model(shape).eval(), "embed_tokens.weight", 3
        else:
            network = transformers.BertModel(transformers.BertConfig(**shared, intermediate_size=32), False).eval()
            table, count = "embeddings.word_embeddings.weight", 3

        def loss(network: Any) -> Tensor:
            return network(input_ids=ids, output_hidden_states=True).last_hidden_state.square().mean()

    randomise(network)
    network.requires_grad_(False).get_parameter(table).requires_grad_(True)
    assert len(blocks(network)) == count
    assert assert_same(network, loss).keys() == {table}


def test_copies_are_on_their_own_and_what_needs_no_gradient_is_as_it_was() -> None:
    """An average starts as a copy: what the network learns afterwards does not reach it."""
    plain, loss = made("text unet")
    network = recompute(copy.deepcopy(plain)).eval()
    average = ema.follow(network)
    with torch.no_grad():
        before = loss(plain.eval())
        for parameter in network.parameters():
            parameter.add_(0.1)
        assert torch.equal(loss(average), before) and not torch.equal(loss(network), before)
    with torch.inference_mode():
        assert torch.equal(loss(average), before)


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="no repeated blocks"):
        recompute(nn.Sequential(nn.Linear(2, 2)))


# Whole runs.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recompute")
    image_folder(root / "train", 8)
    return root


def tensors(folder: Path) -> dict[str, Tensor]:
    last = state.newest(folder / loop.CHECKPOINTS)
    assert last is not None
    return {f"{path.name}/{k}": v for path in sorted(last.glob("*.safetensors")) for k, v in load_file(path).items()}


def small(root: Path, out: str, **changes: Any) -> dict[str, Any]:
    plan = full_recipe(root, out, steps=3, backbone={"name": "unet", "config": UNET})
    return plan | {"previews": {"every": 3, "count": 1, "steps": 1}} | changes


@pytest.mark.parametrize("kind", ["full", "full in bfloat16", "vae"])
def test_a_run_ends_with_the_same_weights_average_and_moments(
    pictures: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An autoencoder asks for gradients twice, for the balance of its losses; its judge has no blocks."""
    found: list[dict[str, Tensor]] = []
    calls: list[object] = []
    whole = module.checkpoint

    def counted(block: object, *inputs: Any, **named: Any) -> Any:
        calls.append(block)
        return whole(block, *inputs, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "checkpoint", counted)
    for again in (False, True):
        changes: dict[str, Any] = {"recompute": again}
        if kind == "vae":
            plan = vae_recipe(pictures, f"{kind} {again}", steps=6, **changes)
        else:
            precision = "bfloat16" if "bfloat16" in kind else "float32"
            plan = small(pictures, f"{kind} {again}", precision=precision, **changes)
        found.append(tensors(loop.train(recipe.check(plan, "test")).folder))
        assert bool(calls) == again
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    assert not [name for name, tensor in plain.items() if not torch.equal(tensor, recomputed[name])]


def test_a_run_that_has_run_out_of_memory_can_go_on_with_it() -> None:
    plan = {"method": "full", "out": "run", "steps": 1, "batch": 1, "data": {"folder": "x", "size": [8, 8]}}
    plan |= {"backbone": {"name": "unet"}}
    before, after = (recipe.check({**plan, "recompute": again}, "test") for again in (False, True))
    assert recipe.changes(before, after) == []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("words")) as found:
        yield found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does_without_it(pictures: Path, home: Nursery, strategy: str) -> None:
    if not (pictures / "alone").exists():
        loop.train(recipe.check(small(pictures, "alone", accumulation=2), "test"))
    ended = home.run(small(pictures, strategy, parallel=strategy, recompute=True), processes=2)
    assert ended == [(0, "finished 3")] * 2
    ours, theirs = (
        [record["loss"] for record in metrics.read(pictures / out) if "loss" in record] for out in (strategy, "alone")
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = tensors(pictures / strategy), tensors(pictures / "alone")
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[k] - theirs[k]).norm() / theirs[k].norm().clamp_min(1e-6)) for k in theirs)
    assert worst < 1e-3
