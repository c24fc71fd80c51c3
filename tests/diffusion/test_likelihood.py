import math
from collections.abc import Callable

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion_lit.diffusion import (
    DiscreteProcess,
    FixedLarge,
    FixedSmall,
    ImageNoise,
    Linear,
    ReverseVariance,
)
from diffusion_lit.diffusion.likelihood import bits_per_dim, discretized_log_prob, prior_bits
from diffusion_lit.types import DenoiseFn, Prediction
from tests.diffusion.gaussian import alpha_bars, linear_betas, scalar_data

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
EDGES = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
VARIANCES = [FixedSmall(), FixedLarge()]
T_SHORT = 50
SHORT = DiscreteProcess(T_SHORT, Linear(2e-3, 0.3))
SHORT_BETAS = linear_betas(T_SHORT, 2e-3, 0.3)
SHORT_BARS = alpha_bars(SHORT_BETAS)


def named(part: object) -> str:
    return type(part).__name__


def constant(value: float) -> DenoiseFn:
    return lambda x_t, t: Prediction(x0=torch.full_like(x_t, value), eps=torch.zeros_like(x_t))


def seeded(x0: Tensor, seed: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x0.shape, dtype=x0.dtype, generator=generator)


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_the_prior_costs_what_ddpms_does(value: float) -> None:
    found = prior_bits(torch.full((2, 3, 4, 4), value), DiscreteProcess())
    assert found.tolist() == pytest.approx([2.911e-5] * 2, rel=2e-4)


def test_the_prior_is_the_divergence_from_a_standard_normal() -> None:
    x0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 3, 2, 2)
    bar = float(SHORT_BARS[-1])
    last = Normal(math.sqrt(bar) * x0, math.sqrt(1 - bar))
    standard = Normal(torch.zeros_like(x0), torch.ones_like(x0))
    expected = kl_divergence(last, standard).mean().item() / math.log(2)
    assert prior_bits(x0, SHORT).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 0.3), (-0.97, 0.01), (0.3, 0.004), (1.0, 0.0074)])
def test_the_decoders_256_probabilities_sum_to_1(mean: float, deviation: float) -> None:
    means, deviations = torch.full_like(LEVELS, mean), torch.tensor(deviation, dtype=torch.float64)
    total = discretized_log_prob(LEVELS, means, deviations).exp().sum().item()
    assert total == pytest.approx(1, abs=256e-12)


def test_the_decoder_integrates_a_gaussian_over_each_levels_interval() -> None:
    mean, deviation = 0.93, 0.05
    means, deviations = torch.full_like(LEVELS, mean), torch.tensor(deviation, dtype=torch.float64)
    found = discretized_log_prob(LEVELS, means, deviations).exp().numpy()
    expected = np.diff(stats.norm.cdf(EDGES, mean, deviation))
    # Levels far outside have no less than the clamp.
    np.testing.assert_allclose(found, np.maximum(expected, 1e-12), rtol=1e-9, atol=1e-15)


def interval(level: float, mean: float, deviation: float) -> float:
    """log of a level's probability, in 60 digits."""
    with mpmath.workdps(60):
        lower, upper = (mpmath.mpf(level) + mpmath.mpf(d) / 255 - mpmath.mpf(mean) for d in (-1, 1))
        above = mpmath.mpf(1) if level > 0.999 else mpmath.ncdf(upper / mpmath.mpf(deviation))
        below = mpmath.mpf(0) if level < -0.999 else mpmath.ncdf(lower / mpmath.mpf(deviation))
        return float(mpmath.log(max(above - below, mpmath.mpf("1e-12"))))


