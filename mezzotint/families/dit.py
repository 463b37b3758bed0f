"""DiT (Peebles & Xie 2023): class-conditional transformers S, B, L, XL on Stable Diffusion's latents, learned variance.

The original file has the transformer alone; its autoencoder (sd-vae-ft-mse or -ema) comes from a folder vae/ beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mezzotint.backbones.dit import DiTConfig
from mezzotint.checkpoints.layouts.dit import dit, dit_config
from mezzotint.contract import ClassFacts, GuidanceFacts, SamplingFacts
from mezzotint.families.ddpm import square
from mezzotint.families.family import Asked, Family
from mezzotint.families.latent import factor_of, published
from mezzotint.families.materials import Materials, Original, Section, Shapes
from mezzotint.process import Prediction, Process, schedules

KINDS = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is its older name
TRAINED = Process(schedules.linear(), Prediction.EPSILON)
PLAIN = SamplingFacts(sampler="ddim", steps=50)


def facts(materials: Materials, asked: Asked) -> dict[str, Any]:
    process, sampling = published(materials, TRAINED, PLAIN, asked)
    backbone = materials.parts["transformer"].config
    count, channels = int(backbone.get("num_embeds_ada_norm", 1000)), int(backbone.get("in_channels", 4))
    return {
        "process": process,
        "sampling": sampling,
        "guidance": GuidanceFacts(dropout=0.1, scale=4.0),
        "size": square(backbone.get("sample_size", 32), factor_of(materials)),
        "classes": ClassFacts(names=class_names(materials, count), null=count),
        "variance": "learned" if backbone.get("out_channels") == 2 * channels else "fixed",
    }


def class_names(materials: Materials, count: int) -> tuple[str, ...]:
    """Names from the folder's index, else the numbers."""
    listed = materials.index.get("id2label")
    named = listed if isinstance(listed, dict) else {}
    return tuple(str(named.get(str(i), i)) for i in range(count))


def sections(tensors: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Section]:
    """The same numbers as from the folder, unless a config.json beside the file says otherwise.

    The authors' own are {"freq_shift": 0, "norm_eps": 1e-6}: the reference library spaces the clock's frequencies and
    bounds the norms otherwise, 1 and 1e-5.
    """
    told = dict(stated) if stated.get("_class_name", KINDS[0]) in KINDS else {}

    def infer(shapes: Shapes) -> dict[str, Any]:
        return dit_config(shapes, heads=told.get("num_attention_heads")) | told | {"_class_name": KINDS[0]}

    return {"transformer": Section("", infer, lambda config: dit(DiTConfig.from_config(config)))}


FAMILY = Family(
    name="dit",
    title="DiT",
    pipeline=lambda materials: "DiTPipeline",
    fits=lambda materials: (
        materials.kind("transformer") in KINDS
        and materials.config("transformer", "norm_type", "ada_norm_zero") == "ada_norm_zero"
    ),
    facts=facts,
    licence=lambda materials: "CC-BY-NC-4.0",
    backbone="transformer",
    original=Original(lambda shapes: "y_embedder.embedding_table.weight" in shapes, sections),
)
