import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_lit.diffusion import (
    DDIM,
    Ancestral,
    DiscreteProcess,
    DPMSolver,
    FixedLarge,
    FixedSmall,
    Heun,
    Linear,
    Process,
    Quadratic,
    Sampler,
    Trailing,
    slerp,
)
from diffusion_lit.types import DenoiseFn, Prediction
from tests.diffusion.gaussian import Array, alpha_bars, linear_betas, scalar_data

MEAN, VARIANCE = 0.4, 0.09


def silent() -> Tensor:
    raise AssertionError("no noise was due")


def seeded(x: Tensor, seed: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator)


@dataclass
class Affine:
    """What a sampler makes of its noise: offset + gain x + impulses . (noise of each step)."""

    offset: float
    gain: float
    impulses: Array

    @property
    def variance(self) -> float:
        return float(self.gain**2 + np.sum(self.impulses**2))


def response(sampler: Sampler, process: Process, denoise: DenoiseFn) -> Affine:
    """Feeds zeros and unit impulses: with a linear denoiser a sampler is an affine map."""
    steps = len(sampler.times(process)) - 1
    x = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    drawn = 0

    def noise() -> Tensor:
        nonlocal drawn
        drawn += 1
        impulse = torch.zeros_like(x)
        impulse[drawn + 1] = 1
        return impulse

    out = sampler(denoise, x, process, noise).flatten()
    assert drawn in (0, steps - 1), "every step but the last draws noise, or none does"
    rest = out - out[0]
    return Affine(out[0].item(), rest[1].item(), rest[2:].numpy())


def moments(entries: list[int], alpha_bar: Array, eta: float | None = None, large: bool = False) -> tuple[float, float]:
    """Mean and variance of what remains of N(0, 1) after the papers' steps with the optimal denoiser.

    Ho et al. 2020, eqs. 6 and 7, for the chain that visits only `entries`; or Song et al., eqs. 12 and 16.
    """
    mean, variance = 0.0, 1.0
    for k, j in zip(entries, [*entries[1:], 0], strict=True):
        bar, before = alpha_bar[k], alpha_bar[j]
        slope = math.sqrt(bar) * VARIANCE / (bar * VARIANCE + 1 - bar)
        shift = MEAN * (1 - slope * math.sqrt(bar))
        beta = 1 - bar / before
        small = beta * (1 - before) / (1 - bar)
        if eta is None:
            of_x, of_x0 = math.sqrt(1 - beta) * (1 - before) / (1 - bar), math.sqrt(before) * beta / (1 - bar)
            added = 0.0 if j == 0 else (beta if large else small)
        else:
            added = eta**2 * small
            of_eps = math.sqrt(max(1 - before - added, 0.0))
            of_x = of_eps / math.sqrt(1 - bar)
            of_x0 = math.sqrt(before) - of_eps * math.sqrt(bar / (1 - bar))
        gain = of_x + of_x0 * slope
        mean, variance = gain * mean + of_x0 * shift, gain**2 * variance + added
    return mean, variance


def entries(sampler: Sampler, process: DiscreteProcess) -> list[int]:
    return [round(t * process.num_steps) for t in sampler.times(process)[:-1].tolist()]


@pytest.mark.parametrize("steps", [None, 50, 7])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_ancestral_sampling_has_the_moments_of_its_gaussians(steps: int | None, large: bool) -> None:
    process, bars = DiscreteProcess(), alpha_bars(linear_betas(1000))
    sampler = Ancestral(steps, FixedLarge() if large else FixedSmall(), clip=False)
    found = response(sampler, process, scalar_data(MEAN, VARIANCE, bars).denoise(process))
    mean, variance = moments(entries(sampler, process), bars, large=large)
    assert found.offset == pytest.approx(mean, abs=1e-10)
    assert found.variance == pytest.approx(variance, abs=1e-10)


@pytest.mark.parametrize("steps", [None, 50, 7])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_has_the_moments_of_its_gaussians(steps: int | None, eta: float) -> None:
    process, bars = DiscreteProcess(), alpha_bars(linear_betas(1000))
    sampler = DDIM(steps, eta, grid=Quadratic(), clip=False)
    found = response(sampler, process, scalar_data(MEAN, VARIANCE, bars).denoise(process))
    mean, variance = moments(entries(sampler, process), bars, eta=eta)
    assert found.offset == pytest.approx(mean, abs=1e-10)
    assert found.variance == pytest.approx(variance, abs=1e-10)
    assert (eta == 0) == (not found.impulses.any())


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(variance=FixedSmall(), clip=False),
        Ancestral(variance=FixedLarge(), clip=False),
        DDIM(None, 0.0, clip=False),
        DDIM(None, 0.5, clip=False),
        DDIM(None, 1.0, clip=False),
        DPMSolver(None, order=2, clip=False),
        DPMSolver(None, order=3, clip=False),
        Heun(None, clip=False),
    ],
    ids=["small", "large", "eta 0", "eta 0.5", "eta 1", "order 2", "order 3", "heun"],
)
def test_with_all_steps_samples_have_the_moments_of_the_data(sampler: Sampler) -> None:
    process, bars = DiscreteProcess(), alpha_bars(linear_betas(1000))
    found = response(sampler, process, scalar_data(MEAN, VARIANCE, bars).denoise(process))
    assert found.offset == pytest.approx(MEAN, abs=0.01)
    assert found.variance == pytest.approx(VARIANCE, rel=0.03)


