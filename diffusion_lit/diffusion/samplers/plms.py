"""PLMS: pseudo linear multistep sampling, DDIM with eps extrapolated from the latest predictions."""

from collections import deque

import torch
from torch import Tensor

from diffusion_lit.diffusion.grid import Grid, Leading
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.diffusion.samplers.base import NoiseFn, Sampler, Step
from diffusion_lit.types import DenoiseFn

WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Of the latest predictions of eps, the newest first, by their number (Adams-Bashforth)."""


class PLMS(Sampler):
    """A DDIM step of a combination of up to four predictions of eps; deterministic.

    The first step, which has no earlier predictions, takes the mean of the predictions at its two ends: S steps are
    S + 1 network evaluations. A single step is one of DDIM, as in diffusers.

    Args:
        steps: Number of steps, S; None: all T of a chain.
        grid: The rule that chooses S times, which the weights take to be evenly spaced.
        clip: Whether predictions of x_0 are clipped to [-1, 1].

    Source: Liu et al. 2022 (PNDM), eqs. 11 and 12, without its Runge-Kutta steps, as in the code of Rombach et al.
    2022; in diffusers, `PNDMScheduler` with `skip_prk_steps`.
    """

    def __init__(self, steps: int | None = 50, grid: Grid = Leading(offset=1, clean=False), clip: bool = False) -> None:
        super().__init__(steps, grid, clip)

    def evaluations(self, process: Process) -> int:
        steps = super().evaluations(process)
        return steps + (steps > 1)

    def begin(self, times: Tensor) -> Step:
        past: deque[Tensor] = deque(maxlen=len(WEIGHTS))
        steps = len(times) - 1

        def step(
            denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, s: Tensor, noise: NoiseFn
        ) -> tuple[Tensor, Tensor]:
            past.appendleft(denoise(x_t, t).eps)
            eps = sum((w * e for w, e in zip(WEIGHTS[len(past) - 1], past, strict=True)), torch.zeros_like(x_t))
            x_s, x0 = shifted(x_t, eps, process, t, s)
            if len(past) > 1 or steps == 1:
                return x_s, x0
            return shifted(x_t, (eps + denoise(x_s, s).eps) / 2, process, t, s)

        return step

    def step(
        self, denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, s: Tensor, noise: NoiseFn
    ) -> tuple[Tensor, Tensor]:
        return self.begin(torch.stack([t, s]))(denoise, x_t, process, t, s, noise)


def shifted(x_t: Tensor, eps: Tensor, process: Process, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(x_s, x_0) of x_t and eps. Source: Liu et al. 2022, eq. 11; it is DDIM's step."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
    x0 = (x_t - expand(sigma_t, x_t) * eps) / expand(alpha_t, x_t)
    return expand(alpha_s, x_t) * x0 + expand(sigma_s, x_t) * eps, x0
