"""The forward process q, which turns data into noise.

    x_t = alpha(t) x_0 + sigma(t) eps,    eps ~ N(0, I),    t in [0, 1]

t = 0 is clean data. For s < t the process is Gaussian and Markov:

    q(x_t | x_s)      = N(alpha_ts x_s, sigma_ts^2),   alpha_ts = alpha_t / alpha_s,
                                                       sigma_ts^2 = sigma_t^2 - alpha_ts^2 sigma_s^2
    q(x_s | x_t, x_0) = N(a x_t + b x_0, c^2),         a = alpha_ts sigma_s^2 / sigma_t^2,
                                                       b = alpha_s sigma_ts^2 / sigma_t^2,
                                                       c^2 = sigma_ts^2 sigma_s^2 / sigma_t^2
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lit.diffusion.schedule import Linear, Schedule


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shapes a coefficient, (), (B,) or already that of x, so that it multiplies x, (B, ...), in the dtype of x."""
    if coefficient.ndim != 1:
        return coefficient.to(x.dtype)
    if coefficient.shape[0] != x.shape[0]:
        raise ValueError(f"{coefficient.shape[0]} times for a batch of {x.shape[0]}: give one t for each image")
    return coefficient.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class Process(ABC):
    """A Gaussian diffusion, known by alpha(t) and sigma(t).

    Times are tensors of shape () or (B,). Coefficients come back in the shape of t, in float64.
    """

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """How much signal and how much noise x_t holds."""

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`: where log(alpha^2 / sigma^2) has that value."""

    @abstractmethod
    def previous(self, t: Tensor) -> Tensor:
        """The time one step of the chain before t."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told in place of t, float32."""

    @abstractmethod
    def sample_times(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Times to train on, uniform over the chain, (count,), float64."""

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2); infinite at t = 0."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())

    def perturb(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Diffuses clean data to time t: a sample of q(x_t | x_0).

        Args:
            x0: Clean data, (B, ...), in [-1, 1].
            eps: Standard normal noise in the shape of x0.
            t: Times, () or (B,).

        Raises:
            ValueError: If t and x0 disagree on B.

        Source: Ho et al. 2020, eq. 4.
        """
        alpha, sigma = self.alpha_sigma(t)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * eps

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_ts, sigma_ts^2) of q(x_t | x_s), for s <= t."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t), self.alpha_sigma(s)
        alpha_ts = alpha_t / alpha_s
        return alpha_ts, (sigma_t**2 - alpha_ts**2 * sigma_s**2).clamp(min=0)

    def posterior(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, c^2) of q(x_s | x_t, x_0) = N(a x_t + b x_0, c^2), for s < t.

        Source: Ho et al. 2020, eqs. 6 and 7, for any pair of times.
        """
        alpha_ts, variance_ts = self.transition(t, s)
        (alpha_s, sigma_s), (_, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        a = alpha_ts * (sigma_s / sigma_t) ** 2
        b = alpha_s * variance_ts / sigma_t**2
        return a, b, variance_ts * (sigma_s / sigma_t) ** 2


class DiscreteProcess(Process):
    """The variance-preserving chain of DDPM: alpha_t^2 = alpha_bar_t, sigma_t^2 = 1 - alpha_bar_t.

    Only the T + 1 times k / T exist. A time is rounded to the nearest of them and never interpolated;
    k = 0 is clean data, alpha_bar_0 = 1. The tables are private float64 tensors: no buffer and no parameter,
    so that nothing casts or averages them.

    Args:
        num_steps: T, at least 1.
        schedule: Gives beta_1 .. beta_T.
        network_steps: The network is told of time as if the chain had this many steps, (k - 1) network_steps / T;
            None: T, which is to say k - 1. The improved DDPM's code says 1000 whatever T is, but for its
            class-conditional and upsampling models, whose network is told k - 1.

    Raises:
        ValueError: If num_steps or network_steps < 1, or a beta does not lie in (0, 1).

    Source: Ho et al. 2020, section 2.
    """

    def __init__(self, num_steps: int = 1000, schedule: Schedule = Linear(), network_steps: int | None = None) -> None:
        if num_steps < 1:
            raise ValueError(f"process.num_steps={num_steps} must be at least 1; DDPM uses 1000")
        if network_steps is not None and network_steps < 1:
            raise ValueError(
                f"process.network_steps={network_steps} must be at least 1; leave it out to tell the network k - 1"
            )
        self.num_steps = num_steps
        self.schedule = schedule
        self.network_steps = network_steps
        betas = schedule.betas(num_steps)
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"{type(schedule).__name__} with {num_steps} steps has a beta outside (0, 1): "
                f"[{betas.min():.3g}, {betas.max():.3g}]"
            )
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)])
        self._tables = {torch.device("cpu"): torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()])}

    def index(self, t: Tensor) -> Tensor:
        """The table entry k of a time, int64, 0 .. T."""
        return (t * self.num_steps).round().long()

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._table(t.device)[:, self.index(t)]
        return alpha, sigma

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The time of the table entry whose log-SNR is nearest; never 0, where log-SNR is infinite."""
        k = torch.arange(1, self.num_steps + 1, device=log_snr.device, dtype=torch.float64)
        table = self.log_snr(k / self.num_steps)
        # Clamped because every entry is equally far from an infinite log-SNR.
        wanted = log_snr.to(torch.float64).clamp(table[-1], table[0])
        nearest = (table - wanted.unsqueeze(-1)).abs().argmin(-1)
        return k[nearest] / self.num_steps

    def previous(self, t: Tensor) -> Tensor:
        return (self.index(t) - 1).clamp(min=0) / torch.tensor(self.num_steps, dtype=torch.float64)

    def network_time(self, t: Tensor) -> Tensor:
        """The paper's index counted from zero, k - 1, rescaled where `network_steps` says so."""
        k = (self.index(t) - 1).to(torch.float32)
        return k if self.network_steps is None else k * (self.network_steps / self.num_steps)

    def sample_times(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        k = torch.randint(1, self.num_steps + 1, (count,), device=device, generator=generator)
        return k.to(torch.float64) / self.num_steps
