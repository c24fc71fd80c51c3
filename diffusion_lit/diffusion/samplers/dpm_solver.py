"""DPM-Solver++: multistep integration of the probability flow, from the latest predictions."""

from collections import deque

import torch
from torch import Tensor

from diffusion_lit.diffusion.grid import Grid, LogSNR
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.diffusion.samplers.base import NoiseFn, Sampler, Step
from diffusion_lit.types import DenoiseFn


class DPMSolver(Sampler):
    """Integrates the linear part exactly, and x_0 as a polynomial in lambda through the last `order` predictions.

        x_s = sigma_s / sigma_t x_t + sigma_s * integral of exp(lambda) x_0(lambda) from lambda_t to lambda_s

    with lambda = log(alpha / sigma). Deterministic. The first steps of a trajectory have fewer predictions and are of
    lower order; so is the last one, to t = 0, where lambda is infinite: it is a DDIM step, as every step of order 1.

    Order 2 is the paper's 2M. For order 3 the paper prints no formula; its authors' code, which diffusers follows,
    gives the second difference half the weight that it has in the integral, and converges at second order. Here the
    weight is that of the integral.

    Args:
        steps: S, at least 1; None: all T of a chain.
        order: 1, 2 or 3. The authors recommend 2 for guided sampling and 3 without guidance.
        grid: The rule that chooses S times; the paper uses `LogSNR` for images of low resolution and `Spanning` for
            others.
        clip: Whether predictions of x_0 are clipped to [-1, 1].
        lower_order_final: Whether the last step but one is of order 2 at most, which is more stable with few steps.
            Here this holds for any number of steps; diffusers applies its option of this name below 15 steps only.

    Raises:
        ValueError: If order is not 1, 2 or 3.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """

    def __init__(
        self,
        steps: int | None = 20,
        order: int = 2,
        grid: Grid = LogSNR(),
        clip: bool = True,
        lower_order_final: bool = True,
    ) -> None:
        super().__init__(steps, grid, clip)
        if order not in (1, 2, 3):
            raise ValueError(f"sampler.order={order} must be 1, 2 or 3; set --model.sampler.order")
        self.order = order
        self.lower_order_final = lower_order_final

    def begin(self, times: Tensor) -> Step:
        past: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.order)
        remaining = len(times) - 1

        def step(
            denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, s: Tensor, noise: NoiseFn
        ) -> tuple[Tensor, Tensor]:
            nonlocal remaining
            x0 = denoise(x_t, t).x0
            past.appendleft((process.log_snr(t) / 2, x0))
            # Of order 1 where the grid has the same time twice at its end: there is no width to divide by.
            order = 1 if s in (0, t) else remaining if self.lower_order_final else self.order
            known = list(past)[:order]
            remaining -= 1
            return extrapolate(x_t, known, process, t, s), x0

        return step

    def step(
        self, denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, s: Tensor, noise: NoiseFn
    ) -> tuple[Tensor, Tensor]:
        return self.begin(torch.stack([t, s]))(denoise, x_t, process, t, s, noise)


def extrapolate(x_t: Tensor, known: list[tuple[Tensor, Tensor]], process: Process, t: Tensor, s: Tensor) -> Tensor:
    """Returns x_s from x_t and the latest predictions of x_0, as many as the order.

    Args:
        x_t: (B, ...).
        known: lambda and x_0 of up to three predictions, the latest, that at t, first.
        process: The forward process.
        t: Time of x_t, a scalar.
        s: Time to go to, a scalar below t; at 0 the order must be 1.
    """
    (alpha_s, sigma_s), (_, sigma_t) = process.alpha_sigma(s), process.alpha_sigma(t)
    (lambda_0, m_0), *before = known
    h = process.log_snr(s) / 2 - lambda_0
    phi_1 = -torch.expm1(-h)
    x_s = expand(sigma_s / sigma_t, x_t) * x_t + expand(alpha_s * phi_1, x_t) * m_0
    if not before:
        return x_s
    lambda_1, m_1 = before[0]
    r_0 = (lambda_0 - lambda_1) / h
    d_0 = (m_0 - m_1) / expand(r_0, x_t)
    if len(before) == 1:
        return x_s + expand(alpha_s * phi_1 / 2, x_t) * d_0
    lambda_2, m_2 = before[1]
    r_1 = (lambda_1 - lambda_2) / h
    d_1 = (m_1 - m_2) / expand(r_1, x_t)
    second = (d_0 - d_1) / expand(r_0 + r_1, x_t)
    phi_2 = 1 - phi_1 / h
    first = d_0 + expand(r_0, x_t) * second
    return x_s + expand(alpha_s * phi_2, x_t) * first + expand(alpha_s * (1 - 2 * phi_2 / h), x_t) * second
