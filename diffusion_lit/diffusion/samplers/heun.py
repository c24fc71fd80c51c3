"""Heun's method on the probability flow: second order, by a second evaluation at the end of each step."""

import math

import torch
from torch import Tensor

from diffusion_lit.diffusion.grid import Grid, Karras
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.diffusion.samplers.base import NoiseFn, Sampler
from diffusion_lit.types import DenoiseFn


class Heun(Sampler):
    """The trapezoidal rule for d(x / alpha) / d(sigma / alpha) = eps; the last step, to t = 0, is an Euler step.

    N intervals take 2 N - 1 network evaluations. x / alpha is EDM's variable, so that this is its algorithm 2 for any
    process, and with s_churn = 0 its algorithm 1. Where alpha nearly vanishes, as at the end of a cosine schedule,
    errors of eps grow like sigma / alpha: start, as EDM does and `Karras` ensures, at 80 or so.

    With s_churn > 0 each step first adds noise, from s = sigma / alpha to s (1 + gamma), as far as the process goes:
    gamma = min(s_churn / N, sqrt(2) - 1) where s_min <= s <= s_max, and 0 elsewhere.

    Args:
        steps: Number of network evaluations per image, odd; of an even number one is not used. None: 2 T - 1. A grid
            that ends above 0 takes one more.
        grid: The rule that chooses (steps + 1) / 2 times.
        clip: Whether predictions of x_0 are clipped to [-1, 1].
        s_churn: Amount of fresh noise, at least 0; 0: the sampler is deterministic.
        s_min: Least s at which noise is added.
        s_max: Largest s at which noise is added; None: any.
        s_noise: Standard deviation of that noise, relative to what would keep the marginals.

    Raises:
        ValueError: If `s_churn` is negative, `s_noise` is not above 0 or not 0 <= s_min <= s_max.

    Source: Karras et al. 2022 (EDM), algorithms 1 and 2.
    """

    def __init__(
        self,
        steps: int | None = 35,
        grid: Grid = Karras(),
        clip: bool = True,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float | None = None,
        s_noise: float = 1.0,
    ) -> None:
        super().__init__(steps, grid, clip)
        if s_churn < 0 or not 0 <= s_min <= (math.inf if s_max is None else s_max) or not s_noise > 0:
            raise ValueError(
                f"sampler: s_churn={s_churn} >= 0, 0 <= s_min={s_min} <= s_max={s_max} and s_noise={s_noise} > 0 must "
                "hold; the paper has 40, 0.05, 50 and 1.003 for ImageNet 64x64"
            )
        self.s_churn = s_churn
        self.s_min = s_min
        self.s_max = s_max
        self.s_noise = s_noise

    def num_intervals(self, process: Process) -> int:
        """Returns the number of steps over the whole grid, N.

        Raises:
            ValueError: If a chain of T steps allows fewer evaluations, 2 T - 1, or if all are asked for in continuous
                time.
        """
        if self.steps is None:
            return super().num_intervals(process)
        if process.num_steps is not None and self.steps > 2 * process.num_steps - 1:
            most = 2 * process.num_steps - 1
            raise ValueError(
                f"sampler.steps={self.steps} exceeds the {most} evaluations that {process.num_steps} times allow; "
                f"set --model.sampler.steps to at most {most}"
            )
        return (self.steps + 1) // 2

    def evaluations(self, process: Process) -> int:
        # The step to t = 0 takes one.
        return 2 * self.num_intervals(process) - (self.grid.end(process) == 0)

    def step(
        self, denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, s: Tensor, noise: NoiseFn
    ) -> tuple[Tensor, Tensor]:
        if self.s_churn > 0:
            x_t, t = self.churn(x_t, process, t, noise)
        if s == 0:
            x0 = denoise(x_t, t).x0
            return x0, x0
        return heun_step(denoise, x_t, process, t, s)

    def churn(self, x_t: Tensor, process: Process, t: Tensor, noise: NoiseFn) -> tuple[Tensor, Tensor]:
        """Adds noise to x_t; returns it with its new time, or as it is where s lies outside [s_min, s_max]."""
        alpha, sigma = process.alpha_sigma(t)
        s = float(sigma / alpha)
        if s < self.s_min or (self.s_max is not None and s > self.s_max):
            return x_t, t
        gamma = min(self.s_churn / self.num_intervals(process), math.sqrt(2) - 1)
        later = torch.maximum(process.time_at(-2 * (sigma / alpha * (1 + gamma)).log()).clamp(max=1.0), t)
        alpha_later, sigma_later = process.alpha_sigma(later)
        added = ((sigma_later / alpha_later) ** 2 - (sigma / alpha) ** 2).clamp(min=0).sqrt() * alpha_later
        x_later = expand(alpha_later / alpha, x_t) * x_t + expand(self.s_noise * added, x_t) * noise()
        return x_later, later


def heun_step(denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Takes one step of Heun's method, by two evaluations.

    Args:
        denoise: Predicts x_0 and eps.
        x_t: (B, ...).
        process: The forward process.
        t: Times of x_t, () or (B,).
        s: Times to go to, above 0 and below t, in the shape of t.

    Returns:
        (x_s, the x_0 predicted at t).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
    near = denoise(x_t, t)
    x_s = expand(alpha_s, x_t) * near.x0 + expand(sigma_s, x_t) * near.eps
    far = denoise(x_s, s)
    half_width = (alpha_s * sigma_t / alpha_t - sigma_s) / 2
    return x_s + expand(half_width, x_t) * (near.eps - far.eps), near.x0
