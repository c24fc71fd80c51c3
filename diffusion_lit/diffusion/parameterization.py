"""Parameterizations: the meaning of the network's output F.

Each is linear: (x_0, eps) follow from (x_t, F). The denoiser returns (x_0, eps) for all of them.
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lit.diffusion.process import Process, require_chain
from diffusion_lit.types import Part


class Coefficients(NamedTuple):
    """Coefficients of x_0 = x0_x x_t + x0_f F and eps = eps_x x_t + eps_f F, each in the shape of t."""

    x0_x: Tensor
    x0_f: Tensor
    eps_x: Tensor
    eps_f: Tensor


class Parameterization(Part):
    """Computes x_0 and eps from the network's output, and scales the network's inputs."""

    def check(self, process: Process) -> None:
        """Raises ValueError where x_0 or eps are undefined at a time of the process."""
        one = torch.ones((), dtype=torch.float64)
        alpha, _ = process.alpha_sigma(one)
        if alpha == 0 and not torch.isfinite(torch.stack(self.coefficients(process, one))).all():
            raise ValueError(
                f"{type(self).__name__} cannot give x0 where alpha is 0, as at the end of this process; "
                "use --model.parameterization V or X0, or a schedule that keeps some signal"
            )

    @abstractmethod
    def coefficients(self, process: Process, t: Tensor) -> Coefficients:
        """Returns the coefficients at times in (0, 1]."""

    def input_scale(self, process: Process, t: Tensor) -> Tensor | None:
        """Returns the factor of x_t in the network's input, in the shape of t; None: x_t is not scaled."""
        return None

    def network_time(self, process: Process, t: Tensor) -> Tensor:
        """Returns the time in the network's units, float32, in the shape of t."""
        return process.network_time(t)


class Eps(Parameterization):
    """The network predicts the noise. Source: Ho et al. 2020, eq. 11."""

    def coefficients(self, process: Process, t: Tensor) -> Coefficients:
        alpha, sigma = process.alpha_sigma(t)
        return Coefficients(1 / alpha, -sigma / alpha, torch.zeros_like(alpha), torch.ones_like(alpha))


class X0(Parameterization):
    """The network predicts the clean data. Source: Ho et al. 2020, section 3.2."""

    def coefficients(self, process: Process, t: Tensor) -> Coefficients:
        alpha, sigma = process.alpha_sigma(t)
        return Coefficients(torch.zeros_like(alpha), torch.ones_like(alpha), 1 / sigma, -alpha / sigma)


class V(Parameterization):
    """The network predicts the velocity v = alpha eps - sigma x_0, for variance-preserving processes.

    Source: Salimans & Ho 2022, section 4.
    """

    def check(self, process: Process) -> None:
        """Raises ValueError if alpha^2 + sigma^2 is not 1 at all times."""
        for time in (process.first_time, 0.5, 1.0):
            alpha, sigma = process.alpha_sigma(torch.tensor(time, dtype=torch.float64))
            if abs(float(alpha**2 + sigma**2) - 1) > 1e-6:
                raise ValueError(
                    f"V needs a process with alpha^2 + sigma^2 = 1, which {type(process).__name__} is not; "
                    "set --model.parameterization Preconditioned or X0"
                )

    def coefficients(self, process: Process, t: Tensor) -> Coefficients:
        alpha, sigma = process.alpha_sigma(t)
        return Coefficients(alpha, -sigma, sigma, alpha)


class PosteriorMean(Parameterization):
    """The network predicts the mean of q(x_s | x_t, x_0), with s one step of the chain before t.

    Source: Ho et al. 2020, eq. 8 (the baseline of table 2).
    """

    def check(self, process: Process) -> None:
        """Raises ValueError if the process is no chain."""
        super().check(require_chain(process, "PosteriorMean"))

    def coefficients(self, process: Process, t: Tensor) -> Coefficients:
        alpha, sigma = process.alpha_sigma(t)
        a, b, _ = process.posterior(t, require_chain(process, "PosteriorMean").previous(t))
        return Coefficients(-a / b, 1 / b, (1 + alpha * a / b) / sigma, -alpha / (b * sigma))


class Preconditioned(Parameterization):
    """EDM's preconditioning: input, output and target of the network have about unit variance at every noise level.

        x_0 = c_skip(s) y + c_out(s) F(c_in(s) y, log(s) / 4),    y = x_t / alpha,  s = sigma / alpha
        c_skip = d^2 / (s^2 + d^2),  c_out = s d / sqrt(s^2 + d^2),  c_in = 1 / sqrt(s^2 + d^2)

    with d = sigma_data. The paper has alpha = 1, so that y = x_t and s = sigma. For any other process y is x_t without
    its scaling, which has the paper's noise level s; with n^2 = sigma^2 + alpha^2 d^2, the standard deviation of x_t,

        x_0 = alpha d^2 / n^2 x_t + sigma d / n F,    eps = sigma / n^2 x_t - alpha d / n F,    c_in y = x_t / n.

    For a variance-preserving process and d = 1, F is -v of `V`.

    Args:
        sigma_data: Standard deviation of the data, above 0.

    Raises:
        ValueError: If `sigma_data` is not above 0.

    Source: Karras et al. 2022 (EDM), eq. 7 and table 1.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not sigma_data > 0:
            raise ValueError(f"parameterization.sigma_data={sigma_data} must be above 0; EDM uses 0.5 for images")
        self.sigma_data = sigma_data

    def check(self, process: Process) -> None:
        """Raises ValueError where alpha is 0, as the network's time is infinite there."""
        if process.alpha_sigma(torch.ones((), dtype=torch.float64))[0] == 0:
            raise ValueError(
                f"Preconditioned needs a finite sigma / alpha, and alpha is 0 at the end of {type(process).__name__}; "
                "set --model.parameterization V or X0"
            )

    def _alpha_sigma_std(self, process: Process, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = process.alpha_sigma(t)
        return alpha, sigma, (sigma**2 + (alpha * self.sigma_data) ** 2).sqrt()

    def coefficients(self, process: Process, t: Tensor) -> Coefficients:
        alpha, sigma, std = self._alpha_sigma_std(process, t)
        d = self.sigma_data
        return Coefficients(alpha * (d / std) ** 2, sigma * d / std, sigma / std**2, -alpha * d / std)

    def input_scale(self, process: Process, t: Tensor) -> Tensor:
        return 1 / self._alpha_sigma_std(process, t)[2]

    def network_time(self, process: Process, t: Tensor) -> Tensor:
        return (process.log_snr(t) / -8).to(torch.float32)
