"""The two times that a consistency loss compares, and how they move together while training goes on."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from diffusion_lit.diffusion import Grid, Karras, LogNormal, Process, Times
from diffusion_lit.types import Part


class Curriculum(Part):
    """The number of noise levels, N, by training step k, counted from 0."""

    first: int
    """The number s_0 that `decay` refers to."""

    @property
    @abstractmethod
    def most(self) -> int:
        """The largest N."""

    @abstractmethod
    def levels(self, step: int) -> int:
        """Returns N(k), at least 2."""

    def decay(self, mu: float, step: int) -> float:
        """Returns the decay of the target's average, mu(k) = exp(s_0 log(mu) / N(k)); `mu` itself where N = s_0.

        The authors' code divides by N(k) - 1 instead.

        Source: Song et al. 2023, section 6.1.
        """
        return 0.0 if mu == 0 else math.exp(self.first * math.log(mu) / self.levels(step))


class Fixed(Curriculum):
    """The same N throughout, as for distillation.

    Args:
        levels: N, at least 2.

    Raises:
        ValueError: If N is below 2.
    """

    def __init__(self, levels: int = 18) -> None:
        if levels < 2:
            raise ValueError(f"curriculum.levels={levels} must be at least 2; the paper has 18 for CIFAR-10")
        self.first = levels

    @property
    def most(self) -> int:
        return self.first

    def levels(self, step: int) -> int:
        return self.first


class SquareRoot(Curriculum):
    """N(k) = ceil(sqrt(k / K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1, from s_0 to s_1 + 1 levels.

    Args:
        first: s_0, at least 2.
        last: s_1, at least s_0.
        steps: K, the number of training steps.

    Raises:
        ValueError: If a number is out of range.

    Source: Song et al. 2023, section 6.1.
    """

    def __init__(self, first: int = 2, last: int = 150, steps: int = 800_000) -> None:
        if not 2 <= first <= last or steps < 1:
            raise ValueError(
                f"curriculum: 2 <= first={first} <= last={last} and steps={steps} >= 1 must hold; the paper has 2, 150 "
                "and 800000 for CIFAR-10"
            )
        self.first = first
        self.last = last
        self.steps = steps

    @property
    def most(self) -> int:
        return self.last + 1

    def levels(self, step: int) -> int:
        # Whole numbers throughout: ceil(sqrt(a / K)) is the least n with n^2 >= a / K.
        a = min(step, self.steps) * ((self.last + 1) ** 2 - self.first**2) + self.steps * self.first**2
        return math.isqrt(-(-a // self.steps) - 1) + 1


class Doubling(Curriculum):
    """N(k) - 1 = min(s_0 2^floor(k / K'), s_1) intervals, with K' = floor(K / (log2 floor(s_1 / s_0) + 1)).

    Args:
        first: s_0, the intervals of the first stage, at least 1.
        last: s_1, the intervals of the last stage, at least s_0.
        steps: K, the number of training steps.

    Raises:
        ValueError: If a number is out of range.

    Source: Song & Dhariwal 2024 (iCT), section 3.4.
    """

    def __init__(self, first: int = 10, last: int = 1280, steps: int = 400_000) -> None:
        if not 1 <= first <= last or steps < 1:
            raise ValueError(
                f"curriculum: 1 <= first={first} <= last={last} and steps={steps} >= 1 must hold; the paper has 10, "
                "1280 and 400000 for CIFAR-10"
            )
        self.first = first
        self.last = last
        self.steps = steps
        self.stage_steps = max(int(steps / (math.log2(last // first) + 1)), 1)

    @property
    def most(self) -> int:
        return self.last + 1

    def levels(self, step: int) -> int:
        # Bounded, as 2^(k / K') need not be: after the last stage nothing changes.
        stage = min(step // self.stage_steps, self.last.bit_length())
        return min(self.first << stage, self.last) + 1


class Pairs(Times):
    """Draws the later time t of a pair; the earlier time r is a function of it.

    Attributes:
        step: Number of training steps done, k; the objective counts them.
    """

    step: int = 0

    def check(self, process: Process) -> None:
        """Raises ValueError if the process has no such pairs."""

    @abstractmethod
    def before(self, t: Tensor, process: Process) -> Tensor:
        """Returns the earlier times, in [0, 1], in the shape of t, (B,); at 0 the data are the target."""

    def decay(self, mu: float) -> float:
        """Returns the decay of the target's average in this step."""
        return mu


class Neighbors(Pairs):
    """Neighbouring levels of a grid of N(k) levels.

    Args:
        curriculum: Gives N(k).
        grid: Spaces the levels, from the first time of the process to the last.
        noise: Distribution of log(sigma / alpha), of which level i gets what lies between it and the next:
            p_i ~ erf((log s_(i+1) - mean) / (sqrt(2) std)) - erf((log s_i - mean) / (sqrt(2) std)). None: all pairs are
            equally likely.

    Source: Song et al. 2023, algorithms 2 and 3; Song & Dhariwal 2024 (iCT), section 3.5, for `noise`.
    """

    def __init__(self, curriculum: Curriculum = Fixed(), grid: Grid = Karras(), noise: LogNormal | None = None) -> None:
        self.curriculum = curriculum
        self.grid = grid
        self.noise = noise
        self._levels: dict[tuple[int, torch.device], Tensor] = {}

    def check(self, process: Process) -> None:
        """Raises ValueError if the process has fewer times than levels."""
        if process.num_steps is not None and self.curriculum.most > process.num_steps:
            raise ValueError(
                f"objective.pairs: {self.curriculum.most} levels exceed the {process.num_steps} steps of the process; "
                f"lower those of --model.objective.pairs.curriculum to at most {process.num_steps}"
            )

    def levels(self, process: Process, device: torch.device | str = "cpu") -> Tensor:
        """Returns the times of the current levels, rising, float64, (N,)."""
        key = self.curriculum.levels(self.step), torch.device(device)
        if key not in self._levels:
            self._levels = {key: self.grid(key[0], process)[:-1].flip(0).to(device)}
        return self._levels[key]

    def draw(
        self, count: int, process: Process, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        levels = self.levels(process, device)
        if self.noise is None:
            i = torch.randint(1, len(levels), (count,), device=device, generator=generator)
        else:
            i = 1 + torch.multinomial(self.shares(process).to(device), count, replacement=True, generator=generator)
        return levels[i], None

    def shares(self, process: Process) -> Tensor:
        """Returns the probability of each pair, from the lowest level up, float64, (N - 1,)."""
        levels = self.levels(process)
        if self.noise is None:
            return torch.full((len(levels) - 1,), 1 / (len(levels) - 1), dtype=torch.float64)
        z = (-process.log_snr(levels) / 2 - self.noise.mean) / (math.sqrt(2) * self.noise.std)
        weights = torch.erf(z).diff()
        return weights / weights.sum()

    def before(self, t: Tensor, process: Process) -> Tensor:
        levels = self.levels(process, t.device)
        return levels[(torch.searchsorted(levels, t.contiguous()) - 1).clamp(min=0)]

    def decay(self, mu: float) -> float:
        return self.curriculum.decay(mu, self.step)


class Shrinking(Pairs):
    """Log-normal s = sigma / alpha, and an earlier level that draws nearer stage by stage.

        r = s max(0, 1 - q^-(stage + 1) (1 + 8 sigmoid(-s)))

    Args:
        noise: Distribution of log(s); by default with mean -1.1 and standard deviation 2.
        q: Factor by which the gap shrinks from stage to stage, above 1.
        stage_steps: Training steps in a stage, at least 1.

    Raises:
        ValueError: If a number is out of range.

    Source: Geng et al. 2025 (ECT), section 3.2, and its code.
    """

    def __init__(self, noise: LogNormal | None = None, q: float = 2.0, stage_steps: int = 25_000) -> None:
        if not q > 1 or stage_steps < 1:
            raise ValueError(
                f"objective.pairs: q={q} > 1 and stage_steps={stage_steps} >= 1 must hold; the paper has 2 and 25000 "
                "for CIFAR-10"
            )
        self.noise = LogNormal(-1.1, 2.0) if noise is None else noise
        self.q = q
        self.stage_steps = stage_steps

    def draw(
        self, count: int, process: Process, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return self.noise.draw(count, process, device, generator)

    def before(self, t: Tensor, process: Process) -> Tensor:
        s = (-process.log_snr(t) / 2).exp()
        gap = self.q ** -(self.step // self.stage_steps + 1.0)
        r = s * (1 - gap * (1 + 8 * torch.sigmoid(-s))).clamp(min=0)
        return torch.where(r > 0, process.time_at(-2 * r.log()), 0.0)