@pytest.mark.parametrize("deviation", [0.005, 0.05, 0.6])
@pytest.mark.parametrize("mean", [-0.9, 0.013, 0.6])
def test_both_tails_have_all_their_digits(mean: float, deviation: float) -> None:
    found = discretized_log_prob(LEVELS, torch.full_like(LEVELS, mean), torch.tensor(deviation, dtype=torch.float64))
    expected = [interval(level, mean, deviation) for level in LEVELS.tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_mirrored_images_have_the_same_probabilities() -> None:
    deviation = torch.tensor(0.04, dtype=torch.float64)
    means = torch.linspace(-0.8, 0.7, 256, dtype=torch.float64)
    found, mirrored = (discretized_log_prob(s * LEVELS, s * means, deviation) for s in (1, -1))
    assert torch.equal(found, mirrored)


@pytest.mark.parametrize("shape", [(2, 1, 2, 4), (2, 8)], ids=["not square", "vectors"])
def test_the_bound_does_not_depend_on_the_shape_of_an_image(shape: tuple[int, ...]) -> None:
    x0 = LEVELS[torch.randint(256, (2, 8, 1, 1), generator=torch.Generator().manual_seed(0))]

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(x0=0.5 * x_t, eps=x_t)

    def bound(x0: Tensor) -> Tensor:
        return bits_per_dim(denoise, x0, SHORT, FixedSmall(), seeded(x0), num_terms=7).total

    torch.testing.assert_close(bound(x0.reshape(shape)), bound(x0), rtol=1e-12, atol=0)


def test_float32_images_find_the_open_edges() -> None:
    ends = torch.tensor([0.0, 255.0]) / 127.5 - 1
    found = discretized_log_prob(ends, torch.tensor([-3.0, 3.0]), torch.tensor(0.01))
    assert found.tolist() == [0, 0]


@pytest.mark.parametrize("variance", VARIANCES, ids=named)
def test_terms_are_divergences_between_posterior_and_reverse(variance: ReverseVariance) -> None:
    x0 = torch.tensor([-0.7, 0.2, 0.9, -0.1], dtype=torch.float64).reshape(1, 1, 2, 2)
    fixed = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64).reshape(1, 1, 2, 2)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(x0=0.4 * x_t + 0.1, eps=x_t)

    found = bits_per_dim(denoise, x0, SHORT, variance, lambda: fixed, clip=False)
    assert found.ks.tolist() == [list(range(2, T_SHORT + 1))]
    for k, term in zip(found.ks[0].tolist(), found.terms[0].tolist(), strict=True):
        beta, before, bar = float(SHORT_BETAS[k - 1]), float(SHORT_BARS[k - 1]), float(SHORT_BARS[k])
        x_k = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * fixed
        # Bayes' rule: precisions add, as do precision-weighted means.
        precision = (1 - beta) / beta + 1 / (1 - before)

        def mean(x: Tensor) -> Tensor:
            return (math.sqrt(1 - beta) * x_k / beta + math.sqrt(before) * x / (1 - before)) / precision  # noqa: B023

        deviation = precision**-0.5 if isinstance(variance, FixedSmall) else beta**0.5
        reverse = Normal(mean(0.4 * x_k + 0.1), deviation)
        expected = kl_divergence(Normal(mean(x0), precision**-0.5), reverse).mean().item() / math.log(2)
        assert term == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_decoder_is_centred_on_the_prediction_of_the_first_step() -> None:
    x0 = LEVELS[[0, 100, 255]].reshape(1, 3, 1, 1)
    found = bits_per_dim(constant(-0.2), x0, DiscreteProcess(3), FixedLarge(), lambda: torch.zeros_like(x0))
    deviation = math.sqrt(linear_betas(3)[1] * 1e-4 / (1 - alpha_bars(linear_betas(3))[2]))
    level_width = 2 / 255
    inside = stats.norm.cdf([x0[0, 1, 0, 0] + 0.2 + d * level_width / 2 for d in (-1, 1)], scale=deviation)
    nats = -2 * math.log(1e-12) - math.log(inside[1] - inside[0])
    assert found.decoder.item() == pytest.approx(nats / 3 / math.log(2), rel=1e-9)


def test_the_parts_add_up_to_the_total() -> None:
    x0 = LEVELS[[3, 77, 140, 255]].reshape(2, 2, 1, 1)
    found = bits_per_dim(constant(0.1), x0, SHORT, FixedLarge(), seeded(x0))
    torch.testing.assert_close(found.total, found.prior + found.decoder + found.terms.sum(1))
    assert found.total.shape == found.prior.shape == found.decoder.shape == (2,)
    assert found.terms.shape == found.ks.shape == (2, T_SHORT - 1)
    assert found.total.dtype == torch.float64


def excess_bits(deviation: float, large: bool) -> float:
    """How far the optimal bound lies above the entropy of Gaussian data: what its fixed variances cost.

    The true reverse step is Gaussian; the model has its mean and another variance. Each step costs the
    divergence between the two. The decoder's width is widened by a level's own variance, width^2 / 12.
    """
    betas = linear_betas(1000)
    bar, before = alpha_bars(betas)[1:], alpha_bars(betas)[:-1]
    # q(x_{k-1} | x_k) = the joint Gaussian's conditional variance.
    here, earlier = bar * deviation**2 + 1 - bar, before * deviation**2 + 1 - before
    true = earlier - (1 - betas) * earlier**2 / here
    small = betas * (1 - before) / (1 - bar)
    model = betas.copy() if large else small
    model[0] = small[1] + (2 / 255) ** 2 / 12
    ratio = true / model
    prior = bar[-1] * deviation**2 - bar[-1] - math.log(here[-1])
    return float(np.sum(ratio - 1 - np.log(ratio)) + prior) / 2 / math.log(2)


@pytest.mark.few(1)
@pytest.mark.parametrize("variance", VARIANCES, ids=named)
def test_for_gaussian_data_the_bound_is_the_entropy_and_what_fixed_variances_cost(
    variance: ReverseVariance,
) -> None:
    # Expectations over levels are sums, those over noise Gauss-Hermite quadratures: no sampling error.
    mean, deviation = 0.1, 0.2
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    probability = np.diff(stats.norm.cdf(EDGES, mean, deviation))
    x0 = LEVELS.repeat_interleave(12).reshape(-1, 1, 1, 1)
    noise = torch.from_numpy(nodes).repeat(256).reshape(-1, 1, 1, 1)
    weight = np.outer(probability, weights / weights.sum()).ravel()
    process = DiscreteProcess()
    denoise = scalar_data(mean, deviation**2, alpha_bars(linear_betas(1000))).denoise(process)
    found = bits_per_dim(denoise, x0, process, variance, lambda: noise, clip=False)
    bound = float(weight @ found.total.numpy())
    entropy = float(stats.entropy(probability, base=2))
    expected = entropy + excess_bits(deviation, isinstance(variance, FixedLarge))
    assert bound > entropy
    assert bound == pytest.approx(expected, abs=1.5e-3)


