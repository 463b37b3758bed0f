"""What every method that trains LoRA shares: the networks that get changes, their rates, the files they become."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mezzotint.adapters import BACKBONE, Adapter, to_diffusers, to_kohya, to_peft
from mezzotint.adapters.targets import check_places, choose
from mezzotint.adapters.training import Settings, collect, trainable
from mezzotint.checkpoints import write_tensors
from mezzotint.contract import AdapterContract, Contract
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.families.parts import BACKBONES, kind_of
from mezzotint.files import write_json
from mezzotint.process import Prediction
from mezzotint.text import TextEncoder
from mezzotint.text.clip import Clip
from mezzotint.text.clip_network import ClipText
from mezzotint.text.joint import Joint
from mezzotint.text.minilm import MiniLM
from mezzotint.training import draws, finish
from mezzotint.training.steered import Steered
from mezzotint.training.tables import Lora

if TYPE_CHECKING:
    from mezzotint.training.diffusion import Diffusion

DIFFUSERS, KOHYA, PEFT = "pytorch_lora_weights.safetensors", "kohya.safetensors", "peft"  # in the folder of a result
# the names that other programs know the families by, in the notes of a header; others have our own
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base", "sd35": "stable-diffusion-3",
    "flux2": "flux-2",
}  # fmt: skip
PREDICTIONS = {Prediction.VELOCITY: "v"}  # as other programs spell it


def settings(plan: Lora) -> Settings:
    """The recipe's table as the adapters' settings."""
    return Settings(plan.rank, plan.alpha, plan.stabilised, plan.dora, plan.dropout)


def adapt_for_training(model: Model, plan: Lora, seed: int) -> nn.Module:
    """The network in which only low-rank changes train: the backbone, or `Steered` where text encoders change too.

    The model stays as it is and shares every weight with it. InputError where a target names nothing in the network,
    or something that no file could hold.
    """
    chosen = {BACKBONE: choose(model.backbone, plan.targets)}
    networks = {BACKBONE: model.backbone}
    encoders = adaptable(model.text) if plan.text_targets else {}
    if plan.text_targets and not encoders:
        raise InputError(
            f"lora.text_targets: the text encoder of a {model.family} model has no name in LoRA files, so what it"
            " learns could not be used. Leave text_targets out."
        )
    if encoders and plan.dora and "diffusers" in plan.export:
        raise InputError(
            "lora.dora with lora.text_targets: diffusers drops the magnitudes of text encoders without a word.\n"
            'Leave one of them out, or write other layouts: export = ["peft", "kohya"].'
        )
    for part, (network, unread) in encoders.items():
        names = [name for name in choose(network, plan.text_targets) if not name.startswith(unread)]
        networks[part], chosen[part] = network, tuple(names)
    check_places({**networks, **(model.text.networks if model.text else {})}, chosen)
    adapted = {
        part: trainable(networks[part], chosen[part], settings(plan), draws.number(seed, 0, f"lora {part}"))
        for part in networks
    }
    backbone = adapted.pop(BACKBONE)
    if model.text is None or not adapted:
        return backbone
    return Steered(backbone, model.text.with_networks(adapted))


def adaptable(text: TextEncoder | None) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """The text encoders that LoRA files have names for, with the layers that nothing reads, as beginnings of names.

    The CLIPs of a model, as every trainer and program knows them; else MiniLM, which our own models read. T5 beside
    CLIPs stays as it is, since other programs pass over its changes without a word.
    """
    clips = [clip for clip in (text.clips if isinstance(text, Joint) else (text,)) if isinstance(clip, Clip)]
    if clips:
        return {clip.folder: (clip.network, unread(clip)) for clip in clips}
    if isinstance(text, MiniLM):
        return {folder: (network, ()) for folder, network in text.networks.items()}
    return {}


def unread(clip: Clip) -> tuple[str, ...]:
    """The layers behind the one whose state is read, where no vector for the whole prompt is read either (SDXL)."""
    layers = clip.network.config.num_hidden_layers
    first = layers if clip.pooling != "none" else layers + 1 + clip.layer
    return tuple(f"text_model.encoder.layers.{index}." for index in range(first, layers))


def rates(name: str, plan: Lora) -> dict[str, float]:
    """Learning rates against the recipe's for the network that trains as `name`."""
    return {name: 1.0, **({f"{name}.text": plan.text_rate} if plan.text_targets else {})}


