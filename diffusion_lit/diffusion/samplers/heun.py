"""Heun's method on the probability flow: second order, by a second evaluation at the end of each step."""

from torch import Tensor

from diffusion_lit.diffusion.grid import Grid, Karras
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.diffusion.samplers.base import NoiseFn, Sampler
from diffusion_lit.types import DenoiseFn


class Heun(Sampler):
    """The trapezoidal rule for d(x / alpha) / d(sigma / alpha) = eps; the last step, to t = 0, is an Euler step.

    Deterministic. N intervals take 2 N - 1 network evaluations. x / alpha is EDM's variable, so that this is its
    algorithm 1, without churn, for any process. Where alpha nearly vanishes, as at the end of a cosine schedule, errors
    of eps grow like sigma / alpha: start, as EDM does and `Karras` ensures, at 80 or so.

    Args:
        steps: Number of network evaluations per image, odd; of an even number one is not used. None: 2 T - 1.
        grid: The rule that chooses (steps + 1) / 2 times.
        clip: Whether predictions of x_0 are clipped to [-1, 1].

    Source: Karras et al. 2022 (EDM), algorithm 1.
    """

    def __init__(self, steps: int | None = 35, grid: Grid = Karras(), clip: bool = True) -> None:
        super().__init__(steps, grid, clip)

    def num_intervals(self, process: Process) -> int:
        """Returns the number of grid times above 0, N.

        Raises:
            ValueError: If a chain of T steps allows fewer evaluations, 2 T - 1, or if all are asked for in continuous
                time.
        """
        if self.steps is None:
            return super().num_intervals(process)
        if process.num_steps is not None and self.steps > 2 * process.num_steps - 1:
            most = 2 * process.num_steps - 1
            raise ValueError(
                f"sampler.steps={self.steps} exceeds the {most} evaluations that {process.num_steps} times allow; "
                f"set --model.sampler.steps to at most {most}"
            )
        return (self.steps + 1) // 2

    def evaluations(self, process: Process) -> int:
        return 2 * self.num_intervals(process) - 1

    def step(
        self, denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, s: Tensor, noise: NoiseFn
    ) -> tuple[Tensor, Tensor]:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
        near = denoise(x_t, t)
        x_s = expand(alpha_s, x_t) * near.x0 + expand(sigma_s, x_t) * near.eps
        if s == 0:
            return x_s, near.x0
        far = denoise(x_s, s)
        half_width = (alpha_s * sigma_t / alpha_t - sigma_s) / 2
        return x_s + expand(half_width, x_t) * (near.eps - far.eps), near.x0
