"""Noise schedules: beta_1 .. beta_T of a discrete chain.

Alpha_bar, the posteriors and the log-SNR follow from them in `process`. "Linear" means linear in beta and "scaled
linear" linear in sqrt(beta); neither is rescaled with T.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lit.types import Part

MAX_BETA = 0.999


class Schedule(Part):
    """A family of noise schedules, one for every number of steps."""

    @abstractmethod
    def betas(self, num_steps: int) -> Tensor:
        """Returns beta_1 .. beta_T, float64, (T,), each in (0, 1)."""


def betas_from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], num_steps: int) -> Tensor:
    """Returns the betas of a curve alpha_bar(u), u in [0, 1], at most 0.999, so that every step keeps some signal.

    Source: Nichol & Dhariwal 2021, section 3.2.
    """
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    curve = alpha_bar(u)
    # 0 / 0 where a curve has reached zero before its end.
    return (1 - curve[1:] / curve[:-1]).nan_to_num(nan=1.0).clamp(max=MAX_BETA)


def _check_beta_range(name: str, beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"{name}: beta_start={beta_start}, beta_end={beta_end} must satisfy "
            "0 < beta_start <= beta_end < 1; DDPM uses 1e-4 and 0.02"
        )


class Linear(Schedule):
    """beta rises linearly.

    Args:
        beta_start: beta_1.
        beta_end: beta_T.

    Source: Ho et al. 2020, section 4.
    """

    def __init__(self, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        _check_beta_range("Linear", beta_start, beta_end)
        self.beta_start, self.beta_end = beta_start, beta_end

    def betas(self, num_steps: int) -> Tensor:
        return torch.linspace(self.beta_start, self.beta_end, num_steps, dtype=torch.float64)


class ScaledLinear(Schedule):
    """sqrt(beta) rises linearly; also called "quadratic", and in the LDM code "linear".

    Args:
        beta_start: beta_1.
        beta_end: beta_T.

    Source: Rombach et al. 2022, in their code.
    """

    def __init__(self, beta_start: float = 0.0015, beta_end: float = 0.0195) -> None:
        _check_beta_range("ScaledLinear", beta_start, beta_end)
        self.beta_start, self.beta_end = beta_start, beta_end

    def betas(self, num_steps: int) -> Tensor:
        roots = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, num_steps, dtype=torch.float64)
        return roots.square()


class Cosine(Schedule):
    """alpha_bar(u) is cos^2((u + offset) / (1 + offset) * pi / 2), normalised to 1 at u = 0.

    Args:
        offset: Offset of u, which keeps the first betas away from zero.

    Source: Nichol & Dhariwal 2021, eq. 17.
    """

    def __init__(self, offset: float = 0.008) -> None:
        if not 0 < offset < 1:
            raise ValueError(f"Cosine: offset={offset} must lie in (0, 1); the paper uses 0.008")
        self.offset = offset

    def betas(self, num_steps: int) -> Tensor:
        def alpha_bar(u: Tensor) -> Tensor:
            return torch.cos((u + self.offset) / (1 + self.offset) * math.pi / 2).square()

        return betas_from_alpha_bar(alpha_bar, num_steps)


class Sqrt(Schedule):
    """alpha_bar(u) is 1 - sqrt(u + offset), normalised to 1 at u = 0: the noise level rises fast at first.

    The "sqrt" of the LDM code is another schedule, beta = sqrt(linear).

    Args:
        offset: Offset of u, which limits the first betas.

    Source: Li et al. 2022 (Diffusion-LM), appendix A.
    """

    def __init__(self, offset: float = 1e-4) -> None:
        if not 0 < offset < 1:
            raise ValueError(f"Sqrt: offset={offset} must lie in (0, 1); the paper uses 1e-4")
        self.offset = offset

    def betas(self, num_steps: int) -> Tensor:
        return betas_from_alpha_bar(lambda u: (1 - (u + self.offset).sqrt()).clamp(min=0), num_steps)


class Sigmoid(Schedule):
    """alpha_bar(u) is a sigmoid of (start + u (end - start)) / tau, scaled to fall from 1 to 0.

    The schedule whose *betas* rise as a sigmoid is another one.

    Args:
        start: Argument at u = 0.
        end: Argument at u = 1.
        tau: Temperature, above 0.

    Source: Jabri et al. 2022; Chen 2023, algorithm 1.
    """

    def __init__(self, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> None:
        if not start < end or tau <= 0:
            raise ValueError(f"Sigmoid: start={start} < end={end} and tau={tau} > 0 must hold")
        self.start, self.end, self.tau = start, end, tau

    def betas(self, num_steps: int) -> Tensor:
        def alpha_bar(u: Tensor) -> Tensor:
            low, high = (torch.tensor(x / self.tau, dtype=torch.float64).sigmoid() for x in (self.start, self.end))
            here = ((u * (self.end - self.start) + self.start) / self.tau).sigmoid()
            return ((high - here) / (high - low)).clamp(min=0)

        return betas_from_alpha_bar(alpha_bar, num_steps)


class IntegratedLinear(Schedule):
    """beta(t), linear in continuous time, integrated over each step: beta_k = 1 - exp(-integral of beta(t) dt).

    Step k of T goes from t_(k-1) to t_k, with t_k = first_time + (1 - first_time) k / T. However few steps there are,
    the chain ends in nearly pure noise. Data are at t_0 = `first_time`, so that alpha_bar is relative to its value
    there.

    Args:
        beta_min: beta(0), above 0.
        beta_max: beta(1), at least `beta_min`.
        first_time: Time of the data, in [0, 1).

    Raises:
        ValueError: If an argument is out of range.

    Source: Xiao et al. 2022 (denoising diffusion GANs), appendix B, and its code.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, first_time: float = 1e-3) -> None:
        if not 0 < beta_min <= beta_max or not 0 <= first_time < 1:
            raise ValueError(
                f"IntegratedLinear: 0 < beta_min={beta_min} <= beta_max={beta_max} and 0 <= first_time={first_time} "
                "< 1 must hold; the paper has 0.1, 20 and 0.001"
            )
        self.beta_min, self.beta_max, self.first_time = beta_min, beta_max, first_time

    def betas(self, num_steps: int) -> Tensor:
        k = torch.arange(num_steps + 1, dtype=torch.float64)
        t = self.first_time + (1 - self.first_time) * k / num_steps
        integral = self.beta_min * t + (self.beta_max - self.beta_min) * t.square() / 2
        return -torch.expm1(-integral.diff())
