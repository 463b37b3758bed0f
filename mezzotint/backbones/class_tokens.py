"""Class labels for a network that reads tokens: the class-conditional latent diffusion models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from mezzotint.backbones.unet import UNet, needed
from mezzotint.backbones.unet_config import ConditionalUNetConfig
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError


@dataclass(frozen=True, slots=True)
class ClassTokensConfig:
    """A cross-attention U-Net and the rows of its table of classes, "no class" included."""

    unet: ConditionalUNetConfig
    classes: int

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> ClassTokensConfig:
        """Read config.json: `classes`, and `unet` with the fields of a UNet2DConditionModel's."""
        options = {key: value for key, value in data.items() if not key.startswith("_")}
        unet, classes = options.pop("unet", None), options.pop("classes", None)
        if options or not isinstance(unet, Mapping) or type(classes) is not int or classes < 1:
            raise InputError("ClassTokens takes 'unet', a U-Net's options, and 'classes', a positive number; no more")
        return cls(ConditionalUNetConfig.from_config(cast("Mapping[str, object]", unet)), classes)


class ClassTokens(nn.Module):
    """The label's row of a table is the one token that the U-Net attends to (Rombach et al. 2022, section 4.3).

    x (B, C_in, h, w), t (B,), conditioning.label (B,) -> raw output (B, C_out, h, w).
    """

    def __init__(self, config: ClassTokensConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.classes, config.unet.cross_attention_dim)
        self.unet = UNet(config.unet)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        token = self.embedding(needed(conditioning, "label"))[:, None]  # (B, 1, D)
        return self.unet(x, t, replace(conditioning, tokens=token, mask=None, label=None))
