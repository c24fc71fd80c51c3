"""What the network's output F means.

Every choice is linear: (x_0, eps) from (x_t, F), and F from (x_0, eps). The network may be asked for any of
them; what leaves the denoiser is always the pair (x_0, eps).
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lit.diffusion.process import Process


class Reading(NamedTuple):
    """x_0 = x0_x x_t + x0_f F and eps = eps_x x_t + eps_f F; each in the shape of t."""

    x0_x: Tensor
    x0_f: Tensor
    eps_x: Tensor
    eps_f: Tensor


class Target(NamedTuple):
    """F = of_x0 x_0 + of_eps eps; each in the shape of t."""

    of_x0: Tensor
    of_eps: Tensor


class Parameterization(ABC):
    """Reads a network's output, and says what it should have been."""

    def check(self, process: Process) -> None:
        """Raises ValueError where a time of the process leaves x_0 or eps undefined."""
        one = torch.ones((), dtype=torch.float64)
        alpha, _ = process.alpha_sigma(one)
        if alpha == 0 and not torch.isfinite(torch.stack(self.reading(process, one))).all():
            raise ValueError(
                f"{type(self).__name__} cannot give x0 where alpha is 0, as at the end of this process; "
                "use --model.parameterization V or X0, or a schedule that keeps some signal"
            )

    @abstractmethod
    def reading(self, process: Process, t: Tensor) -> Reading:
        """The coefficients that read x_0 and eps off x_t and the output, at times in (0, 1]."""

    @abstractmethod
    def target(self, process: Process, t: Tensor) -> Target:
        """The coefficients of the output that a perfect network would give."""


class Eps(Parameterization):
    """The network predicts the noise. Source: Ho et al. 2020, eq. 11."""

    def reading(self, process: Process, t: Tensor) -> Reading:
        alpha, sigma = process.alpha_sigma(t)
        return Reading(1 / alpha, -sigma / alpha, torch.zeros_like(alpha), torch.ones_like(alpha))

    def target(self, process: Process, t: Tensor) -> Target:
        alpha, _ = process.alpha_sigma(t)
        return Target(torch.zeros_like(alpha), torch.ones_like(alpha))


class X0(Parameterization):
    """The network predicts the clean data. Source: Ho et al. 2020, section 3.2."""

    def reading(self, process: Process, t: Tensor) -> Reading:
        alpha, sigma = process.alpha_sigma(t)
        return Reading(torch.zeros_like(alpha), torch.ones_like(alpha), 1 / sigma, -alpha / sigma)

    def target(self, process: Process, t: Tensor) -> Target:
        alpha, _ = process.alpha_sigma(t)
        return Target(torch.ones_like(alpha), torch.zeros_like(alpha))


class V(Parameterization):
    """The network predicts the velocity v = alpha eps - sigma x_0.

    Holds for variance-preserving processes, alpha^2 + sigma^2 = 1. Source: Salimans & Ho 2022, section 4.
    """

    def reading(self, process: Process, t: Tensor) -> Reading:
        alpha, sigma = process.alpha_sigma(t)
        return Reading(alpha, -sigma, sigma, alpha)

    def target(self, process: Process, t: Tensor) -> Target:
        alpha, sigma = process.alpha_sigma(t)
        return Target(-sigma, alpha)


class PosteriorMean(Parameterization):
    """The network predicts the mean of q(x_s | x_t, x_0), s one step before t.

    Source: Ho et al. 2020, eq. 8 (the baseline of table 2).
    """

    def reading(self, process: Process, t: Tensor) -> Reading:
        alpha, sigma = process.alpha_sigma(t)
        a, b, _ = process.posterior(t, process.previous(t))
        return Reading(-a / b, 1 / b, (1 + alpha * a / b) / sigma, -alpha / (b * sigma))

    def target(self, process: Process, t: Tensor) -> Target:
        alpha, sigma = process.alpha_sigma(t)
        a, b, _ = process.posterior(t, process.previous(t))
        return Target(a * alpha + b, a * sigma)
