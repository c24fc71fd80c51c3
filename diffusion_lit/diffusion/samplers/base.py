"""The loop that all samplers share: from noise to data over a grid of times."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from diffusion_lit.diffusion.grid import Grid
from diffusion_lit.diffusion.process import DiscreteProcess, Process, expand
from diffusion_lit.types import DenoiseFn, Prediction, StepFn

NoiseFn = Callable[[], Tensor]
"""Draws fresh standard normal noise in the shape of x."""

Step = Callable[[DenoiseFn, Tensor, Process, Tensor, Tensor, NoiseFn], tuple[Tensor, Tensor]]
"""One step of a sampler: see `Sampler.step`."""


@dataclass(frozen=True)
class State:
    """One point of a sampling path.

    Attributes:
        t: The time, a scalar.
        x_t: The sample there, (B, C, H, W).
        x0: What the denoiser took it for, (B, C, H, W); x_t itself at the end.
    """

    t: Tensor
    x_t: Tensor
    x0: Tensor


def clip_x0(denoise: DenoiseFn, process: Process) -> DenoiseFn:
    """Clips the predicted x_0 to [-1, 1] and re-derives eps from it, so that the two go on agreeing."""

    def clipped(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        alpha, sigma = process.alpha_sigma(t)
        x0 = prediction.x0.clamp(-1, 1)
        eps = (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)
        return Prediction(x0=x0, eps=eps, extra=prediction.extra)

    return clipped


class Sampler(ABC):
    """Walks x from the first time of its grid to 0.

    Args:
        steps: Network evaluations per image, S; None: all T.
        grid: Which S times.
        clip: Whether predictions of x_0 are clipped to [-1, 1] (outermost, after any guidance).

    Raises:
        ValueError: If steps < 1. Whether steps <= T is known once a process is: see `times`.
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
        """One step from t down to s.

        Args:
            denoise: Predicts x_0 and eps.
            x_t: (B, C, H, W).
            process: Gives the coefficients.
            t: Where x_t is, a scalar.
            s: Where to go, a scalar below t; 0 at the last step, to which no noise is added.
            noise: Called only when fresh noise is needed.

        Returns:
            (x_s, the x_0 it was built from).
        """

    def begin(self, times: Tensor) -> Step:
        """What steps along one path. A method that remembers earlier predictions returns a function of its own for
        every path, so that the sampler itself is the same before and after.

        Args:
            times: The path's times, falling, the last 0, (S + 1,).
        """
        return self.step

    def times(self, process: DiscreteProcess) -> Tensor:
        """The grid's times for this number of steps, falling, the last 0, (S + 1,).

        Raises:
            ValueError: If steps exceeds the process's.
        """
        return self.grid(process.num_steps if self.steps is None else self.steps, process)

    def path(self, denoise: DenoiseFn, x: Tensor, process: DiscreteProcess, noise: NoiseFn) -> Iterator[State]:
        """Yields every state from the start to the finished sample: S + 1 in all."""
        if self.clip:
            denoise = clip_x0(denoise, process)
        times = self.times(process)
        step = self.begin(times)
        for t, s in pairwise(times):
            x_s, x0 = step(denoise, x, process, t, s, noise)
            yield State(t, x, x0)
            x = x_s
        yield State(times[-1], x, x)

    def __call__(
        self,
        denoise: DenoiseFn,
        x: Tensor,
        process: DiscreteProcess,
        noise: NoiseFn,
        on_step: StepFn | None = None,
    ) -> Tensor:
        """Samples x_0.

        Args:
            denoise: Predicts x_0 and eps.
            x: Standard normal noise to start from, (B, C, H, W).
            process: The forward process to be reversed.
            noise: Gives fresh noise for stochastic steps.
            on_step: Told of every step done.

        Returns:
            Samples, (B, C, H, W), nominally in [-1, 1].
        """
        total = len(self.times(process)) - 1
        for done, state in enumerate(self.path(denoise, x, process, noise), start=1):
            x = state.x_t
            if on_step is not None and done <= total:
                on_step(done, total)
        return x
