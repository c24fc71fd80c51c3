"""Editing without training: what is known of an image is put into each predicted image while sampling.

What is known is given by an orthogonal projection P, and a prediction x becomes x + P (y - x). This is the paper's
A^-1 [(A y) (1 - Omega) + (A x) Omega] with an orthogonal A, whose rows outside the mask Omega span the range of P.

Source: Song et al. 2023, algorithm 4 and appendix D.
"""

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lit.diffusion import Process, Sampler
from diffusion_lit.diffusion.process import expand
from diffusion_lit.diffusion.samplers import NoiseFn
from diffusion_lit.types import DenoiseFn, Prediction

Projection = Callable[[Tensor], Tensor]
"""What is known of images, (B, C, H, W), as images of the same shape; linear, and its own square."""

LUMINANCE = (0.2989, 0.587, 0.114)


def inside(mask: Tensor) -> Projection:
    """Pixels are known where the mask is 1: inpainting.

    Args:
        mask: 0 or 1, in a shape that broadcasts to (B, C, H, W).
    """

    def project(x: Tensor) -> Tensor:
        return x * mask.to(x)

    return project


def gray(x: Tensor) -> Tensor:
    """Luminance is known: colourisation. x: (B, 3, H, W)."""
    if x.shape[1] != 3:
        raise ValueError(f"gray: luminance is that of 3 channels, not of {x.shape[1]}")
    weights = torch.tensor(LUMINANCE, dtype=x.dtype, device=x.device)
    unit: Tensor = (weights / weights.square().sum().sqrt()).reshape(1, 3, 1, 1)
    return (x * unit).sum(1, keepdim=True) * unit


def patches(size: int = 8) -> Projection:
    """Means of patches are known: super-resolution.

    Args:
        size: Height and width of the patches, which divide those of the images.
    """

    def project(x: Tensor) -> Tensor:
        if x.shape[-1] % size or x.shape[-2] % size:
            raise ValueError(f"patches: {size} does not divide images of {tuple(x.shape[-2:])} pixels")
        means: Tensor = F.avg_pool2d(x, size)
        enlarged: Tensor = means.repeat_interleave(size, -1).repeat_interleave(size, -2)
        return enlarged

    return project


def edit(
    denoise: DenoiseFn, sampler: Sampler, process: Process, images: Tensor, known: Projection, noise: NoiseFn
) -> Tensor:
    """Completes images of which something is known.

    Args:
        denoise: Predicts x_0, such as `DiffusionModule.bind(condition)`.
        sampler: `Multistep` for consistency models; clipping is applied before what is known is put in.
        process: The forward process.
        images: Of which only `known(images)` is used, (B, C, H, W), in [-1, 1].
        known: What is known of them.
        noise: Draws standard normal noise in the shape of the images, such as `ImageNoise.draw`.

    Returns:
        Images with the same known part, (B, C, H, W).
    """
    y = known(images)

    def merged(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        x0 = prediction.x0.clamp(-1, 1) if sampler.clip else prediction.x0
        x0 = x0 + y - known(x0)
        alpha, sigma = process.alpha_sigma(t)
        return Prediction(x0=x0, eps=(x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t), extra=prediction.extra)

    first = sampler.times(process)[0]
    x_t = process.perturb(y, noise(), first)
    unclipped = copy(sampler)
    unclipped.clip = False
    return unclipped(merged, x_t, process, noise, start=float(first))


def redraw(denoise: DenoiseFn, sampler: Sampler, process: Process, images: Tensor, noise: NoiseFn) -> Tensor:
    """Turns strokes into images: noises them to the sampler's first level, and samples from there.

    Args:
        denoise: Predicts x_0.
        sampler: Starts at the level wanted: `Multistep(grid=Sigmas([5.38, 2.24, 0.002]))` in the paper.
        process: The forward process.
        images: Strokes, (B, C, H, W), in [-1, 1].
        noise: Draws standard normal noise in the shape of the images.
    """
    first = sampler.times(process)[0]
    return sampler(denoise, process.perturb(images, noise(), first), process, noise, start=float(first))