def test_ancestral_with_the_small_variance_is_ddim_with_eta_1_draw_for_draw() -> None:
    process, bars = DiscreteProcess(), alpha_bars(linear_betas(1000))
    denoise = scalar_data(MEAN, VARIANCE, bars).denoise(process)
    x = torch.randn(16, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for steps in (None, 13):
        ancestral = Ancestral(steps, FixedSmall())(denoise, x, process, seeded(x))
        ddim = DDIM(steps, 1.0)(denoise, x, process, seeded(x))
        torch.testing.assert_close(ancestral, ddim, rtol=0, atol=1e-10)


T_FINE = 4096
FINE = DiscreteProcess(T_FINE, Linear(0.1 / T_FINE, 20 / T_FINE))
FINE_BARS = alpha_bars(linear_betas(T_FINE, 0.1 / T_FINE, 20 / T_FINE))
FINE_DENOISE = scalar_data(MEAN, VARIANCE, FINE_BARS).denoise(FINE)


def flow(x: Tensor, bar_from: float, bar_to: float) -> Tensor:
    """The probability flow of Gaussian data: standardised distance to the mean is conserved."""
    spread = math.sqrt((bar_to * VARIANCE + 1 - bar_to) / (bar_from * VARIANCE + 1 - bar_from))
    return MEAN * math.sqrt(bar_to) + spread * (x - MEAN * math.sqrt(bar_from))


def test_ddim_converges_to_the_probability_flow_at_first_order() -> None:
    x = torch.tensor([-2.0, -0.5, 1.0, 3.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    errors = []
    for steps in (64, 128, 256, 512):
        sampler = DDIM(steps, 0.0, grid=Trailing(), clip=False)
        exact = flow(x, FINE_BARS[-1], 1.0)
        errors.append((sampler(FINE_DENOISE, x, FINE, silent) - exact).abs().max().item())
    assert errors[-1] < 0.01
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    np.testing.assert_allclose(ratios, 2, atol=0.2)


def test_inversion_converges_to_the_flow_at_first_order() -> None:
    x0 = torch.tensor([-0.8, 0.1, 0.4, 0.9], dtype=torch.float64).reshape(4, 1, 1, 1)
    errors = []
    for steps in (256, 512, 1024):
        sampler = DDIM(steps, 0.0, grid=Trailing(), clip=False)
        exact = flow(x0, 1.0, FINE_BARS[-1])
        errors.append((sampler.invert(FINE_DENOISE, x0, FINE) - exact).abs().max().item())
    assert errors[-1] < 0.02
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    np.testing.assert_allclose(ratios, 2, atol=0.2)


def test_inversion_and_sampling_return_the_image_up_to_the_step() -> None:
    x0 = torch.tensor([-0.8, 0.1, 0.4, 0.9], dtype=torch.float64).reshape(4, 1, 1, 1)
    errors = []
    for steps in (64, 128, 256, 512):
        sampler = DDIM(steps, 0.0, clip=False)
        latent = sampler.invert(FINE_DENOISE, x0, FINE)
        errors.append((sampler(FINE_DENOISE, latent, FINE, silent) - x0).abs().max().item())
    assert errors[-1] < 0.03
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    np.testing.assert_allclose(ratios, 2, atol=0.1)


def test_inversion_starts_from_the_image_itself_and_not_from_a_prediction_of_it() -> None:
    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(x0=torch.full_like(x_t, 9.0), eps=torch.full_like(x_t, 0.7))

    x0 = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)
    latent = DDIM(1, grid=Trailing()).invert(denoise, x0, FINE)
    bar = FINE_BARS[-1]
    assert latent.item() == pytest.approx(math.sqrt(bar) * 0.3 + math.sqrt(1 - bar) * 0.7, rel=1e-12)


def test_inversion_ignores_eta_and_clipping() -> None:
    x0 = torch.full((1, 1, 1, 1), 2.5, dtype=torch.float64)
    plain = DDIM(20, 0.0, clip=False).invert(FINE_DENOISE, x0, FINE)
    assert torch.equal(plain, DDIM(20, 1.0, clip=True).invert(FINE_DENOISE, x0, FINE))


def overshoot(x_t: Tensor, t: Tensor) -> Prediction:
    """Far outside the data, and of an eps that must not survive the clipping."""
    return Prediction(x0=torch.full_like(x_t, 3.0), eps=torch.full_like(x_t, 1e6))


def test_clipping_comes_before_the_step_and_eps_follows_from_it() -> None:
    process, bars = DiscreteProcess(), alpha_bars(linear_betas(1000))
    x = torch.tensor([[[[0.3]]]], dtype=torch.float64)
    first, second, _ = DDIM(2).path(overshoot, x, process, silent)
    bar, before = bars[501], bars[1]
    eps = (0.3 - math.sqrt(bar)) / math.sqrt(1 - bar)
    assert first.x0.item() == 1
    expected = math.sqrt(before) + math.sqrt(1 - before) * eps
    assert second.x_t.item() == pytest.approx(expected, abs=1e-12)


def test_ancestral_sampling_clips_before_the_posterior_mean() -> None:
    process, bars, betas = DiscreteProcess(), alpha_bars(linear_betas(1000)), linear_betas(1000)
    x = torch.tensor([[[[0.3]]]], dtype=torch.float64)
    start, after, *_ = Ancestral().path(overshoot, x, process, lambda: torch.zeros_like(x))
    beta, bar, before = betas[-1], bars[-1], bars[-2]
    assert start.x0.item() == 1
    expected = (math.sqrt(before) * beta + math.sqrt(1 - beta) * (1 - before) * 0.3) / (1 - bar)
    assert after.x_t.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("clip", "end"), [(True, 1.0), (False, 3.0)])
def test_clipping_is_an_option(clip: bool, end: float) -> None:
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for sampler in (DDIM(3, clip=clip), Ancestral(3, clip=clip), DPMSolver(3, clip=clip), Heun(5, clip=clip)):
        found = sampler(overshoot, x, DiscreteProcess(), lambda: torch.zeros_like(x))
        assert found.item() == pytest.approx(end)


@pytest.mark.parametrize(
    "sampler", [DDIM(9, eta=0.5), Ancestral(9), DPMSolver(9), Heun(17)], ids=["ddim", "ancestral", "dpm-solver", "heun"]
)
def test_a_path_has_one_state_more_than_steps_and_ends_in_the_sample(sampler: Sampler) -> None:
    x = torch.randn(2, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = list(sampler.path(FINE_DENOISE, x, FINE, seeded(x)))
    assert len(states) == 10
    assert torch.equal(states[0].x_t, x)
    assert torch.equal(torch.stack([state.t for state in states]), sampler.times(FINE))
    assert torch.equal(states[-1].x_t, sampler(FINE_DENOISE, x, FINE, seeded(x)))
    assert torch.equal(states[-1].x0, states[-1].x_t)


def test_progress_is_told_after_every_evaluation_of_the_network() -> None:
    evaluations = 0

    def counting(x_t: Tensor, t: Tensor) -> Prediction:
        nonlocal evaluations
        evaluations += 1
        return FINE_DENOISE(x_t, t)

    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    told: list[tuple[int, int, int]] = []

    def on_step(done: int, total: int) -> None:
        told.append((done, total, evaluations))

    DDIM(5)(counting, x, FINE, silent, on_step)
    assert told == [(i, 5, i) for i in range(1, 6)]
    evaluations = 0
    told.clear()
    DDIM(5).invert(counting, x, FINE, on_step)
    assert told == [(i, 5, i) for i in range(1, 6)]


def test_an_image_does_not_depend_on_its_batch() -> None:
    x = torch.randn(3, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draw = seeded(x, 1)
    noises = [draw() for _ in range(19)]
    together = Ancestral(20)(FINE_DENOISE, x, FINE, iter(noises).__next__)
    alone = Ancestral(20)(FINE_DENOISE, x[1:2], FINE, iter([n[1:2] for n in noises]).__next__)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ancestral(0), r"sampler.steps=0 must be at least 1"),
        (lambda: DDIM(-1), r"sampler.steps=-1 must be at least 1"),
        (lambda: DDIM(10, eta=1.5), r"sampler.eta=1.5 must lie in \[0, 1\].*--model.sampler.eta"),
        (lambda: DDIM(2000).times(DiscreteProcess()), r"sampler.steps=2000 must lie in 1 .. 1000"),
        (lambda: slerp(torch.ones(1, 2), torch.ones(1, 2), 1.2), r"weight=1.2"),
        (lambda: slerp(torch.ones(1, 2), torch.ones(1, 3), 0.5), r"\(1, 2\) and \(1, 3\)"),
    ],
)
def test_errors_name_the_value_and_the_bound(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def noises() -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return a, b


def test_slerp_starts_at_a_and_ends_at_b() -> None:
    a, b = noises()
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


def test_slerp_divides_the_angle_and_keeps_the_length() -> None:
    a, b = (n / n.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for n in noises())

    def angle(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).flatten(1).sum(1).arccos()

    for weight in (0.1, 0.5, 0.8):
        between = slerp(a, b, weight)
        torch.testing.assert_close(between.flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close(angle(a, between), weight * angle(a, b))
        torch.testing.assert_close(angle(between, b), (1 - weight) * angle(a, b))


def test_slerp_of_parallel_noises_stays_on_their_ray() -> None:
    a, _ = noises()
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, 2 * a, 0.25), 1.25 * a)


def test_slerp_treats_every_image_by_itself() -> None:
    a, b = noises()
    b[0] = a[0]
    together = slerp(a, b, 0.4)
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], slerp(a[i : i + 1], b[i : i + 1], 0.4))
