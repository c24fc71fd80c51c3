"""Grids: the times that a sampler visits.

A grid of S steps has S + 1 times, t_S > ... > t_1 >= t_0, of which t_0 is 0 unless `Grid.end` says another. On a chain
these are S distinct entries for any 1 <= S <= T: where a paper's rule rounds two times to one entry, the later one
moves up to the next free entry.
Continuous time is treated as a chain of 1 / first_time entries, without any rounding.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lit.diffusion.process import Process
from diffusion_lit.types import Part


class Grid(Part):
    """A rule that chooses S times of a process."""

    @abstractmethod
    def wanted(self, steps: int, process: Process) -> Tensor:
        """Returns S rising times above 0, float64, (S,), before they are moved to times that exist."""

    def end(self, process: Process) -> float:
        """The time that the last step leads to: 0, clean data."""
        return 0.0

    def __call__(self, steps: int, process: Process) -> Tensor:
        """Returns the times, falling, float64 on the CPU, (S + 1,); the last is `end`.

        Args:
            steps: S.
            process: The process, which says which times exist.

        Raises:
            ValueError: If S < 1 or the process has fewer than S distinct times.
        """
        most = process.num_steps
        if steps < 1 or (most is not None and steps > most):
            bound = "be at least 1" if most is None else f"lie in 1 .. {most}, the steps of the process"
            raise ValueError(f"sampler.steps={steps} must {bound}; set --model.sampler.steps {max(1, most or 1)}")
        times = process.at(self.wanted(steps, process))
        if not bool((times.diff() > 0).all()):
            raise ValueError(
                f"sampler.steps={steps} are too many for {type(self).__name__} on this process, whose first time is "
                f"{process.first_time:g}; set fewer --model.sampler.steps"
            )
        return torch.cat([times.flip(0), torch.tensor([self.end(process)], dtype=torch.float64)])


def length(process: Process) -> float:
    """Returns the number of entries, T; in continuous time 1 / first_time."""
    return 1 / process.first_time if process.num_steps is None else process.num_steps


def entries(positions: Tensor, process: Process, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """Rounds positions on a chain by the rule of a paper; in continuous time returns them unchanged."""
    return positions if process.num_steps is None else rule(positions)


class Uniform(Grid):
    """Every (T/S)-th time, from the first. Source: Song et al. 2021 (DDIM), appendix D.2."""

    def wanted(self, steps: int, process: Process) -> Tensor:
        total = length(process)
        return (entries(torch.arange(steps, dtype=torch.float64) * total / steps, process, torch.floor) + 1) / total


class Leading(Grid):
    """Every n-th time from entry 1 + offset, n = T/S rounded down; where S divides T and offset is 0, `Uniform`.

    With `offset=1, clean=false` it is the grid that latent diffusion and Stable Diffusion were published with. Where S
    does not divide T, sampling starts well below t = 1.

    Args:
        offset: Entries that are left out at the beginning, at least 0.
        clean: Whether the last step leads to clean data, or to the first time of the process, whose noise then stays
            in the result.

    Raises:
        ValueError: If the offset is below 0.

    Source: the code of Rombach et al. 2022; in diffusers, the spacing "leading", with `steps_offset` and
    `set_alpha_to_one`.
    """

    def __init__(self, offset: int = 0, clean: bool = True) -> None:
        if offset < 0:
            raise ValueError(f"grid: offset={offset} must be at least 0; latent diffusion has 1")
        self.offset = offset
        self.clean = clean

    def wanted(self, steps: int, process: Process) -> Tensor:
        total = length(process)
        width = entries(torch.tensor(total / steps, dtype=torch.float64), process, torch.floor)
        return (torch.arange(steps, dtype=torch.float64) * width + self.offset + 1) / total

    def end(self, process: Process) -> float:
        return 0.0 if self.clean else process.first_time


class Quadratic(Grid):
    """Squares of equally spaced numbers, up to 0.8 T: denser near clean data.

    The DDIM paper's choice for CIFAR-10. Sampling starts at 0.8 T with pure noise, which is close to x_t there for the
    linear schedule (alpha_bar 0.0015). For the cosine schedule it is not (0.093), and images keep that error, the more
    so the smaller eta is.

    Source: Song et al. 2021 (DDIM), appendix D.2, and its code.
    """

    def wanted(self, steps: int, process: Process) -> Tensor:
        total = length(process)
        # The square of a rounded root may fall just short of a whole number, which flooring would lose.
        positions = torch.linspace(0, (0.8 * total) ** 0.5, steps, dtype=torch.float64).square() + 1e-9
        return (entries(positions, process, torch.floor) + 1) / total


class Spanning(Grid):
    """Evenly spaced from the first time to the last, both included.

    Source: Nichol & Dhariwal 2021, section 4.
    """

    def wanted(self, steps: int, process: Process) -> Tensor:
        total = length(process)
        return (entries(torch.linspace(0, total - 1, steps, dtype=torch.float64), process, torch.round) + 1) / total


class Trailing(Grid):
    """Every (T/S)-th time, counted back from the last, so that sampling starts at pure noise.

    Source: Lin et al. 2024, table 2.
    """

    def wanted(self, steps: int, process: Process) -> Tensor:
        total = length(process)
        return entries(torch.arange(1, steps + 1, dtype=torch.float64) * total / steps, process, torch.round) / total


class LogSNR(Grid):
    """Evenly spaced in lambda = log(alpha / sigma), from the first time to the last.

    Args:
        lambda_min: Lower bound of lambda at the start of sampling, for schedules that end in nearly pure noise, where
            lambda falls far within a few steps. The authors start where the cosine schedule has -4.8; diffusers
            recommends -5.1.

    Raises:
        ValueError: If it is 0 or more, where x_t holds more signal than noise.

    Source: Lu et al. 2022 (DPM-Solver), section 3.4 and appendix D.4.
    """

    def __init__(self, lambda_min: float = -5.1) -> None:
        if not lambda_min < 0:
            raise ValueError(f"grid: lambda_min={lambda_min} must lie below 0; -5.1 is usual")
        self.lambda_min = lambda_min

    def wanted(self, steps: int, process: Process) -> Tensor:
        least, most = lambda_range(process)
        lambdas = torch.linspace(max(self.lambda_min, least), most, steps, dtype=torch.float64)
        return process.time_at(2 * lambdas).flip(0)


class Karras(Grid):
    """Evenly spaced in the rho-th root of sigma / alpha, between bounds that the process may narrow.

    Args:
        sigma_min: The least sigma / alpha.
        sigma_max: The largest sigma / alpha.
        rho: Exponent, in [1, 100]: 1 spaces evenly; larger values are denser near clean data.

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

    def wanted(self, steps: int, process: Process) -> Tensor:
        least, most = lambda_range(process)
        largest, smallest = min(self.sigma_max, math.exp(-least)), max(self.sigma_min, math.exp(-most))
        roots = torch.linspace(largest ** (1 / self.rho), smallest ** (1 / self.rho), steps, dtype=torch.float64)
        return process.time_at(-2 * self.rho * roots.log()).flip(0)


def lambda_range(process: Process) -> tuple[float, float]:
    """Returns lambda = log(alpha / sigma) at the last time and at the first one above 0."""
    ends = torch.tensor([1, process.first_time], dtype=torch.float64)
    least, most = (process.log_snr(ends) / 2).tolist()
    return least, most