def calling(model: Model, network: nn.Module) -> Callable[..., Tensor]:
    """The network as a loss calls it: what it reads, the clock apart, comes in the format of the frozen weights."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(model.dtype) if tensor.is_floating_point() else tensor

    return lambda x, t, told, *prompts: network(cast(x), t, told.map(cast), *prompts)


def with_network(model: Model, network: nn.Module) -> Model:
    """The model with what `adapt_for_training` made of it, or an average of that, in its place."""
    if isinstance(network, Steered):
        return replace(model, backbone=network.backbone, text=network.text)
    return replace(model, backbone=network)


def write_adapter(
    core: Diffusion, network: nn.Module, plan: Lora, folder: Path, words: Iterable[str] = (),
    drawn: Contract | None = None,
) -> AdapterContract:  # fmt: skip
    """Write the changes in every layout of `plan.export`, each with its contract and other programs' notes.

    pytorch_lora_weights.safetensors (diffusers), kohya.safetensors, and peft/, where text encoders have folders of
    their own. `words` call the adapter forth; `drawn` says how a model with it samples, where that changes.
    """
    contract = AdapterContract.of(
        core.model.contract, "lora", words=words, licence=core.licensed.own, lineage=finish.lineage(core)
    )
    if drawn:
        contract = contract.model_copy(update={"guidance": drawn.guidance, "sampling": drawn.sampling})
    networks: dict[str, nn.Module] = {BACKBONE: network}
    if isinstance(network, Steered):
        networks = {BACKBONE: network.backbone, **network.text.networks}
    header = notes(core, plan, contract) | contract.to_header()
    adapter = collect(networks, settings(plan), header)
    _, part = kind_of(BACKBONES, networks[BACKBONE])
    folder.mkdir(parents=True, exist_ok=True)
    for layout in plan.export:
        match layout:
            case "diffusers":
                tensors, said = to_diffusers(adapter, part.folder)
                write_tensors(folder / DIFFUSERS, tensors, metadata=said)
            case "kohya":
                tensors, said = to_kohya(adapter)
                write_tensors(folder / KOHYA, tensors, metadata=said)
            case "peft":
                _write_peft(adapter, networks, folder / PEFT, header)
    return contract


def notes(core: Diffusion, plan: Lora, contract: AdapterContract) -> dict[str, str]:
    """What other programs read in a header: architecture, base, prediction type, trigger phrase (modelspec, kohya)."""
    prediction = contract.process.prediction
    architecture = ARCHITECTURES.get(contract.family, contract.family)
    if contract.family == "sd2":
        architecture = f"stable-diffusion-v2-{'768-v' if prediction is Prediction.VELOCITY else '512'}"
    width, height = core.recipe.data.size
    said = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": Path(core.recipe.out).name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": PREDICTIONS.get(prediction, prediction.value),
        "modelspec.license": contract.licence.weights,
        "modelspec.trigger_phrase": ", ".join(contract.words),
        "ss_sd_model_name": core.model.path.name if core.model.path else "",
        "ss_network_dim": str(plan.rank),
        "ss_network_alpha": f"{settings(plan).strength:g}",
    }
    return {key: value for key, value in said.items() if value}


def _write_peft(adapter: Adapter, networks: Mapping[str, nn.Module], folder: Path, header: dict[str, str]) -> None:
    for part, changes in adapter.parts.items():
        if isinstance(networks[part], ClipText) and not hasattr(networks[part], "text_projection"):
            # in transformers 5 this one class of CLIP has the names of its inner model
            changes = tuple(replace(low, module=low.module.removeprefix("text_model.")) for low in changes)
        tensors, config = to_peft(replace(adapter, parts={part: changes}), part)
        place = folder if part == BACKBONE else folder / part
        place.mkdir(parents=True, exist_ok=True)
        write_tensors(place / "adapter_model.safetensors", tensors, metadata=header)
        write_json(place / "adapter_config.json", config)
