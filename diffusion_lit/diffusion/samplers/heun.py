"""Heun's method on the probability flow: second order by a second look at the end of each step."""

from torch import Tensor

from diffusion_lit.diffusion.grid import Grid, Karras
from diffusion_lit.diffusion.process import DiscreteProcess, Process, expand
from diffusion_lit.diffusion.samplers.base import NoiseFn, Sampler
from diffusion_lit.types import DenoiseFn


class Heun(Sampler):
    """The trapezoidal rule for d(x / alpha) / d(sigma / alpha) = eps; the last step, to t = 0, is Euler's.

    Deterministic. N steps cost 2 N - 1 network evaluations. x / alpha is EDM's variable, so that this is its
    algorithm 1 for any process; where alpha nearly vanishes, as at the end of a cosine schedule, errors of eps grow as
    sigma / alpha does: begin, as EDM does and `Karras` sees to, at 80 or so.

    Args:
        steps: Network evaluations per image, odd; of an even number one remains unused. None: 2 T - 1.
        grid: Which (steps + 1) / 2 times.
        clip: Whether predictions of x_0 are clipped to [-1, 1].

    Source: Karras et al. 2022 (EDM), algorithm 1.
    """

    def __init__(self, steps: int | None = 35, grid: Grid = Karras(), clip: bool = True) -> None:
        super().__init__(steps, grid, clip)

    def times(self, process: DiscreteProcess) -> Tensor:
        """The grid's times, (N + 1,).

        Raises:
            ValueError: If N exceeds what the process's T steps allow, 2 T - 1.
        """
        most = 2 * process.num_steps - 1
        if self.steps is not None and self.steps > most:
            raise ValueError(
                f"sampler.steps={self.steps} exceeds the {most} evaluations that {process.num_steps} times allow; "
                f"set --model.sampler.init_args.steps to at most {most}"
            )
        return self.grid(process.num_steps if self.steps is None else (self.steps + 1) // 2, process)

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
