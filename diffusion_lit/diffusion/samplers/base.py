"""The loop that all samplers share: from noise to data over a grid of times."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion_lit.diffusion.grid import Grid
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.types import DenoiseFn, Part, Prediction, StepFn

NoiseFn = Callable[[], Tensor]
"""Draws fresh standard normal noise in the shape of x."""

AmendFn = Callable[[Tensor, Tensor], Tensor]
"""(x_s, s) -> x_s: changes the sample after a step, such as to put in what is known of it."""

Step = Callable[[DenoiseFn, Tensor, Process, Tensor, Tensor, NoiseFn], tuple[Tensor, Tensor]]
"""One step of a sampler: see `Sampler.step`."""


@dataclass(frozen=True)
class State:
    """One point of a trajectory.

    Attributes:
        t: The time, a scalar.
        x_t: The sample at t, (B, ...).
        x0: The x_0 predicted from it, in the shape of x_t; x_t itself at the end.
    """

    t: Tensor
    x_t: Tensor
    x0: Tensor


def clip_x0(denoise: DenoiseFn, process: Process) -> DenoiseFn:
    """Clips the predicted x_0 to [-1, 1] and computes eps anew, so that the two agree."""

    def clipped(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        alpha, sigma = process.alpha_sigma(t)
        x0 = prediction.x0.clamp(-1, 1)
        eps = (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)
        return Prediction(x0=x0, eps=eps, extra=prediction.extra)

    return clipped


def start_std(process: Process, t: Tensor) -> float:
    """Returns the standard deviation of the noise that sampling starts from at time t: `prior_std` at t = 1.

    Where `prior_std` is 1 it is 1 at every t: a grid that starts below t = 1 expects nearly pure noise there. Elsewhere
    it is proportional to sigma(t).
    """
    if process.prior_std == 1:
        return 1.0
    (_, sigma), (_, last) = process.alpha_sigma(t), process.alpha_sigma(torch.ones_like(t))
    return process.prior_std * float(sigma / last)


class Sampler(Part):
    """Takes x from the first time of its grid to the last, which is 0 unless `Grid.end` says another.

    Args:
        steps: Number of network evaluations per image, S; None: all T of a chain.
        grid: The rule that chooses S times.
        clip: Whether predictions of x_0 are clipped to [-1, 1] (outermost, after any guidance).

    Raises:
        ValueError: If steps < 1. Whether the process has enough times is checked by `times`.
    """

    def __init__(self, steps: int | None, grid: Grid, clip: bool) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"sampler.steps={steps} must be at least 1")
        self.steps = steps
        self.grid = grid
        self.clip = clip

    @abstractmethod
    def step(
        self, denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, s: Tensor, noise: NoiseFn
    ) -> tuple[Tensor, Tensor]:
        """Takes one step from t down to s.

        Args:
            denoise: Predicts x_0 and eps.
            x_t: (B, ...).
            process: The forward process.
            t: Time of x_t, a scalar.
            s: Time to go to, a scalar below t, or t itself where the grid ends at its least time. In a step to 0 no
                noise is added.
            noise: Called only when fresh noise is needed.

        Returns:
            (x_s, the x_0 that it was computed from).
        """

    def begin(self, times: Tensor) -> Step:
        """Returns the step function for one trajectory; multistep solvers keep its history in it.

        Args:
            times: Times of the trajectory, falling; the last is the grid's end.
        """
        return self.step

    def num_intervals(self, process: Process) -> int:
        """Returns the number of steps over the whole grid.

        Raises:
            ValueError: If all steps are asked for in continuous time.
        """
        if self.steps is not None:
            return self.steps
        if process.num_steps is None:
            raise ValueError(
                f"sampler.steps must be a number: {type(process).__name__} has continuous time and no steps of its "
                "own; set --model.sampler.steps 50"
            )
        return process.num_steps

    def times(self, process: Process, start: float | None = None) -> Tensor:
        """Returns the times of a trajectory, falling, float64 on the CPU; the last is the grid's end.

        Args:
            process: The forward process.
            start: Time to start at, in (0, 1]; only times of the grid below it follow. None: the whole grid, (S + 1,).

        Raises:
            ValueError: If the process has fewer times than steps, or `start` is out of range.
        """
        times = self.grid(self.num_intervals(process), process)
        if start is None:
            return times
        if not 0 < start <= 1:
            raise ValueError(f"start={start} must lie in (0, 1]: 1 is pure noise, and 0 clean data")
        first = process.at(torch.tensor([start], dtype=torch.float64))
        return torch.cat([first, times[times < first]])

    def evaluations(self, process: Process) -> int:
        """Returns the number of network evaluations per image."""
        return len(self.times(process)) - 1

    def path(
        self,
        denoise: DenoiseFn,
        x: Tensor,
        process: Process,
        noise: NoiseFn,
        start: float | None = None,
        amend: AmendFn | None = None,
    ) -> Iterator[State]:
        """Yields every state from the start to the finished sample, one more than there are steps.

        Args:
            denoise: Predicts x_0 and eps.
            x: Standard normal noise, (B, ...), which is scaled to the standard deviation that the process starts with;
                with `start`, x_t at that time.
            process: The forward process.
            noise: Draws fresh noise for stochastic steps.
            start: Time of x, in (0, 1] (SDEdit); None: the first time of the grid.
            amend: Called after every step; the trajectory goes on from what it returns.
        """
        if self.clip:
            denoise = clip_x0(denoise, process)
        times = self.times(process, start)
        if start is None and process.prior_std != 1:
            x = start_std(process, times[0]) * x
        step = self.begin(times)
        for t, s in pairwise(times):
            x_s, x0 = step(denoise, x, process, t, s, noise)
            yield State(t, x, x0)
            x = x_s if amend is None else amend(x_s, s)
        yield State(times[-1], x, x)

    def __call__(
        self,
        denoise: DenoiseFn,
        x: Tensor,
        process: Process,
        noise: NoiseFn,
        on_step: StepFn | None = None,
        start: float | None = None,
        amend: AmendFn | None = None,
    ) -> Tensor:
        """Samples x_0.

        Args:
            denoise: Predicts x_0 and eps.
            x: Standard normal noise, (B, ...); with `start`, x_t at that time.
            process: The forward process to be reversed.
            noise: Draws fresh noise for stochastic steps.
            on_step: Called after every step.
            start: Time of x, in (0, 1] (SDEdit); None: the first time of the grid.
            amend: See `path`.

        Returns:
            Samples, (B, ...), nominally in [-1, 1].

        Source: Meng et al. 2022 (SDEdit), algorithm 1, for `start`.
        """
        total = len(self.times(process, start)) - 1
        for done, state in enumerate(self.path(denoise, x, process, noise, start, amend), start=1):
            x = state.x_t
            if on_step is not None and done <= total:
                on_step(done, total)
        return x
