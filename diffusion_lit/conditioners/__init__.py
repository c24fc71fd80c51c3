"""Conditions that are images or classes, and several conditions together."""

from diffusion_lit.conditioners.class_context import ClassContext
from diffusion_lit.conditioners.joint import Joint
from diffusion_lit.conditioners.low_resolution import LowResolution, NoiseAugmentation
from diffusion_lit.conditioners.masked_image import (
    GLIDE,
    LatentDiffusion,
    MaskConvention,
    MaskedImage,
    StableDiffusion,
    known_pixels,
)
from diffusion_lit.conditioners.semantic_map import SemanticMap
from diffusion_lit.conditioners.spatial import Spatial

__all__ = [
    "GLIDE",
    "ClassContext",
    "Joint",
    "LatentDiffusion",
    "LowResolution",
    "MaskConvention",
    "MaskedImage",
    "NoiseAugmentation",
    "SemanticMap",
    "Spatial",
    "StableDiffusion",
    "known_pixels",
]
