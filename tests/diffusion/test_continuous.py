"""Processes in continuous time: closed forms, agreement with EDM, and every sampler against Gaussian oracles."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor, nn

from diffusion_lit.diffusion import (
    DDIM,
    Ancestral,
    Denoiser,
    DiscreteProcess,
    DPMSolver,
    Eps,
    FixedLarge,
    FixedSmall,
    Heun,
    Hybrid,
    Karras,
    Linear,
    LogSNR,
    Process,
    Sampler,
    Spanning,
    UniformTimes,
    VarianceExploding,
    VariancePreserving,
    Variational,
    VariationalBound,
)
from diffusion_lit.diffusion.likelihood import bits_per_dim
from diffusion_lit.types import DenoiseFn, Prediction
from tests.diffusion.gaussian import Array, Mixture
from tests.diffusion.test_samplers import response, seeded, silent

MEAN, VARIANCE = 0.4, 0.09
ONE = Mixture(np.array([1.0]), np.array([MEAN]), np.array([VARIANCE]))
THREE = Mixture(np.array([0.3, 0.5, 0.2]), np.array([-0.8, 0.1, 0.7]), np.array([0.02, 0.05, 0.01]))
PROCESSES = [VariancePreserving(first_time=1e-3), VarianceExploding()]
each = pytest.mark.parametrize("process", PROCESSES, ids=["vp", "ve"])


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def level(process: Process, t: Tensor) -> tuple[float, float]:
    alpha, sigma = process.alpha_sigma(t)
    return float(alpha), float(sigma)


# Processes


@pytest.mark.parametrize("t", [1e-5, 0.3, 1.0])
def test_alpha_solves_the_variance_preserving_sde(t: float) -> None:
    # dx = -beta(t) / 2 x dt + sqrt(beta(t)) dw: the mean decays by the integral of beta / 2, and variance is kept.
    exponent, _ = integrate.quad(lambda u: (0.1 + u * (20 - 0.1)) / 2, 0, t)
    alpha, sigma = level(VariancePreserving(), times(t)[0])
    assert alpha == pytest.approx(math.exp(-exponent), rel=1e-12)
    assert sigma == pytest.approx(math.sqrt(-math.expm1(-2 * exponent)), rel=1e-12)


def test_variance_preserving_is_the_limit_of_ddpms_chain() -> None:
    total = 100_000
    chain = DiscreteProcess(total, Linear(0.1 / total, 20 / total))
    t = times(0.01, 0.2, 0.5, 1.0)
    for found, expected in zip(chain.alpha_sigma(t), VariancePreserving().alpha_sigma(t), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


@each
def test_time_at_inverts_log_snr(process: Process) -> None:
    t = torch.logspace(math.log10(process.first_time), 0, 200, dtype=torch.float64)
    torch.testing.assert_close(process.time_at(process.log_snr(t)), t, rtol=1e-9, atol=0)


def test_a_constant_beta_can_be_inverted_too() -> None:
    process, t = VariancePreserving(3.0, 3.0), times(1e-4, 0.2, 1.0)
    torch.testing.assert_close(process.time_at(process.log_snr(t)), t, rtol=1e-9, atol=0)


def test_the_network_receives_999_t_or_sigma() -> None:
    for process, expected in zip(PROCESSES, ([99.9, 999.0], [8.0, 80.0]), strict=True):
        found = process.network_time(times(0.1, 1.0))
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_variance_exploding_adds_noise_to_unscaled_data() -> None:
    process = VarianceExploding(0.01, 50.0)
    assert process.perturb(times(0.3), times(-2.0), times(0.5)).item() == pytest.approx(0.3 - 50, rel=1e-15)
    assert process.prior_std == 50
    assert process.first_time == pytest.approx(2e-4)


@each
def test_wanted_times_stay_within_the_process(process: Process) -> None:
    found = process.at(times(0.0, 0.25, 1.5))
    assert found.tolist() == [process.first_time, 0.25, 1.0]


def test_on_a_chain_wanted_times_become_distinct_entries() -> None:
    found = DiscreteProcess(10).at(times(0.11, 0.12, 0.13, 0.74, 0.98, 1.0)) * 10
    assert found.tolist() == pytest.approx([1, 2, 3, 7, 9, 10])
    assert (DiscreteProcess(3).at(times(1.0, 1.0, 1.0)) * 3).tolist() == pytest.approx([1, 2, 3])
    assert (DiscreteProcess(3).at(times(0.0, 0.0)) * 3).tolist() == pytest.approx([1, 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VariancePreserving(0.0), r"beta_min=0.0 .*the paper has 0\.1, 20 and 1e-5"),
        (lambda: VariancePreserving(3.0, 2.0), r"beta_min=3.0 <= beta_max=2.0"),
        (lambda: VariancePreserving(first_time=1.0), r"first_time=1.0 < 1"),
        (lambda: VarianceExploding(0.0), r"sigma_min=0.0 < sigma_max=80.0.*0\.002 and 80"),
        (lambda: VarianceExploding(2.0, 1.0), r"sigma_min=2.0 < sigma_max=1.0"),
        (lambda: Ancestral().times(VariancePreserving()), r"steps must be a number.*--model.sampler.steps 50"),
        (lambda: Heun(None).times(VarianceExploding()), r"steps must be a number: VarianceExploding"),
        (lambda: Variational()(VariancePreserving(), times(0.5)), r"Variational is defined on a chain"),
    ],
)
def test_errors_name_the_value_and_the_bound(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_bound_is_refused_in_continuous_time() -> None:
    x0 = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for objective in (Hybrid(), VariationalBound(times=UniformTimes())):
        with pytest.raises(ValueError, match="the variational bound is defined on a chain"):
            objective(Denoiser(nn.Identity(), Eps(), PROCESSES[0]), x0, {})
    with pytest.raises(ValueError, match="the variational bound is defined on a chain"):
        bits_per_dim(ONE.denoise(PROCESSES[0]), x0, PROCESSES[0], FixedLarge(), lambda: x0)


# EDM


def edm_sampler(denoise: Callable[[Array, float], Array], latents: Array, count: int) -> list[Array]:
    """Karras et al. 2022, algorithm 1 without churn, in numpy."""
    i = np.arange(count)
    steps = (80 ** (1 / 7) + i / (count - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    steps = np.append(steps, 0.0)
    x = latents * steps[0]
    states = [x]
    for here, there in pairwise(steps.tolist()):
        d = (x - denoise(x, here)) / here
        x_next = x + (there - here) * d
        if there > 0:
            d_next = (x_next - denoise(x_next, there)) / there
            x_next = x + (there - here) * (d / 2 + d_next / 2)
        x = x_next
        states.append(x)
    return states


@pytest.mark.parametrize("count", [18, 40])
def test_heun_on_variance_exploding_is_the_sampler_of_edm(count: int) -> None:
    process = VarianceExploding(0.002, 80.0)
    latents = torch.randn(16, 3, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def optimal(x: Array, sigma: float) -> Array:
        found: Array = (VARIANCE * x + sigma**2 * MEAN) / (VARIANCE + sigma**2)
        return found

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        sigma = 80 * float(t)
        x0 = torch.from_numpy(optimal(x_t.numpy(), sigma))
        return Prediction(x0, (x_t - x0) / sigma)

    sampler = Heun(2 * count - 1, Karras(0.002, 80.0), clip=False)
    states = [state.x_t for state in sampler.path(denoise, latents, process, silent)]
    for found, expected in zip(states, edm_sampler(optimal, latents.numpy(), count), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert sampler.evaluations(process) == 2 * count - 1


# Samplers against oracles


def moments(sampler: Sampler, process: Process, eta: float | None, large: bool) -> tuple[float, float]:
    """Mean and variance of samples of N(MEAN, VARIANCE) data, by pushing the Gaussian through every step."""
    grid = sampler.times(process)
    alpha, sigma = level(process, grid[0])
    mean, variance = 0.0, (sigma if process.prior_std > 1 else 1.0) ** 2
    for t, s in pairwise(grid):
        (alpha, sigma), (alpha_s, sigma_s) = level(process, t), level(process, s)
        slope = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        shift = MEAN * (1 - slope * alpha)
        scale = alpha / alpha_s
        forward = sigma**2 - scale**2 * sigma_s**2
        # Bayes' rule: precisions add, as do precision-weighted means.
        small = 0.0 if s == 0 else 1 / (scale**2 / forward + 1 / sigma_s**2)
        if eta is None:
            by_x, by_x0 = (0.0, 1.0) if s == 0 else (small * scale / forward, small * alpha_s / sigma_s**2)
            added = 0.0 if s == 0 else (forward if large else small)
        else:
            added = eta**2 * small
            by_x = math.sqrt(max(sigma_s**2 - added, 0)) / sigma
            by_x0 = alpha_s - by_x * alpha
        gain = by_x + by_x0 * slope
        mean, variance = gain * mean + by_x0 * shift, gain**2 * variance + added
    return mean, variance


@each
@pytest.mark.parametrize(
    ("sampler", "eta", "large"),
    [
        (Ancestral(40, FixedSmall(), Spanning(), clip=False), None, False),
        (Ancestral(40, FixedLarge(), Karras(), clip=False), None, True),
        (DDIM(30, 0.0, Karras(), clip=False), 0.0, False),
        (DDIM(30, 0.6, LogSNR(), clip=False), 0.6, False),
        (DPMSolver(30, 1, LogSNR(), clip=False), 0.0, False),
    ],
    ids=["small", "large", "eta 0", "eta 0.6", "order 1"],
)
def test_samples_have_the_moments_of_their_gaussians(
    process: Process, sampler: Sampler, eta: float | None, large: bool
) -> None:
    found = response(sampler, process, ONE.denoise(process))
    mean, variance = moments(sampler, process, eta, large)
    assert found.offset == pytest.approx(mean, abs=1e-9)
    assert found.variance == pytest.approx(variance, rel=1e-9)


@pytest.mark.few(5)
@each
@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(1000, FixedSmall(), LogSNR(), clip=False),
        DDIM(1000, 0.5, LogSNR(), clip=False),
        DDIM(1000, 0.0, LogSNR(), clip=False),
        DPMSolver(100, 2, clip=False),
        DPMSolver(100, 3, clip=False),
        Heun(199, clip=False),
    ],
    ids=["ancestral", "eta 0.5", "eta 0", "order 2", "order 3", "heun"],
)
def test_with_many_steps_samples_have_the_moments_of_the_data(process: Process, sampler: Sampler) -> None:
    found = response(sampler, process, ONE.denoise(process))
    # x_1 keeps a little of the mean, which noise to start from has not.
    assert found.offset == pytest.approx(MEAN, abs=0.01)
    assert found.variance == pytest.approx(VARIANCE, rel=0.02)


START = times(-1.5, -0.6, -0.1, 0.3, 0.9, 2.0).reshape(-1, 1, 1, 1)


@pytest.mark.few(5)
@each
@pytest.mark.parametrize(
    ("sampler_with", "order"),
    [
        (lambda n: DDIM(n, 0.0, LogSNR(), clip=False), 1),
        (lambda n: DPMSolver(n, 1, clip=False), 1),
        (lambda n: DPMSolver(n, 2, clip=False), 2),
        (lambda n: DPMSolver(n, 3, clip=False), 3),
        (lambda n: Heun(2 * n - 1, LogSNR(), clip=False), 2),
    ],
    ids=["ddim", "order 1", "order 2", "order 3", "heun"],
)
def test_the_flow_of_a_mixture_is_met_at_the_order_promised(
    process: Process, sampler_with: Callable[[int], Sampler], order: int
) -> None:
    errors = []
    for count in (120, 240, 480):
        *_, first_above_0, _ = states = list(
            sampler_with(count + 1).path(THREE.denoise(process), START, process, silent)
        )
        exact = THREE.flow(states[0].x_t, process, states[0].t, first_above_0.t)
        errors.append((first_above_0.x_t - exact).abs().max().item())
    found = [math.log2(before / after) for before, after in pairwise(errors)]
    np.testing.assert_allclose(found, order, atol=0.25)


@each
def test_inversion_and_sampling_return_the_image_up_to_the_step(process: Process) -> None:
    x0 = times(-0.8, 0.1, 0.4, 0.9).reshape(4, 1, 1, 1)
    errors = []
    for steps in (100, 200, 400):
        sampler = DDIM(steps, 0.0, LogSNR(), clip=False)
        latent = sampler.invert(ONE.denoise(process), x0, process)
        assert latent.abs().max() < 5
        errors.append((sampler(ONE.denoise(process), latent, process, silent) - x0).abs().max().item())
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    np.testing.assert_allclose(ratios, 2, atol=0.2)


@each
@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [(DDIM(7), 7), (Ancestral(5), 5), (DPMSolver(6), 6), (Heun(9), 9), (Heun(10), 9), (Heun(1), 1)],
    ids=["ddim", "ancestral", "dpm-solver", "heun", "heun, even", "heun, one"],
)
def test_evaluations_are_those_of_the_network(process: Process, sampler: Sampler, evaluations: int) -> None:
    count = 0

    def counting(x_t: Tensor, t: Tensor) -> Prediction:
        nonlocal count
        count += 1
        return ONE.denoise(process)(x_t, t)

    sampler(counting, START, process, seeded(START))
    assert count == sampler.evaluations(process) == evaluations


# A start part-way

EVERY = [*PROCESSES, DiscreteProcess(100, Linear(1e-3, 0.2))]
ALL = pytest.mark.parametrize("process", EVERY, ids=["vp", "ve", "chain"])
SAMPLERS = [DDIM(20, clip=False), Ancestral(20, clip=False), DPMSolver(20, clip=False), Heun(39, clip=False)]


@ALL
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["ddim", "ancestral", "dpm-solver", "heun"])
def test_a_path_goes_on_from_a_grid_time_as_the_whole_path_does(process: Process, sampler: Sampler) -> None:
    if isinstance(sampler, DPMSolver):
        sampler = DPMSolver(20, 1, clip=False)
    denoise = ONE.denoise(process)
    draws = [torch.zeros_like(START)] * 19
    whole = list(sampler.path(denoise, START, process, iter(draws).__next__))
    middle = whole[8]
    rest = list(sampler.path(denoise, middle.x_t, process, iter(draws).__next__, start=float(middle.t)))
    assert len(rest) == len(whole) - 8
    for found, expected in zip(rest, whole[8:], strict=True):
        assert torch.equal(found.x_t, expected.x_t)
        assert found.t == expected.t


@ALL
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["ddim", "ancestral", "dpm-solver", "heun"])
def test_only_grid_times_below_the_start_follow_and_each_is_reported(process: Process, sampler: Sampler) -> None:
    grid = sampler.times(process)
    found = sampler.times(process, 0.33)
    assert float(found[0]) == pytest.approx(0.33)
    assert torch.equal(found[1:], grid[grid < 0.33])
    reported: list[tuple[int, int]] = []
    sampler(
        ONE.denoise(process), START, process, seeded(START), lambda done, total: reported.append((done, total)), 0.33
    )
    assert reported == [(i, len(found) - 1) for i in range(1, len(found))]


@ALL
def test_noised_data_are_denoised_to_the_distribution_of_the_data(process: Process) -> None:
    # SDEdit on the data themselves: x_t has its true distribution, which the flow takes to the data's.
    sampler = Heun(199, LogSNR(), clip=False)
    start, count = 0.4, 20_000
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, count, 1, dtype=torch.float64, generator=generator)
    x_t = process.perturb(MEAN + math.sqrt(VARIANCE) * x0, eps, times(start)[0])
    found = sampler(ONE.denoise(process), x_t, process, seeded(x_t), start=start)
    assert found.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert found.var().item() == pytest.approx(VARIANCE, rel=0.04)


@pytest.mark.parametrize("start", [0.0, 1.5, -0.2])
def test_a_start_outside_the_process_is_refused(start: float) -> None:
    with pytest.raises(ValueError, match=rf"start={start} must lie in \(0, 1\]"):
        DDIM(5).times(PROCESSES[0], start)


def test_noise_is_scaled_to_the_grids_first_noise_level() -> None:
    process = VarianceExploding(0.002, 80.0)
    for largest in (80.0, 20.0):
        first = next(DDIM(5, grid=Karras(sigma_max=largest)).path(ONE.denoise(process), START, process, silent))
        torch.testing.assert_close(first.x_t, largest * START, rtol=1e-12, atol=0)


@ALL
@pytest.mark.parametrize("shape", [(6, 3, 2, 5), (6, 7)], ids=["not square", "vectors"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=["ddim", "ancestral", "dpm-solver", "heun"])
def test_samples_have_any_shape(process: Process, shape: tuple[int, ...], sampler: Sampler) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat = x.reshape(-1, 1)
    denoise: DenoiseFn = ONE.denoise(process)
    together = sampler(denoise, x, process, lambda: torch.ones_like(x))
    alone = sampler(denoise, flat, process, lambda: torch.ones_like(flat))
    assert together.shape == shape
    torch.testing.assert_close(together, alone.reshape(shape), rtol=1e-12, atol=1e-12)
