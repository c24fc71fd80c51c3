"""Conditions that need networks or are images or classes: texts, low resolutions, masks, maps, and several together."""

from diffusion_lit.conditioners.class_context import ClassContext
from diffusion_lit.conditioners.clip import CLIPText
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
from diffusion_lit.conditioners.text import Prompts, Text
from diffusion_lit.conditioners.tokenizer import Tokenizer, Tokens, Word, WordPiece

__all__ = [
    "GLIDE",
    "CLIPText",
    "ClassContext",
    "Joint",
    "LatentDiffusion",
    "LowResolution",
    "MaskConvention",
    "MaskedImage",
    "NoiseAugmentation",
    "Prompts",
    "SemanticMap",
    "Spatial",
    "StableDiffusion",
    "Text",
    "Tokenizer",
    "Tokens",
    "Word",
    "WordPiece",
    "known_pixels",
]
