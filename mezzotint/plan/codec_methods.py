"""Training of codecs as graphs: an autoencoder against its critics, a linear codec."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mezzotint.backbones.efficientnet import EfficientNetLite0
from mezzotint.codec import DECODING
from mezzotint.codec.patch_pca import PatchPCA, PatchPCAConfig
from mezzotint.errors import InputError
from mezzotint.plan.objective import Critics, Prepared, Training, bytes_of
from mezzotint.plan.subject import Subject
from mezzotint.plan.trace import imaginary


def vae(subject: Subject, job: Training, size: tuple[int, int], critics: Critics | None) -> Prepared:
    """The autoencoder against its distance, a feature network and a patch discriminator."""
    network: Any = imaginary(subject.outline("codec"), torch.float32, trains=True)
    if not any(True for _ in network.parameters()):
        raise InputError(f"{subject.name} works on pixels: there is no autoencoder to train")
    if isinstance(network, PatchPCA):
        raise InputError(f"{subject.name} has a linear codec: plan it with --train patch-pca")
    if critics is None:
        raise InputError("the method vae needs its critics: call with critics=mezzotint.training.adversary")
    if job.decoder:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(DECODING))
    latent, (width, height) = subject.contract.latent, size
    features, judge = (
        EfficientNetLite0().eval().requires_grad_(False),
        critics.PatchDiscriminator(latent.pixel_channels, 64, 3),
    )

    def loss(count: int) -> Tensor:
        pixels = torch.zeros(count, latent.pixel_channels, height, width)
        z = network.encode(pixels)
        divergence: Any = 0.0
        if hasattr(network, "quantize"):
            codes, divergence = network.quantize.learn(z, 0.25)
            drawn = network.decode_codes(codes)
        elif z.shape[1] > latent.channels:
            mean, log_variance = z.chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean() / 2
            drawn = network.decode(mean + (log_variance / 2).exp() * torch.zeros_like(mean))
        else:
            drawn = network.decode(z)
        distance = (drawn - pixels).abs().mean() + critics.perceptual_distance(features, drawn, pixels).mean()
        judge.requires_grad_(False)
        adversarial = -judge(drawn).mean()
        scale = critics.balance(distance, adversarial, network.decoder.conv_out.weight)
        judge.requires_grad_(True)
        verdict = critics.hinge(judge(pixels), judge(drawn.detach()))
        return distance + 0.5 * scale * adversarial + verdict + 1e-6 * divergence

    own = bytes_of(network)
    weights = {"autoencoder": own, "discriminator": bytes_of(judge), "feature network": bytes_of(features)}
    return Prepared([network, judge], loss, weights, own, own, [features])


def patch_pca(subject: Subject, job: Training, size: tuple[int, int], critics: Critics | None) -> Prepared:
    """A linear codec of the model's latent channels and factor, after principal components are found."""
    latent, (width, height) = subject.contract.latent, size
    if latent.factor == 1:
        raise InputError(f"{subject.name} works on pixels: there is no codec to fit")
    channels = min(latent.channels, latent.pixel_channels * latent.factor**2)
    network = PatchPCA(PatchPCAConfig(latent.pixel_channels, channels, latent.factor))
    own = bytes_of(network)

    def loss(count: int) -> Tensor:
        pixels = torch.zeros(count, latent.pixel_channels, height, width)
        return (network(pixels) - pixels).square().mean()

    cut = latent.pixel_channels * latent.factor**2
    images = 4.0 * job.images * latent.pixel_channels * width * height
    notes = (f"before the steps: the eigenvectors of a {cut}x{cut} matrix of patches",)
    return Prepared([network], loss, {"codec": own, "images": images}, own, own, notes=notes)
