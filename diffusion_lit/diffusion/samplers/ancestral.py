"""Ancestral sampling of DDPM: x_s ~ p(x_s | x_t) in every step."""

from torch import Tensor

from diffusion_lit.diffusion.grid import Grid, Uniform
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.diffusion.samplers.base import NoiseFn, Sampler
from diffusion_lit.diffusion.variance import FixedLarge, ReverseVariance
from diffusion_lit.types import DenoiseFn


class Ancestral(Sampler):
    """Draws from N(posterior mean at the predicted x_0, reverse variance).

    Args:
        steps: S; None: all T of a chain, as in the paper.
        variance: The reverse variance. The paper uses `FixedLarge` for CIFAR-10 and `FixedSmall` for LSUN and
            CelebA-HQ.
        grid: The rule that chooses S times; with `FixedLarge` and S < T this is DDIM's "sigma-hat" row.
        clip: Whether predictions of x_0 are clipped to [-1, 1], as in the paper's code.

    Source: Ho et al. 2020, algorithm 2.
    """

    def __init__(
        self,
        steps: int | None = None,
        variance: ReverseVariance = FixedLarge(),
        grid: Grid = Uniform(),
        clip: bool = True,
    ) -> None:
        super().__init__(steps, grid, clip)
        self.variance = variance

    def step(
        self, denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, s: Tensor, noise: NoiseFn
    ) -> tuple[Tensor, Tensor]:
        prediction = denoise(x_t, t)
        a, b, _ = (expand(c, x_t) for c in process.posterior(t, s))
        mean = a * x_t + b * prediction.x0
        if s == 0:
            return mean, prediction.x0
        deviation = self.variance(process, t, s, prediction).sqrt()
        return mean + expand(deviation, x_t) * noise(), prediction.x0
