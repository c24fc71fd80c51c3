"""Scores of generated images: the Fréchet distance (FID), its features and the real images' statistics."""

from diffusion_lit.metrics.dinov2 import DINOv2
from diffusion_lit.metrics.features import (
    FeatureExtractor,
    Inception,
    Pixels,
    WeightsUnavailable,
    exact_float32,
)
from diffusion_lit.metrics.frechet import FeatureMoments, ReduceSum, frechet_distance, one_process
from diffusion_lit.metrics.paired import PSNR, SSIM, FeatureDistance, PairedScore, PerceptualDistance
from diffusion_lit.metrics.perceptual import LPIPS, Perceptual
from diffusion_lit.metrics.prompts import Ink, InkAgreement, PromptAgreement
from diffusion_lit.metrics.reference import (
    Reference,
    WrongImageCount,
    cache_path,
    cached_reference,
    compute_reference,
)
from diffusion_lit.metrics.scores import (
    KID,
    Agreement,
    Evidence,
    FrechetDistance,
    InceptionScore,
    PrecisionRecall,
    Score,
)

__all__ = [
    "KID",
    "LPIPS",
    "PSNR",
    "SSIM",
    "Agreement",
    "DINOv2",
    "Evidence",
    "FeatureDistance",
    "FeatureExtractor",
    "FeatureMoments",
    "FrechetDistance",
    "Inception",
    "InceptionScore",
    "Ink",
    "InkAgreement",
    "PairedScore",
    "Perceptual",
    "PerceptualDistance",
    "Pixels",
    "PrecisionRecall",
    "PromptAgreement",
    "ReduceSum",
    "Reference",
    "Score",
    "WeightsUnavailable",
    "WrongImageCount",
    "cache_path",
    "cached_reference",
    "compute_reference",
    "exact_float32",
    "frechet_distance",
    "one_process",
]
