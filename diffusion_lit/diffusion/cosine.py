"""The cosine process in continuous time."""

import math

import torch
from torch import Tensor

from diffusion_lit.diffusion.process import Process


class CosineProcess(Process):
    """alpha(t) = cos(phi), sigma(t) = sin(phi), where the angle phi is linear in t and log(alpha^2 / sigma^2) bounded.

        log_snr(t) = -2 log tan(phi),    phi = a t + b,    log_snr(0+) = log_snr_max,    log_snr(1) = log_snr_min

    At t = 0 data are clean. The network receives 2000 phi / pi, in (0, 1000).

    Args:
        log_snr_min: log_snr at t = 1.
        log_snr_max: log_snr as t falls to 0, above `log_snr_min`.
        first_time: The least time of training and sampling, in (0, 1).

    Raises:
        ValueError: If an argument is out of range.

    Source: Salimans & Ho 2022, section 2, and its code.
    """

    def __init__(self, log_snr_min: float = -20.0, log_snr_max: float = 20.0, first_time: float = 1e-5) -> None:
        if not log_snr_min < log_snr_max or not 0 < first_time < 1:
            raise ValueError(
                f"process: log_snr_min={log_snr_min} < log_snr_max={log_snr_max} and 0 < first_time={first_time} < 1 "
                "must hold; the paper has -20 and 20"
            )
        self.log_snr_min = log_snr_min
        self.log_snr_max = log_snr_max
        self.first_time = first_time
        self._b = math.atan(math.exp(-log_snr_max / 2))
        self._a = math.atan(math.exp(-log_snr_min / 2)) - self._b

    def angle(self, t: Tensor) -> Tensor:
        """Returns phi, float64; 0 at t = 0."""
        t = t.to(torch.float64)
        return torch.where(t > 0, self._a * t + self._b, torch.zeros_like(t))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        phi = self.angle(t)
        return phi.cos(), phi.sin()

    def time_at(self, log_snr: Tensor) -> Tensor:
        phi = (log_snr.to(torch.float64) / -2).exp().atan()
        return ((phi - self._b) / self._a).clamp(min=0)

    def network_time(self, t: Tensor) -> Tensor:
        return (self.angle(t) * (2000 / math.pi)).to(torch.float32)
