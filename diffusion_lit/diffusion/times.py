"""Training times: where on the process an objective measures its error."""

from abc import abstractmethod

import torch
from torch import Tensor

from diffusion_lit.diffusion.process import Process
from diffusion_lit.types import Part


class Times(Part):
    """A distribution of training times.

    Attributes:
        learns: Whether the distribution depends on earlier losses, so that `update` must be called.
    """

    learns: bool = False

    @abstractmethod
    def draw(
        self, count: int, process: Process, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draws times.

        Args:
            count: Number of times, B.
            process: The process, which says which times exist.
            device: Device of the result.
            generator: Source of randomness; torch's global one by default.

        Returns:
            Times in [first_time, 1], float64, (B,), and importance weights of the losses there, float64, (B,), or
            None for weights of 1.

        Raises:
            ValueError: If the process has no such distribution.
        """

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learns from losses.

        Args:
            t: Times that were drawn, (n,).
            losses: Losses there, without importance weights, (n,).
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all that was learned, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""


class UniformTimes(Times):
    """Uniform over the T entries of a chain, or over [first_time, 1] in continuous time, up to `last`.

    Args:
        last: Largest time, in (0, 1]. A model that is trained up to a time below 1 can only be used from there on down,
            as anomaly detection and editing do.

    Raises:
        ValueError: If `last` is out of range.

    Source: Ho et al. 2020, algorithm 1; Song et al. 2021 (score SDE), eq. 7.
    """

    def __init__(self, last: float = 1.0) -> None:
        if not 0 < last <= 1:
            raise ValueError(f"times.last={last} must lie in (0, 1]; 1 trains at all times")
        self.last = last

    def draw(
        self, count: int, process: Process, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if process.num_steps is None:
            u = torch.rand(count, dtype=torch.float64, device=device, generator=generator)
            return process.first_time + (max(self.last, process.first_time) - process.first_time) * u, None
        most = max(int(round(self.last * process.num_steps, 6)), 1)
        k = torch.randint(1, most + 1, (count,), device=device, generator=generator)
        return k.to(torch.float64) / process.num_steps, None


class EvenTimes(Times):
    """Uniform over i / N, i = 1 .. N: the times of the grid `Trailing` with N steps.

    Args:
        steps: N, at least 1.

    Raises:
        ValueError: If N < 1.

    Source: Salimans & Ho 2022, algorithm 2.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"times.steps={steps} must be at least 1")
        self.steps = steps

    def draw(
        self, count: int, process: Process, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if process.num_steps is not None and process.num_steps % self.steps:
            raise ValueError(
                f"times.steps={self.steps} does not divide the {process.num_steps} steps of the process; take a divisor"
            )
        i = torch.randint(1, self.steps + 1, (count,), device=device, generator=generator)
        return i.to(torch.float64) / self.steps, None


class LogNormal(Times):
    """Noise levels sigma / alpha whose logarithm is normal; those outside the process are moved to its ends.

    Args:
        mean: Mean of log(sigma / alpha).
        std: Standard deviation of log(sigma / alpha), above 0.

    Raises:
        ValueError: If `std` is not above 0.

    Source: Karras et al. 2022 (EDM), table 1.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        if not std > 0:
            raise ValueError(f"times.std={std} must be above 0; EDM uses 1.2")
        self.mean = mean
        self.std = std

    def draw(
        self, count: int, process: Process, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        normal = torch.randn(count, dtype=torch.float64, device=device, generator=generator)
        t = process.time_at(-2 * (self.mean + self.std * normal))
        return t.clamp(process.first_time, 1.0), None
