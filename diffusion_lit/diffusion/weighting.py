"""Weights of the squared error at each noise level.

A weight w(t) multiplies |eps - eps_hat|^2. The squared error of x_0 is |x_0 - x0_hat|^2 = |eps - eps_hat|^2 / SNR(t),
so that every published weight can be written in this form.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from diffusion_lit.diffusion.process import Process, require_chain
from diffusion_lit.diffusion.variance import FixedLarge, FixedVariance
from diffusion_lit.types import Part


class Weighting(Part):
    """A function of the noise level."""

    @abstractmethod
    def __call__(self, process: Process, t: Tensor) -> Tensor:
        """Returns weights in the shape of t, at least 0."""


class Simple(Weighting):
    """1: the loss L_simple. Source: Ho et al. 2020, eq. 14."""

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class Variational(Weighting):
    """The weight with which the loss is one step of the variational bound of a chain, the paper's L, in nats.

    |mu - mu_hat|^2 / (2 sigma^2) with mu the posterior mean and sigma^2 the reverse variance; the last step, to clean
    data, is treated as a Gaussian too. The terms of the variances are the same for every network and are left out.

    Args:
        variance: The reverse variance; a fixed one, because a weight does not depend on the network.

    Source: Ho et al. 2020, eqs. 8 and 12.
    """

    def __init__(self, variance: FixedVariance = FixedLarge()) -> None:
        self.variance = variance

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        s = require_chain(process, "the weighting Variational").previous(t)
        alpha, sigma = process.alpha_sigma(t)
        _, b, _ = process.posterior(t, s)
        return (b * sigma / alpha) ** 2 / (2 * self.variance.between(process, t, s))


class MinSNR(Weighting):
    """min(SNR, gamma) / SNR: nearly clean inputs have less weight.

    Args:
        gamma: Signal-to-noise ratio above which weights fall, above 0.

    Source: Hang et al. 2023, eq. 8.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"MinSNR: gamma={gamma} must be above 0; the paper uses 5")
        self.gamma = gamma

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return (self.gamma * (-process.log_snr(t)).exp()).clamp(max=1.0)


class TruncatedSNR(Weighting):
    """max(1, 1 / SNR): the squared error of x_0 with the weight max(SNR, 1), which is never small.

    Source: Salimans & Ho 2022, section 4 ("truncated SNR").
    """

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return (-process.log_snr(t)).exp().clamp(min=1.0)


class Velocity(Weighting):
    """1 + 1 / SNR: the squared error of v, for networks that predict it.

    Source: Salimans & Ho 2022, section 4 ("SNR+1").
    """

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return 1 + (-process.log_snr(t)).exp()


class EDM(Weighting):
    """(s^2 + d^2) / d^2 with s = sigma / alpha: the squared error of the output F of `Preconditioned`.

    The paper weights |x_0 - x0_hat|^2 by lambda = (s^2 + d^2) / (s d)^2, which is s^2 lambda on the error of eps.

    Args:
        sigma_data: Standard deviation d of the data, above 0; that of the parameterization.

    Raises:
        ValueError: If `sigma_data` is not above 0.

    Source: Karras et al. 2022 (EDM), table 1.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not sigma_data > 0:
            raise ValueError(f"weighting.sigma_data={sigma_data} must be above 0; EDM uses 0.5 for images")
        self.sigma_data = sigma_data

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        return 1 + (-process.log_snr(t)).exp() / self.sigma_data**2
