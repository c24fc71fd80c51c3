"""Editing without training: what is known of an image is put into each predicted image while sampling.

What is known is given by an orthogonal projection P, and a prediction x becomes x + P (y - x). This is the paper's
A^-1 [(A y) (1 - Omega) + (A x) Omega] with an orthogonal A, whose rows outside the mask Omega span the range of P.

Source: Song et al. 2023, algorithm 4 and appendix D.
"""

from copy import copy

from torch import Tensor

from diffusion_lit.diffusion import Process, Sampler
from diffusion_lit.diffusion.projection import Projection, gray, inside, patches, with_known
from diffusion_lit.diffusion.samplers import NoiseFn
from diffusion_lit.types import DenoiseFn

__all__ = ["edit", "gray", "inside", "patches", "redraw"]


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
    first = sampler.times(process)[0]
    x_t = process.perturb(known(images), noise(), first)
    unclipped = copy(sampler)
    unclipped.clip = False
    merged = with_known(denoise, process, known, images, sampler.clip)
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
