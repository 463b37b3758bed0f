"""Pixels to backbone units and back."""

from mezzotint.codec.codec import DECODING, Autoencoder, Codec
from mezzotint.codec.inpainting import inpaint_concat, mask_maps
from mezzotint.codec.latent_space import LatentSpace

__all__ = ["DECODING", "Autoencoder", "Codec", "LatentSpace", "inpaint_concat", "mask_maps"]
