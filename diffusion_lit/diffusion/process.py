"""Forward processes q, which turn data into noise.

    x_t = alpha(t) x_0 + sigma(t) eps,    eps ~ N(0, I),    t in [0, 1]

t = 0 is clean data. For s < t the process is Gaussian and Markov:

    q(x_t | x_s)      = N(alpha_ts x_s, sigma_ts^2),   alpha_ts = alpha_t / alpha_s,
                                                       sigma_ts^2 = sigma_t^2 - alpha_ts^2 sigma_s^2
    q(x_s | x_t, x_0) = N(a x_t + b x_0, c^2),         a = alpha_ts sigma_s^2 / sigma_t^2,
                                                       b = alpha_s sigma_ts^2 / sigma_t^2,
                                                       c^2 = sigma_ts^2 sigma_s^2 / sigma_t^2
"""

from abc import abstractmethod

import torch
from torch import Tensor

from diffusion_lit.diffusion.schedule import Linear, Schedule
from diffusion_lit.types import Part

MOST_STEPS = 1_000_000
"""Entries of the longest chain; tables of this length take megabytes."""


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shapes a coefficient, (), (B,) or already that of x, so that it multiplies x, (B, ...), in the dtype of x."""
    if coefficient.ndim != 1:
        return coefficient.to(x.dtype)
    if coefficient.shape[0] != x.shape[0]:
        raise ValueError(f"{coefficient.shape[0]} times for a batch of {x.shape[0]}: give one t for each image")
    return coefficient.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class Process(Part):
    """A Gaussian diffusion process, given by alpha(t) and sigma(t).

    Times are tensors of shape () or (B,). Coefficients are float64, in the shape of t.

    Attributes:
        num_steps: T of a chain, on which only the times k / T exist; None: time is continuous.
        prior_std: Standard deviation of x_1, from which sampling starts.
        first_time: The least time above 0; noise levels below it are not defined.
    """

    num_steps: int | None = None
    prior_std: float = 1.0
    first_time: float

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scale of the data and the standard deviation of the noise in x_t."""

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """Returns the time at which log(alpha^2 / sigma^2) has the given value: the inverse of `log_snr`."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """Returns the time in the network's units, float32."""

    def at(self, times: Tensor) -> Tensor:
        """Moves wanted times to times that exist.

        Args:
            times: Wanted times, rising, float64, (S,).

        Returns:
            In continuous time the same, clamped to [first_time, 1]; on a chain S distinct entries.
        """
        return times.clamp(self.first_time, 1.0)

    def log_snr(self, t: Tensor) -> Tensor:
        """Returns log(alpha^2 / sigma^2); infinite at t = 0."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())

    def perturb(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Draws from q(x_t | x_0).

        Args:
            x0: Clean data, (B, ...).
            eps: Noise of mean 0 and variance 1, in the shape of x0.
            t: Times, () or (B,).

        Raises:
            ValueError: If t and x0 disagree on B.

        Source: Ho et al. 2020, eq. 4.
        """
        alpha, sigma = self.alpha_sigma(t)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * eps

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (alpha_ts, sigma_ts^2) of q(x_t | x_s), for s <= t."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t), self.alpha_sigma(s)
        alpha_ts = alpha_t / alpha_s
        return alpha_ts, (sigma_t**2 - alpha_ts**2 * sigma_s**2).clamp(min=0)

    def posterior(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (a, b, c^2) of q(x_s | x_t, x_0) = N(a x_t + b x_0, c^2), for s < t.

        Source: Ho et al. 2020, eqs. 6 and 7, for any pair of times.
        """
        alpha_ts, variance_ts = self.transition(t, s)
        (alpha_s, sigma_s), (_, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        a = alpha_ts * (sigma_s / sigma_t) ** 2
        b = alpha_s * variance_ts / sigma_t**2
        return a, b, variance_ts * (sigma_s / sigma_t) ** 2


class DiscreteProcess(Process):
    """The variance-preserving chain of DDPM: alpha_t^2 = alpha_bar_t, sigma_t^2 = 1 - alpha_bar_t.

    Only the T + 1 times k / T exist; every time is rounded to the nearest of them. k = 0 is clean data, with
    alpha_bar_0 = 1. The tables are private float64 tensors, neither buffers nor parameters, so that nothing casts or
    averages them.

    Args:
        num_steps: T, at least 1.
        schedule: Noise schedule, which gives beta_1 .. beta_T.
        network_steps: Length of the chain in the network's units of time: the network receives
            (k - 1) network_steps / T; None: T, so that it receives k - 1. The code of the improved DDPM uses 1000 for
            every T, except in its class-conditional and upsampling models, where the network receives k - 1.

    Raises:
        ValueError: If num_steps or network_steps < 1 or num_steps > `MOST_STEPS`, or a beta does not lie in (0, 1).

    Source: Ho et al. 2020, section 2.
    """

    num_steps: int

    def __init__(self, num_steps: int = 1000, schedule: Schedule = Linear(), network_steps: int | None = None) -> None:
        if not 1 <= num_steps <= MOST_STEPS:
            raise ValueError(f"process.num_steps={num_steps} must lie in 1 .. {MOST_STEPS}; DDPM uses 1000")
        if network_steps is not None and network_steps < 1:
            raise ValueError(
                f"process.network_steps={network_steps} must be at least 1; leave it out to give the network k - 1"
            )
        self.num_steps = num_steps
        self.first_time = 1 / num_steps
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
        """Returns the table entry k of a time, int64, in 0 .. T."""
        return (t * self.num_steps).round().long()

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._table(t.device)[:, self.index(t)]
        return alpha, sigma

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Returns the time of the table entry with the nearest log-SNR; never 0, where the log-SNR is infinite."""
        k = torch.arange(1, self.num_steps + 1, device=log_snr.device, dtype=torch.float64)
        table = self.log_snr(k / self.num_steps)
        # Clamped because every entry is equally far from an infinite log-SNR.
        wanted = log_snr.to(torch.float64).clamp(table[-1], table[0])
        nearest = (table - wanted.unsqueeze(-1)).abs().argmin(-1)
        return k[nearest] / self.num_steps

    def at(self, times: Tensor) -> Tensor:
        """Moves wanted times to the nearest entries; a time whose entry is taken moves up to the next free one.

        Args:
            times: S wanted times, rising, float64, (S,), S <= T.

        Returns:
            S distinct entries above 0, rising, float64, (S,).
        """
        most, entries = self.num_steps - len(times), [0]
        for i, k in enumerate(self.index(times).tolist(), start=1):
            entries.append(min(max(k, entries[-1] + 1), most + i))
        return torch.tensor(entries[1:], dtype=torch.float64) / self.num_steps

    def previous(self, t: Tensor) -> Tensor:
        """Returns the time one step of the chain before t; 0 for 0."""
        return (self.index(t) - 1).clamp(min=0) / torch.tensor(self.num_steps, dtype=torch.float64)

    def network_time(self, t: Tensor) -> Tensor:
        """Returns the paper's index counted from zero, k - 1, rescaled to `network_steps` if that is given."""
        k = (self.index(t) - 1).to(torch.float32)
        return k if self.network_steps is None else k * (self.network_steps / self.num_steps)


class VariancePreserving(Process):
    """The variance-preserving SDE, the limit of DDPM's chain: beta(t) = beta_min + t (beta_max - beta_min).

        alpha(t) = exp(-t^2 / 4 (beta_max - beta_min) - t / 2 beta_min),    sigma(t)^2 = 1 - alpha(t)^2

    The network receives 999 t, as in the authors' code.

    Args:
        beta_min: beta(0), above 0.
        beta_max: beta(1), at least beta_min.
        first_time: The least time of training and sampling, in (0, 1). The authors train from 1e-5 and sample from
            1e-3.

    Raises:
        ValueError: If an argument is out of range.

    Source: Song et al. 2021 (score SDE), eq. 33, and its code.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, first_time: float = 1e-5) -> None:
        if not 0 < beta_min <= beta_max or not 0 < first_time < 1:
            raise ValueError(
                f"process: 0 < beta_min={beta_min} <= beta_max={beta_max} and 0 < first_time={first_time} < 1 must "
                "hold; the paper has 0.1, 20 and 1e-5"
            )
        self.beta_min = beta_min
        self.beta_max = beta_max
        self.first_time = first_time

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(torch.float64)
        log_alpha = -t.square() / 4 * (self.beta_max - self.beta_min) - t / 2 * self.beta_min
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def time_at(self, log_snr: Tensor) -> Tensor:
        log_snr = log_snr.to(torch.float64)
        # -2 log(alpha), by alpha^2 = sigmoid(log_snr); then the positive root of a quadratic, in its stable form.
        c = torch.logaddexp(torch.zeros_like(log_snr), -log_snr)
        return 2 * c / (self.beta_min + (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * c).sqrt())

    def network_time(self, t: Tensor) -> Tensor:
        return (999 * t).to(torch.float32)


class VarianceExploding(Process):
    """Noise is added to data that are not scaled: alpha(t) = 1, sigma(t) = sigma_max t.

    Time is EDM's sigma in units of sigma_max. The network receives sigma, unless the parameterization says otherwise.

    Args:
        sigma_min: The least sigma of training and sampling, above 0.
        sigma_max: The largest sigma, from which sampling starts.

    Raises:
        ValueError: If not 0 < sigma_min < sigma_max.

    Source: Karras et al. 2022 (EDM), table 1.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"process: 0 < sigma_min={sigma_min} < sigma_max={sigma_max} must hold; the paper has 0.002 and 80"
            )
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.prior_std = sigma_max
        self.first_time = sigma_min / sigma_max

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(torch.float64)
        return torch.ones_like(t), self.sigma_max * t

    def time_at(self, log_snr: Tensor) -> Tensor:
        return (log_snr.to(torch.float64) / -2).exp() / self.sigma_max

    def network_time(self, t: Tensor) -> Tensor:
        return (self.sigma_max * t).to(torch.float32)


def require_chain(process: Process, name: str) -> DiscreteProcess:
    """Returns the process if it is a chain of steps.

    Args:
        process: Any process.
        name: What needs a chain, for the message.

    Raises:
        ValueError: If time is continuous.
    """
    if not isinstance(process, DiscreteProcess):
        raise ValueError(
            f"{name} is defined on a chain of steps and {type(process).__name__} has continuous time; "
            "set --model.process DiscreteProcess"
        )
    return process
