"""Which of a process's times a sampler visits.

A grid of S steps holds S + 1 times, t_S > ... > t_1 > t_0 = 0. It visits exactly S distinct table entries for
any 1 <= S <= T: where a paper's rule rounds two times to one, the later moves up to the next free entry.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lit.diffusion.process import DiscreteProcess


class Grid(ABC):
    """A rule that chooses S of T times."""

    @abstractmethod
    def positions(self, steps: int, process: DiscreteProcess) -> Tensor:
        """S rising positions in the papers' indices 0 .. T - 1, float64, before rounding down."""

    def __call__(self, steps: int, process: DiscreteProcess) -> Tensor:
        """The times, falling, float64 on the CPU, (S + 1,); the last is 0.

        Args:
            steps: S.
            process: Gives T.

        Raises:
            ValueError: If not 1 <= S <= T.
        """
        total = process.num_steps
        if not 1 <= steps <= total:
            raise ValueError(
                f"sampler.steps={steps} must lie in 1 .. {total}, the steps of the process; "
                f"set --model.sampler.init_args.steps to at most {total}"
            )
        wanted = self.positions(steps, process).floor().long().tolist()
        indices: list[int] = []
        for i, index in enumerate(wanted):
            lowest = indices[-1] + 1 if indices else 0
            indices.append(min(max(index, lowest), total - steps + i))
        times = (torch.tensor(indices, dtype=torch.float64) + 1) / total
        return torch.cat([times.flip(0), torch.zeros(1, dtype=torch.float64)])


class Uniform(Grid):
    """Every (T/S)-th time, from the first. Source: Song et al. 2021 (DDIM), appendix D.2."""

    def positions(self, steps: int, process: DiscreteProcess) -> Tensor:
        return torch.arange(steps, dtype=torch.float64) * process.num_steps / steps


class Quadratic(Grid):
    """Squares of equally spaced numbers up to 0.8 T: denser near clean data.

    The DDIM paper's choice for CIFAR-10. Sampling begins at pure noise, which its linear schedule is close to at 0.8 T
    (alpha_bar 0.0015). The cosine schedule is not (0.093): images keep that error, the more so the smaller eta.
    Source: Song et al. 2021 (DDIM), appendix D.2, and its code.
    """

    def positions(self, steps: int, process: DiscreteProcess) -> Tensor:
        # The square of a rounded root may fall just short of a whole number, which flooring would lose.
        return torch.linspace(0, (0.8 * process.num_steps) ** 0.5, steps, dtype=torch.float64).square() + 1e-9


class Spanning(Grid):
    """Evenly spaced from the first time to the last, both included.

    Source: Nichol & Dhariwal 2021, section 4.
    """

    def positions(self, steps: int, process: DiscreteProcess) -> Tensor:
        return torch.linspace(0, process.num_steps - 1, steps, dtype=torch.float64).round()


class Trailing(Grid):
    """Every (T/S)-th time, counted back from the last, so that sampling starts at pure noise.

    Source: Lin et al. 2024, table 2.
    """

    def positions(self, steps: int, process: DiscreteProcess) -> Tensor:
        return (torch.arange(1, steps + 1, dtype=torch.float64) * process.num_steps / steps).round() - 1


class LogSNR(Grid):
    """Evenly spaced in lambda = log(alpha / sigma), from the first time to the last.

    Args:
        lambda_min: Where to begin at the least, for schedules that end in nearly pure noise: there, lambda falls far in
            few times. The authors begin where the cosine schedule has -4.8; diffusers recommends -5.1.

    Raises:
        ValueError: If it is 0 or more, where more of the image is left than there is noise.

    Source: Lu et al. 2022 (DPM-Solver), section 3.4 and appendix D.4.
    """

    def __init__(self, lambda_min: float = -5.1) -> None:
        if not lambda_min < 0:
            raise ValueError(f"grid: lambda_min={lambda_min} must lie below 0; -5.1 is usual")
        self.lambda_min = lambda_min

    def positions(self, steps: int, process: DiscreteProcess) -> Tensor:
        least, most = half_log_snr_range(process)
        return entries_at(torch.linspace(max(self.lambda_min, least), most, steps, dtype=torch.float64), process)


class Karras(Grid):
    """Evenly spaced in the rho-th root of sigma / alpha, between bounds that the process may narrow.

    Args:
        sigma_min: The least sigma / alpha.
        sigma_max: The largest.
        rho: 1 spaces evenly; the larger, the denser near clean data.

    Raises:
        ValueError: If not 0 < sigma_min < sigma_max, or rho lies outside [1, 100].

    Source: Karras et al. 2022 (EDM), eq. 5 and table 1.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min < sigma_max or not 1 <= rho <= 100:
            raise ValueError(
                f"grid: 0 < sigma_min={sigma_min} < sigma_max={sigma_max} and 1 <= rho={rho} <= 100 must hold; "
                "the paper has 0.002, 80 and 7"
            )
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho

    def positions(self, steps: int, process: DiscreteProcess) -> Tensor:
        least, most = half_log_snr_range(process)
        largest, smallest = min(self.sigma_max, math.exp(-least)), max(self.sigma_min, math.exp(-most))
        roots = torch.linspace(largest ** (1 / self.rho), smallest ** (1 / self.rho), steps, dtype=torch.float64)
        return entries_at(-self.rho * roots.log(), process)


def half_log_snr_range(process: DiscreteProcess) -> tuple[float, float]:
    """Lambda = log(alpha / sigma) at the last time and at the first above 0."""
    ends = torch.tensor([1, 1 / process.num_steps], dtype=torch.float64)
    least, most = (process.log_snr(ends) / 2).tolist()
    return least, most


def entries_at(half_log_snr: Tensor, process: DiscreteProcess) -> Tensor:
    """The papers' indices nearest to values of lambda that rise, in rising order."""
    return (process.time_at(2 * half_log_snr) * process.num_steps).round().flip(0) - 1
