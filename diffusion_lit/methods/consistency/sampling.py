"""The parameterization with its boundary condition, and sampling in one or several steps."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lit.diffusion import Grid, Karras, Preconditioned, Process, Sampler
from diffusion_lit.diffusion.parameterization import Coefficients
from diffusion_lit.diffusion.process import expand
from diffusion_lit.diffusion.samplers import NoiseFn
from diffusion_lit.types import DenoiseFn


def least_level(process: Process) -> Tensor:
    """Returns sigma / alpha at the first time of a process, the paper's epsilon; float64, ()."""
    alpha, sigma = process.alpha_sigma(torch.tensor(process.first_time, dtype=torch.float64))
    return sigma / alpha


class Boundary(Preconditioned):
    """EDM's preconditioning, changed so that f(x, t) = x at the first time of the process, exactly.

        x_0 = c_skip(s) y + c_out(s) F(c_in(s) y),    y = x_t / alpha,  s = sigma / alpha,  d = sigma_data
        c_skip = d^2 / ((s - s_min)^2 + d^2),  c_out = (s - s_min) d / sqrt(s^2 + d^2),  c_in = 1 / sqrt(s^2 + d^2)

    Args:
        sigma_data: Standard deviation d of the data, above 0.
        time_scale: The network receives time_scale log(s): 0.25 as in EDM and the paper's JAX code, or 250 as in its
            PyTorch code, for networks whose embedding expects steps of a chain.

    Raises:
        ValueError: If `sigma_data` is not above 0.

    Source: Song et al. 2023, appendix C.
    """

    def __init__(self, sigma_data: float = 0.5, time_scale: float = 0.25) -> None:
        super().__init__(sigma_data)
        self.time_scale = time_scale

    def coefficients(self, process: Process, t: Tensor) -> Coefficients:
        alpha, sigma = process.alpha_sigma(t)
        s, d = sigma / alpha, self.sigma_data
        above = s - least_level(process).to(s.device)
        skip, out = d**2 / (above**2 + d**2), above * d / (s**2 + d**2).sqrt()
        return Coefficients(skip / alpha, out, (1 - skip) / sigma, -alpha / sigma * out)

    def network_time(self, process: Process, t: Tensor) -> Tensor:
        return (process.log_snr(t) * (-self.time_scale / 2)).to(torch.float32)


class Listed(Grid):
    """Times that a list gives.

    Attributes:
        count: Their number, the network evaluations of `Multistep`.
    """

    count: int

    def wanted(self, steps: int, process: Process) -> Tensor:
        if steps != self.count:
            raise ValueError(
                f"sampler.steps={steps}, but the list of times has {self.count} before its last; leave steps null"
            )
        return self.listed(process).flip(0)

    @abstractmethod
    def listed(self, process: Process) -> Tensor:
        """Returns the times, falling, float64, (count,)."""


class Levels(Listed):
    """Levels of a grid by their index, from 0, the noisiest, as the authors' code counts them.

    Args:
        levels: N, the levels of the grid, at least 2.
        indices: Rising, from 0 to N - 1. Nothing is evaluated at the last one, which is the end of sampling.
        grid: Spaces the levels.

    Raises:
        ValueError: If the indices do not rise from 0 to N - 1.

    Source: Song et al. 2023, algorithm 1, and its code.
    """

    def __init__(self, levels: int = 40, indices: Sequence[int] = (0, 22, 39), grid: Grid = Karras()) -> None:
        self.levels = levels
        self.indices = list(indices)
        self.grid = grid
        self.count = len(self.indices) - 1
        rises = all(a < b for a, b in zip(self.indices, self.indices[1:], strict=False))
        if self.count < 1 or not rises or self.indices[0] != 0:
            raise ValueError(f"grid.indices={self.indices} must rise from 0 to the last level, {levels - 1}")
        if self.indices[-1] != levels - 1:
            raise ValueError(
                f"grid.indices={self.indices} must end at the last level, {levels - 1}: a list that ends before leaves "
                f"noise in the images; append {levels - 1}"
            )

    def listed(self, process: Process) -> Tensor:
        return self.grid(self.levels, process)[self.indices[:-1]]


class Sigmas(Listed):
    """Noise levels sigma / alpha by their values.

    Args:
        sigmas: Falling, to the least level of the process or 0. Nothing is evaluated at the last one.

    Raises:
        ValueError: If they do not fall, or, when used, if they do not end at the least level of the process.
    """

    def __init__(self, sigmas: Sequence[float] = (80.0, 0.821, 0.002)) -> None:
        self.sigmas = list(sigmas)
        self.count = len(self.sigmas) - 1
        falls = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        if self.count < 1 or not falls or self.sigmas[-1] < 0:
            raise ValueError(f"grid.sigmas={self.sigmas} must be at least 2 falling noise levels, such as [80, 0.002]")

    def listed(self, process: Process) -> Tensor:
        least = float(least_level(process))
        if self.sigmas[-1] > least * (1 + 1e-6):
            raise ValueError(
                f"grid.sigmas={self.sigmas} must end at the last level, {least:g}: a list that ends before leaves "
                f"noise in the images; append {least:g}"
            )
        return process.time_at(-2 * torch.tensor(self.sigmas[:-1], dtype=torch.float64).log())


class Even(Grid):
    """The levels of a grid of S + 1, but for the last, at which nothing is left to do."""

    def wanted(self, steps: int, process: Process) -> Tensor:
        return Karras().wanted(steps + 1, process)[1:]


class Multistep(Sampler):
    """Alternates between an image, by one evaluation, and noise of the next level on it.

        x <- f(x, t_1);    for each further time: x <- f(alpha (x + sqrt(s^2 - s_min^2) z), t),  s = sigma / alpha

    Args:
        steps: Number of evaluations, S. None: as many as `grid` lists, or 1.
        grid: The times: `Levels` by index, or `Sigmas` by noise level. None: evenly spaced as `Karras` does.
        clip: Whether predictions are clipped to [-1, 1].

    Raises:
        ValueError: If steps < 1. Whether a list fits is checked by `times`.

    Source: Song et al. 2023, algorithm 1.
    """

    def __init__(self, steps: int | None = None, grid: Listed | None = None, clip: bool = True) -> None:
        super().__init__(steps, grid or Even(), clip)

    def num_intervals(self, process: Process) -> int:
        """Returns the number of evaluations."""
        return getattr(self.grid, "count", 1) if self.steps is None else self.steps

    def step(
        self, denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, s: Tensor, noise: NoiseFn
    ) -> tuple[Tensor, Tensor]:
        x0 = denoise(x_t, t).x0
        if s == 0:
            return x0, x0
        alpha, sigma = process.alpha_sigma(s)
        added = (sigma**2 - (alpha * least_level(process)) ** 2).clamp(min=0).sqrt()
        return expand(alpha, x0) * x0 + expand(added, x0) * noise(), x0
