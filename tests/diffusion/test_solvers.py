"""The samplers of higher order: how fast they converge, and what other code makes of the same steps."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from diffusion_lit.diffusion import (
    DDIM,
    PLMS,
    Ancestral,
    Cosine,
    DiscreteProcess,
    DPMSolver,
    Grid,
    Heun,
    Karras,
    Leading,
    Linear,
    LogSNR,
    Sampler,
    Schedule,
    Spanning,
    Trailing,
    Uniform,
)
from diffusion_lit.types import Prediction
from tests.diffusion.gaussian import Mixture, alpha_bars, linear_betas

DATA = Mixture(np.array([0.3, 0.5, 0.2]), np.array([-0.8, 0.1, 0.7]), np.array([0.02, 0.05, 0.01]))
START = torch.tensor([-1.5, -0.6, -0.1, 0.3, 0.9, 2.0], dtype=torch.float64).reshape(-1, 1, 1, 1)


def silent() -> Tensor:
    raise AssertionError("no noise was due")


class EvenLogSNR(Schedule):
    """lambda falls evenly from 5 to -5, so that a grid that is even in the index is even in lambda."""

    def betas(self, num_steps: int) -> Tensor:
        alpha_bar = torch.sigmoid(2 * torch.linspace(5, -5, num_steps, dtype=torch.float64))
        return 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])


INTERVALS = 480
EVEN = DiscreteProcess(INTERVALS + 1, EvenLogSNR())


def orders(sampler_with: Callable[[int], Sampler], intervals: list[int]) -> list[float]:
    """How often the error at the last time above 0 halves when the number of intervals doubles."""
    errors = []
    for count in intervals:
        states = list(sampler_with(count + 1).path(DATA.denoise(EVEN), START, EVEN, silent))
        exact = DATA.flow(START, EVEN, states[0].t, states[-2].t)
        errors.append((states[-2].x_t - exact).abs().max().item())
    return [math.log2(before / after) for before, after in pairwise(errors)]


@pytest.mark.parametrize(
    ("sampler_with", "order"),
    [
        (lambda n: DPMSolver(n, 1, Spanning(), clip=False), 1),
        (lambda n: DPMSolver(n, 2, Spanning(), clip=False), 2),
        (lambda n: DPMSolver(n, 3, Spanning(), clip=False), 3),
        (lambda n: DPMSolver(n, 3, Spanning(), clip=False, lower_order_final=False), 3),
        (lambda n: Heun(2 * n - 1, Spanning(), clip=False), 2),
        # Of the spacing in sigma / alpha, which the weights take to be even, remains an error of this order.
        (lambda n: PLMS(n, Spanning(), clip=False), 2),
    ],
    ids=["order 1", "order 2", "order 3", "order 3 to the end", "heun", "plms"],
)
def test_the_flow_of_a_mixture_is_met_at_the_order_promised(sampler_with: Callable[[int], Sampler], order: int) -> None:
    found = orders(sampler_with, [60, 120, 240, 480])
    # The one step of order 1 that a path begins with costs order 3 a little.
    np.testing.assert_allclose(found, order, atol=0.25)


def test_order_3_errs_less_than_2_and_2_less_than_1_with_few_steps() -> None:
    process = DiscreteProcess()
    ends = []
    for order in (1, 2, 3):
        *_, last, _ = DPMSolver(15, order, clip=False).path(DATA.denoise(process), START, process, silent)
        ends.append((last.x_t - DATA.flow(START, process, process_end(process), last.t)).abs().mean().item())
    assert ends[0] > 4 * ends[1] > 4 * 1.5 * ends[2]


def process_end(process: DiscreteProcess) -> Tensor:
    return LogSNR()(1, process)[0]


@pytest.mark.parametrize("grid", [Uniform(), LogSNR(), Trailing()], ids=["uniform", "log-SNR", "trailing"])
@pytest.mark.parametrize("clip", [False, True])
def test_of_order_1_dpm_solver_is_ddim(grid: Grid, clip: bool) -> None:
    process = DiscreteProcess()
    x = 2 * START
    ddim = DDIM(13, 0.0, grid, clip).path(DATA.denoise(process), x, process, silent)
    for ours, theirs in zip(
        DPMSolver(13, 1, grid, clip).path(DATA.denoise(process), x, process, silent), ddim, strict=True
    ):
        torch.testing.assert_close(ours.x_t, theirs.x_t, rtol=0, atol=1e-12)


class Integrated(DPMSolverMultistepScheduler):
    """Theirs, with the weight that the second difference has in the integral of order 3: twice theirs."""

    def multistep_dpm_solver_third_order_update(self, outputs: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        theirs: Tensor = super().multistep_dpm_solver_third_order_update(outputs, *args, **kwargs)
        sigmas = [float(self.sigmas[self.step_index + i]) for i in (1, 0, -1, -2)]
        s, t, before, earlier = (-math.log(sigma) for sigma in sigmas)
        h = s - t
        slopes = (outputs[-1] - outputs[-2]) / (t - before), (outputs[-2] - outputs[-3]) / (before - earlier)
        second = h**2 * (slopes[0] - slopes[1]) / (t - earlier)
        alpha_s = 1 / math.sqrt(1 + sigmas[0] ** 2)
        return theirs - alpha_s * ((math.exp(-h) - 1 + h) / h**2 - 0.5) * second


# Its arithmetic on a tensor that numpy converts.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "order"),
    [(DPMSolverMultistepScheduler, 1), (DPMSolverMultistepScheduler, 2), (Integrated, 3)],
    ids=["order 1", "order 2", "order 3"],
)
@pytest.mark.parametrize(("steps", "lower"), [(12, True), (12, False), (25, False)])
@pytest.mark.parametrize("grid", [Spanning(), LogSNR()], ids=["spanning", "log-SNR"])
def test_dpm_solver_agrees_with_diffusers_step_by_step(
    scheduler: type[DPMSolverMultistepScheduler], order: int, steps: int, lower: bool, grid: Grid
) -> None:
    process = DiscreteProcess()
    denoise = DATA.denoise(process)
    ours = list(DPMSolver(steps, order, grid, False, lower).path(denoise, START, process, silent))
    theirs = scheduler(solver_order=order, lower_order_final=lower, trained_betas=Linear().betas(1000).tolist())
    # In float32, as they keep it, 1 - alpha_bar near clean data has three digits.
    theirs.alphas_cumprod = torch.from_numpy(alpha_bars(linear_betas(1000))[1:])
    theirs.set_timesteps(timesteps=[round(state.t.item() * 1000) - 1 for state in ours[:-1]])
    for k, (now, after) in zip(theirs.timesteps, pairwise(ours), strict=True):
        found = theirs.step(denoise(now.x_t, now.t).eps, k, now.x_t).prev_sample
        torch.testing.assert_close(found, after.x_t, rtol=0, atol=3e-6)


def test_heun_is_edm_s_in_its_own_variables() -> None:
    process = DiscreteProcess()
    denoise = DATA.denoise(process)
    states = list(Heun(19, clip=False).path(denoise, START, process, silent))
    for now, after in pairwise(states):
        (alpha, sigma), (alpha_s, sigma_s) = process.alpha_sigma(now.t), process.alpha_sigma(after.t)
        y, here, there = now.x_t / alpha, sigma / alpha, sigma_s / alpha_s
        d = (y - denoise(y * alpha, now.t).x0) / here
        y_s = y + (there - here) * d
        if there > 0:
            d_s = (y_s - denoise(y_s * alpha_s, after.t).x0) / there
            y_s = y + (there - here) * (d + d_s) / 2
        torch.testing.assert_close(after.x_t, y_s * alpha_s, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("steps", "evaluations"), [(1, 1), (2, 1), (9, 9), (10, 9), (35, 35)])
def test_heun_counts_evaluations_of_the_network(steps: int, evaluations: int) -> None:
    process, asked = DiscreteProcess(), 0

    def counting(x_t: Tensor, t: Tensor) -> Prediction:
        nonlocal asked
        asked += 1
        return DATA.denoise(process)(x_t, t)

    Heun(steps)(counting, START, process, silent)
    assert asked == evaluations


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_dpm_solver_forgets_between_calls_and_may_sample_two_at_once(order: int) -> None:
    process = DiscreteProcess()
    sampler, denoise = DPMSolver(9, order), DATA.denoise(process)
    alone = [state.x_t for state in DPMSolver(9, order).path(denoise, START, process, silent)]
    other = sampler.path(denoise, START.flip(0), process, silent)
    for state, expected in zip(sampler.path(denoise, START, process, silent), alone, strict=True):
        next(other)
        assert torch.equal(state.x_t, expected)
    assert torch.equal(sampler(denoise, START, process, silent), alone[-1])


@pytest.mark.parametrize("order", [2, 3])
def test_a_single_step_of_a_dpm_solver_has_nothing_to_look_back_on(order: int) -> None:
    process = DiscreteProcess()
    t, s = torch.tensor([0.5, 0.4], dtype=torch.float64)
    found, _ = DPMSolver(order=order).step(DATA.denoise(process), START, process, t, s, silent)
    expected, _ = DDIM().step(DATA.denoise(process), START, process, t, s, silent)
    torch.testing.assert_close(found, expected)


def lambdas(grid: Grid, steps: int, process: DiscreteProcess) -> list[float]:
    return (process.log_snr(grid(steps, process)[:-1]) / 2).tolist()


def test_a_log_snr_grid_is_even_in_lambda_from_end_to_end() -> None:
    process = DiscreteProcess(100_000, Linear(1e-6, 2e-4))
    found = lambdas(LogSNR(), 11, process)
    first, last = (process.log_snr(torch.tensor([1.0, 1e-5], dtype=torch.float64)) / 2).tolist()
    np.testing.assert_allclose(found, np.linspace(first, last, 11), atol=0.02)


def test_a_log_snr_grid_leaves_out_the_end_of_a_cosine_schedule() -> None:
    process = DiscreteProcess(1000, Cosine())
    assert lambdas(LogSNR(), 10, process)[0] == pytest.approx(-5.1, abs=0.2)
    assert lambdas(LogSNR(-100.0), 10, process)[0] < -9


def test_a_karras_grid_has_the_papers_noise_levels() -> None:
    process = DiscreteProcess(100_000, Linear(1e-6, 2e-4))
    found = np.exp(-np.array(lambdas(Karras(0.05, 40.0, 7.0), 10, process)))
    i = np.arange(10)
    expected = (40 ** (1 / 7) + i / 9 * (0.05 ** (1 / 7) - 40 ** (1 / 7))) ** 7
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_a_karras_grid_stays_within_the_process() -> None:
    process = DiscreteProcess()
    times = Karras(sigma_max=1e6)(10, process)
    assert times[0] == 1
    assert times[-2] == pytest.approx(1e-3)
    assert lambdas(Karras(), 10, DiscreteProcess(1000, Cosine()))[0] == pytest.approx(-math.log(80), abs=0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolver(order=4), r"sampler.order=4 must be 1, 2 or 3.*--model.sampler.order"),
        (lambda: DPMSolver(0), r"sampler.steps=0 must be at least 1"),
        (lambda: Heun(-1), r"sampler.steps=-1 must be at least 1"),
        (lambda: Heun(2001).times(DiscreteProcess()), r"at most 1999"),
        (lambda: Karras(sigma_min=0.0), r"sigma_min=0.0 < sigma_max=80.0"),
        (lambda: Karras(sigma_min=3.0, sigma_max=2.0), r"sigma_min=3.0 < sigma_max=2.0"),
        (lambda: Karras(rho=0.0), r"1 <= rho=0.0"),
    ],
)
def test_errors_name_the_value_and_the_bound(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "grid", [Leading(), Leading(1, clean=False), Leading(clean=False)], ids=["to 0", "above 0", "twice"]
)
@pytest.mark.parametrize(
    "sampler_with",
    [
        lambda grid: DDIM(7, grid=grid, eta=1.0),
        lambda grid: Ancestral(7, grid=grid),
        lambda grid: Heun(7, grid=grid),
        lambda grid: DPMSolver(7, 3, grid, lower_order_final=False),
        lambda grid: PLMS(7, grid),
        lambda grid: PLMS(1, grid),
    ],
    ids=["ddim", "ancestral", "heun", "dpm", "plms", "plms, one step"],
)
def test_a_grid_may_end_above_0_or_at_its_least_time(sampler_with: Callable[[Grid], Sampler], grid: Grid) -> None:
    """Evaluations are counted as they are made, and a last step from a time to itself changes nothing."""
    process, calls = DiscreteProcess(), 0
    exact = DATA.denoise(process)

    def counted(x_t: Tensor, t: Tensor) -> Prediction:
        nonlocal calls
        calls += 1
        return exact(x_t, t)

    sampler = sampler_with(grid)
    *_, before, after = sampler.path(counted, START, process, lambda: torch.zeros_like(START))
    assert calls == sampler.evaluations(process)
    assert after.x_t.isfinite().all()
    if before.t == after.t:
        torch.testing.assert_close(after.x_t, before.x_t, rtol=1e-9, atol=1e-9)
