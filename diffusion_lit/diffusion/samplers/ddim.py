"""DDIM: few steps, deterministic at eta = 0, and then a map between noise and images that runs both ways."""

from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lit.diffusion.grid import Grid, Uniform
from diffusion_lit.diffusion.process import DiscreteProcess, Process, expand
from diffusion_lit.diffusion.samplers.base import NoiseFn, Sampler
from diffusion_lit.types import DenoiseFn, StepFn


class DDIM(Sampler):
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau z, with tau = eta times the posterior's deviation.

    Args:
        steps: S; None: all T.
        eta: In [0, 1]: 0 is deterministic, 1 is ancestral sampling with the small variance.
        grid: Which S times; the paper's is `Quadratic` for CIFAR-10 and `Uniform` elsewhere.
        clip: Whether predictions of x_0 are clipped to [-1, 1]; the paper's tables were made without.

    Raises:
        ValueError: If eta lies outside [0, 1].

    Source: Song et al. 2021 (DDIM), eqs. 12 and 16.
    """

    def __init__(self, steps: int | None = 50, eta: float = 0.0, grid: Grid = Uniform(), clip: bool = True) -> None:
        super().__init__(steps, grid, clip)
        if not 0 <= eta <= 1:
            raise ValueError(
                f"sampler.eta={eta} must lie in [0, 1], from DDIM to DDPM; set --model.sampler.init_args.eta"
            )
        self.eta = eta

    def step(
        self, denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, s: Tensor, noise: NoiseFn
    ) -> tuple[Tensor, Tensor]:
        prediction = denoise(x_t, t)
        alpha_s, sigma_s = process.alpha_sigma(s)
        variance = self.eta**2 * process.posterior(t, s)[2]
        x_s = expand(alpha_s, x_t) * prediction.x0 + expand((sigma_s**2 - variance).sqrt(), x_t) * prediction.eps
        if variance > 0:
            x_s = x_s + expand(variance.sqrt(), x_t) * noise()
        return x_s, prediction.x0

    def encode(self, denoise: DenoiseFn, x0: Tensor, process: DiscreteProcess, on_step: StepFn | None = None) -> Tensor:
        """Runs the deterministic trajectory backwards, from images to the noise that they come from.

        The same grid in rising order; eta and clipping play no part. Each step uses the prediction at its
        near end, so that decoding returns the image up to an error of first order in the step's width. At
        t = 0 the network has no prediction: the first step asks it at the first time of the grid.

        Args:
            denoise: Predicts x_0 and eps.
            x0: Clean data, (B, C, H, W), in [-1, 1].
            process: The forward process.
            on_step: Told of every step done.

        Returns:
            The latent noise at the grid's last time, (B, C, H, W).

        Source: Song et al. 2021 (DDIM), section 4.3 and eq. 14.
        """
        times = self.times(process).flip(0)
        x = x0
        for done, (s, t) in enumerate(pairwise(times), start=1):
            prediction = denoise(x, torch.maximum(s, times[1]))
            clean = x if s == 0 else prediction.x0
            alpha, sigma = process.alpha_sigma(t)
            x = expand(alpha, x) * clean + expand(sigma, x) * prediction.eps
            if on_step is not None:
                on_step(done, len(times) - 1)
        return x


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolates along the great arc between two noises, image by image; the result is as long.

    Args:
        a: The noise at weight 0, (B, C, H, W).
        b: The noise at weight 1, (B, C, H, W).
        weight: In [0, 1].

    Raises:
        ValueError: If weight lies outside [0, 1] or the shapes differ.

    Source: Song et al. 2021 (DDIM), eq. 67.
    """
    if a.shape != b.shape or not 0 <= weight <= 1:
        raise ValueError(
            f"slerp: shapes {tuple(a.shape)} and {tuple(b.shape)} must agree, weight={weight} lie in [0, 1]"
        )
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    theta = cosine.arccos()
    small = theta < 1e-4
    safe = torch.where(small, torch.ones_like(theta), theta)
    of_a = torch.where(small, 1 - weight, ((1 - weight) * safe).sin() / safe.sin())
    of_b = torch.where(small, weight, (weight * safe).sin() / safe.sin())
    return expand(of_a, a) * a + expand(of_b, b) * b
