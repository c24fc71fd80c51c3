"""DDIM: few steps; at eta = 0 deterministic and approximately invertible."""

from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lit.diffusion.grid import Grid, Uniform
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.diffusion.samplers.base import NoiseFn, Sampler, start_std
from diffusion_lit.types import DenoiseFn, StepFn


class DDIM(Sampler):
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau z, with tau = eta times the posterior's deviation.

    Args:
        steps: S; None: all T of a chain.
        eta: In [0, 1]: 0 is deterministic, 1 is ancestral sampling with the small variance.
        grid: The rule that chooses S times; the paper uses `Quadratic` for CIFAR-10 and `Uniform` elsewhere.
        clip: Whether predictions of x_0 are clipped to [-1, 1]; the paper's tables are without.

    Raises:
        ValueError: If eta lies outside [0, 1].

    Source: Song et al. 2021 (DDIM), eqs. 12 and 16.
    """

    def __init__(self, steps: int | None = 50, eta: float = 0.0, grid: Grid = Uniform(), clip: bool = True) -> None:
        super().__init__(steps, grid, clip)
        if not 0 <= eta <= 1:
            raise ValueError(f"sampler.eta={eta} must lie in [0, 1], from DDIM to DDPM; set --model.sampler.eta")
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

    def invert(self, denoise: DenoiseFn, x0: Tensor, process: Process, on_step: StepFn | None = None) -> Tensor:
        """Integrates the deterministic trajectory backwards, from images to the noise that they come from.

        It uses the same grid in rising order; eta and clipping have no effect. Each step uses the prediction at its
        lower end, so that sampling from the result returns the image up to an error of first order in the width of the
        steps. There is no prediction at t = 0: the first step evaluates the network at the first time of the grid.

        Args:
            denoise: Predicts x_0 and eps.
            x0: Clean data, (B, ...).
            process: The forward process.
            on_step: Called after every step.

        Returns:
            Latent noise at the last time of the grid, (B, ...), in the units of the noise that sampling starts from.

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
        return x if process.prior_std == 1 else x / start_std(process, times[-1])


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolates spherically between two noises, image by image, which keeps their length.

    Args:
        a: Noise at weight 0, (B, ...).
        b: Noise at weight 1, in the shape of a.
        weight: In [0, 1].

    Raises:
        ValueError: If the weight lies outside [0, 1] or the shapes differ.

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
    weight_a = torch.where(small, 1 - weight, ((1 - weight) * safe).sin() / safe.sin())
    weight_b = torch.where(small, weight, (weight * safe).sin() / safe.sin())
    return expand(weight_a, a) * a + expand(weight_b, b) * b
