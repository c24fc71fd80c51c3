import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_lit.diffusion import (
    DiscreteProcess,
    FixedLarge,
    FixedSmall,
    FixedVariance,
    MinSNR,
    Simple,
    Variational,
    Velocity,
)
from tests.diffusion.gaussian import alpha_bars, linear_betas

T = 1000
TIMES = torch.arange(1, T + 1, dtype=torch.float64) / T
BARS = torch.from_numpy(alpha_bars(linear_betas(T)))
BETAS = torch.from_numpy(linear_betas(T))


def test_simple_weighs_every_time_alike() -> None:
    assert Simple()(DiscreteProcess(), TIMES).tolist() == [1.0] * T


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_smaller_of_snr_and_gamma_over_snr(gamma: float) -> None:
    snr = BARS[1:] / (1 - BARS[1:])
    expected = np.minimum(snr.numpy(), gamma) / snr.numpy()
    weights = MinSNR(gamma)(DiscreteProcess(), TIMES).numpy()
    np.testing.assert_allclose(weights, expected, rtol=1e-9)
    assert weights[0] < 1e-3
    assert weights[-1] == 1


def test_min_snr_refuses_a_gamma_of_0() -> None:
    with pytest.raises(ValueError, match=r"gamma=0 must be above 0; the paper uses 5"):
        MinSNR(0)


def posterior(x_t: torch.Tensor, x0: torch.Tensor | float) -> Normal:
    """q(x_{k-1} | x_k, x_0) for k = 2 .. T by Bayes' rule: precisions add, as do precision-weighted means."""
    beta, before = BETAS[1:], BARS[1:-1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() * x_t / beta + before.sqrt() * x0 / (1 - before)) / precision
    return Normal(mean, precision.rsqrt())


def reverse_deviation(variance: FixedVariance) -> torch.Tensor:
    small = posterior(torch.zeros(T - 1), 0.0).stddev
    return small if isinstance(variance, FixedSmall) else BETAS[1:].sqrt()


@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()], ids=["small", "large"])
def test_variational_times_the_error_is_what_the_divergence_gains(variance: FixedVariance) -> None:
    x0, eps, eps_hat = 0.6, 1.3, 0.4
    t = TIMES[1:]
    bar = BARS[2:]
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
    x0_hat = (x_t - (1 - bar).sqrt() * eps_hat) / bar.sqrt()
    truth = posterior(x_t, x0)
    wrong = kl_divergence(truth, Normal(posterior(x_t, x0_hat).mean, reverse_deviation(variance)))
    right = kl_divergence(truth, Normal(truth.mean, reverse_deviation(variance)))
    gained = Variational(variance)(DiscreteProcess(), t) * (eps - eps_hat) ** 2
    torch.testing.assert_close(gained, wrong - right, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()], ids=["small", "large"])
def test_reverse_variances_are_the_posteriors_and_the_chains(variance: FixedVariance) -> None:
    found = variance.between(DiscreteProcess(), TIMES[1:], TIMES[:-1])
    torch.testing.assert_close(found, reverse_deviation(variance) ** 2, rtol=1e-9, atol=0)


def test_the_last_steps_weight_is_that_of_a_gaussian_of_the_clipped_variance() -> None:
    weight = Variational(FixedLarge())(DiscreteProcess(), TIMES[:1]).item()
    # |x_0 - x0_hat|^2 = 1e-4 / 0.9999 |eps - eps_hat|^2.
    assert weight == pytest.approx(1e-4 / 0.9999 / (2 * math.exp(-9.81672514)), rel=1e-7)


def test_over_a_subsequence_the_large_variance_is_ddims_sigma_hat_squared() -> None:
    found = FixedLarge().between(DiscreteProcess(), TIMES[499], TIMES[99]).item()
    assert found == pytest.approx(1 - (BARS[500] / BARS[100]).item(), rel=1e-12)


def test_velocity_times_the_error_of_eps_is_the_error_of_v() -> None:
    bar = BARS[1:]
    x_t, eps, eps_hat = 0.8, 1.3, 0.4

    def v(eps: float) -> torch.Tensor:
        x0 = (x_t - (1 - bar).sqrt() * eps) / bar.sqrt()
        return bar.sqrt() * eps - (1 - bar).sqrt() * x0

    expected = (v(eps) - v(eps_hat)) ** 2
    found = Velocity()(DiscreteProcess(), TIMES) * (eps - eps_hat) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