def test_clipping_is_on_unless_turned_off() -> None:
    x0 = LEVELS[[50, 200]].reshape(1, 2, 1, 1)
    clipped = bits_per_dim(constant(3.0), x0, SHORT, FixedSmall(), seeded(x0))
    at_edge = bits_per_dim(constant(1.0), x0, SHORT, FixedSmall(), seeded(x0), clip=False)
    beyond = bits_per_dim(constant(3.0), x0, SHORT, FixedSmall(), seeded(x0), clip=False)
    torch.testing.assert_close(clipped.terms, at_edge.terms)
    assert (beyond.terms > clipped.terms).all()


def test_float32_images_lose_little() -> None:
    x0 = LEVELS[[3, 77, 140, 255]].reshape(1, 4, 1, 1)
    data = scalar_data(0.1, 0.04, SHORT_BARS).denoise(SHORT)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        x0_hat = torch.cat([data(x[:, None], t[:1]).x0 for x in x_t.double().unbind(1)], dim=1).to(x_t.dtype)
        return Prediction(x0=x0_hat, eps=x_t)

    noise = torch.tensor([0.3, -1.2, 0.8, 2.0]).reshape(1, 4, 1, 1)
    exact = bits_per_dim(denoise, x0, SHORT, FixedSmall(), lambda: noise)
    single = bits_per_dim(denoise, x0.float(), SHORT, FixedSmall(), lambda: noise)
    assert single.total.item() == pytest.approx(exact.total.item(), rel=1e-5)


@pytest.mark.parametrize("num_terms", [1, 5, 7, 30])
def test_a_strided_estimate_has_the_full_sum_as_its_mean(num_terms: int) -> None:
    # All offsets in turn: the first noise drawn decides the offset, a constant prediction ignores the rest.
    count = 49 * 20
    offsets = stats.norm.ppf((np.arange(count) + 0.5) / count)
    x0 = torch.full((count, 1, 1, 1), LEVELS[77].item(), dtype=torch.float64)
    noise = torch.from_numpy(offsets).reshape(-1, 1, 1, 1)
    found = bits_per_dim(constant(0.5), x0, SHORT, FixedLarge(), lambda: noise, num_terms)
    full = bits_per_dim(constant(0.5), x0[:1], SHORT, FixedLarge(), lambda: noise[:1])
    assert found.total.std() > 0
    assert found.total.mean().item() == pytest.approx(full.total.item(), rel=1e-9)
    hits = torch.bincount(found.ks.flatten(), minlength=T_SHORT + 1)
    assert hits[:2].tolist() == [0, 0]
    assert set(hits[2:].tolist()) == {count * num_terms // 49}


def test_strided_entries_are_rising_and_evenly_spaced() -> None:
    x0 = torch.zeros(64, 1, 1, 1, dtype=torch.float64)
    found = bits_per_dim(constant(0.5), x0, DiscreteProcess(), FixedLarge(), seeded(x0), 10)
    assert found.ks.shape == found.terms.shape == (64, 10)
    assert found.ks.min() >= 2
    assert found.ks.max() <= 1000
    assert set(found.ks.diff(dim=1).flatten().tolist()) <= {99, 100}
    assert len(set(found.ks[:, 0].tolist())) > 30


def test_an_images_bound_does_not_depend_on_its_batch() -> None:
    x0 = LEVELS[torch.randint(256, (3, 1, 2, 2), generator=torch.Generator().manual_seed(0))]

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(x0=0.5 * x_t, eps=x_t)

    def bound(indices: list[int]) -> Tensor:
        noise = ImageNoise(0, indices, (1, 2, 2))
        return bits_per_dim(denoise, x0[indices], SHORT, FixedSmall(), noise.draw, num_terms=6).total

    torch.testing.assert_close(bound([0, 1, 2])[1:2], bound([1]), rtol=1e-12, atol=0)


def test_progress_is_told_after_every_evaluation_of_the_network() -> None:
    told: list[tuple[int, int]] = []
    x0 = torch.zeros(1, 1, 1, 1)
    bits_per_dim(
        constant(0.0),
        x0,
        SHORT,
        FixedSmall(),
        seeded(x0),
        num_terms=3,
        on_step=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("num_terms", [0, T_SHORT])
def test_more_terms_than_the_chain_has_or_fewer_than_one_are_refused(num_terms: int) -> None:
    x0 = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match=rf"num_terms={num_terms} must lie in 1 .. 49.*lower it to 49"):
        bits_per_dim(constant(0.0), x0, SHORT, FixedSmall(), seeded(x0), num_terms)


def test_a_chain_of_one_step_is_refused() -> None:
    x0 = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"num_steps=1 must be at least 2"):
        bits_per_dim(constant(0.0), x0, DiscreteProcess(1), FixedSmall(), seeded(x0))
