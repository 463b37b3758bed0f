"""Which family of models an adapter was trained for, as the widths of its matrices tell."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mezzotint.adapters.keys import Stored

CROSS_ATTENTION = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
    1280: "the Stable Diffusion XL refiner",
}
TRANSFORMERS = {
    1536: "Stable Diffusion 3.5 medium",
    2432: "Stable Diffusion 3.5 large",
    3072: "FLUX.2 klein 4B",
    4096: "FLUX.2 klein 9B",
    6144: "FLUX.2 dev",
}
TEXT = re.compile(r"(lora_te\d?|(base_model\.model\.)?text_encoder(_\d)?)[._]")
# q, k and v of the picture's tokens, apart or fused, in the folder's and the original's names
QUERIES = re.compile(
    r"(joint|double)_blocks_\d+_(x_block|img)_attn_qkv$|transformer_blocks_\d+_attn_(to|add)_[qkv](_proj)?$"
    r"|single_blocks_\d+_linear1$|single_transformer_blocks_\d+_attn_to_qkv_mlp_proj$"
)
# what FLUX.1, which is as wide as klein 4B, has and FLUX.2 has not
FLUX_1 = re.compile(r"single_transformer_blocks_\d+_(attn_to_q|proj_mlp)$|_(img|txt)_mod_lin$|_modulation_lin$")


def family(stored: Sequence[Stored]) -> str | None:
    """A name for people, or None where the widths do not tell."""
    for item in stored:
        name = item.stem.replace(".", "_")
        if TEXT.match(item.stem):
            continue
        if re.search(r"attn2_(processor_)?to_[kv]$", name) and (found := CROSS_ATTENTION.get(item.down.shape[1])):
            return found
    for item in stored:
        name, width = item.stem.replace(".", "_"), item.down.shape[1]
        if QUERIES.search(name) and width in TRANSFORMERS:
            if width == 3072 and _older(stored):
                return "FLUX.1"
            return TRANSFORMERS[width]
    return None


def _older(stored: Sequence[Stored]) -> bool:
    """Whether this is FLUX.1 by its single blocks: q, k, v and 4 times the width, where FLUX.2 has 6 times."""
    for item in stored:
        name = item.stem.replace(".", "_")
        if FLUX_1.search(name) or (name.endswith("_linear1") and len(item.up) == 7 * item.down.shape[1]):
            return True
    return False
