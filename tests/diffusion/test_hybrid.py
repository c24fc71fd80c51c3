import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from diffusion_lit.diffusion import (
    Denoiser,
    DenoisingLoss,
    DiscreteProcess,
    Eps,
    FixedLarge,
    Hybrid,
    LearnedRange,
    Linear,
    LossSecondMoment,
    Objective,
    Seen,
    VariationalBound,
)
from diffusion_lit.diffusion.likelihood import bits_per_dim
from diffusion_lit.types import Condition, Prediction
from tests.diffusion.gaussian import alpha_bars, linear_betas, scalar_data

T = 20
PROCESS = DiscreteProcess(T, Linear(2e-3, 0.3))
BETAS = torch.from_numpy(linear_betas(T, 2e-3, 0.3))
BARS = torch.from_numpy(alpha_bars(BETAS.numpy()))
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
EDGES = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])


class Linearly(nn.Module):
    """Says mean * x for the noise and spread * x for the variance, and remembers what it was asked."""

    def __init__(self, mean: float = 0.6, spread: float = 0.5) -> None:
        super().__init__()
        self.mean, self.spread = (nn.Parameter(torch.tensor(c, dtype=torch.float64)) for c in (mean, spread))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.asked.append((x, time.long() + 1))
        return torch.cat([self.mean * x, self.spread * x], dim=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int) -> Tensor:
    return LEVELS[torch.randint(256, (count, 1, 2, 2), generator=seeded(7))]


def bits_of(network: Linearly, x0: Tensor) -> Tensor:
    """The term of each image of the last batch in bits per dimension, by torch.distributions and scipy."""
    x, ks = network.asked[-1]
    mean, spread = float(network.mean), float(network.spread)
    terms = []
    for x_k, clean, k in zip(x, x0, ks.tolist(), strict=True):
        beta, before, bar = BETAS[k - 1], BARS[k - 1], BARS[k]
        x0_hat = (x_k - (1 - bar).sqrt() * mean * x_k) / bar.sqrt()
        second = BETAS[1] * (1 - BARS[1]) / (1 - BARS[2])
        small = second if k == 1 else beta * (1 - before) / (1 - bar)
        share = (spread * x_k + 1) / 2
        deviation = (share * beta.log() + (1 - share) * small.log()).exp().sqrt()
        if k == 1:
            level = ((clean + 1) * 127.5).round().long()
            low, high = (torch.from_numpy(EDGES)[level + i] for i in (0, 1))
            p = torch.from_numpy(stats.norm.cdf(high, x0_hat, deviation) - stats.norm.cdf(low, x0_hat, deviation))
            terms.append(-p.clamp(min=1e-12).log().mean())
            continue
        # Bayes' rule: precisions add, as do precision-weighted means.
        precision = (1 - beta) / beta + 1 / (1 - before)

        of_x0, of_x = before.sqrt() / (1 - before) / precision, (1 - beta).sqrt() / beta / precision
        truth = Normal(of_x * x_k + of_x0 * clean, precision.rsqrt())
        terms.append(kl_divergence(truth, Normal(of_x * x_k + of_x0 * x0_hat, deviation)).mean())
    return torch.stack(terms) / math.log(2)


def run(objective: Objective, network: nn.Module, x0: Tensor) -> dict[str, Tensor]:
    return objective(Denoiser(network, Eps(), PROCESS), x0, {}, generator=seeded())


@torch.no_grad()
def test_the_bound_alone_is_t_times_the_divergence_at_the_times_drawn() -> None:
    network, x0 = Linearly(), images(200)
    found = run(VariationalBound(), network, x0)
    assert set((found["t"] * T).round().tolist()) == set(range(1, T + 1))
    expected = T * bits_of(network, x0)
    torch.testing.assert_close(found["losses"], expected, rtol=1e-6, atol=1e-9)
    assert found["loss"].item() == pytest.approx(expected.mean().item(), rel=1e-6)


@torch.no_grad()
def test_hybrid_adds_t_over_1000_times_the_divergence_to_the_simple_loss() -> None:
    network, x0 = Linearly(), images(200)
    simple = run(DenoisingLoss(), network, x0)
    found = run(Hybrid(), network, x0)
    assert torch.equal(found["t"], simple["t"])
    expected = simple["losses"] + T / 1000 * bits_of(network, x0)
    torch.testing.assert_close(found["losses"], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found["loss"], found["losses"].mean())
    assert torch.equal(run(Hybrid(weight=0), network, x0)["losses"], simple["losses"])


def test_in_hybrid_the_bound_trains_the_variance_and_not_the_mean() -> None:
    def gradients(objective: Objective) -> tuple[float, float]:
        network = Linearly()
        run(objective, network, images(64))["loss"].backward()  # type: ignore[no-untyped-call]
        assert network.mean.grad is not None
        return float(network.mean.grad), float(0 if network.spread.grad is None else network.spread.grad)

    (simple, none), (hybrid, some) = gradients(DenoisingLoss()), gradients(Hybrid(weight=1.0))
    assert hybrid == pytest.approx(simple, rel=1e-12)
    assert none == 0
    assert abs(some) > 1e-3
    mean, spread = gradients(VariationalBound())
    assert abs(mean) > 1e-3
    assert abs(spread) > 1e-3


@pytest.mark.parametrize("objective", [Hybrid(), VariationalBound()], ids=["hybrid", "bound"])
@pytest.mark.parametrize("spread", [-20.0, 0.0, 20.0])
def test_gradients_are_finite_whatever_the_variance(objective: Objective, spread: float) -> None:
    network = Linearly(spread=spread)
    found = objective(Denoiser(network, Eps(), DiscreteProcess(2)), images(40), {}, generator=seeded())
    assert set(found["t"].tolist()) == {0.5, 1.0}
    found["loss"].backward()  # type: ignore[no-untyped-call]
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite()


def test_losses_are_in_the_precision_of_the_images() -> None:
    found = run(Hybrid(), Linearly().float(), images(4).float())
    assert found["loss"].dtype == found["losses"].dtype == torch.float32
    assert not found["losses"].requires_grad


def test_the_bound_can_be_minimised_with_a_fixed_variance_too() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            return 0.5 * x

    x0 = images(8)
    found = run(VariationalBound(FixedLarge()), One(), x0)
    assert found["losses"].shape == (8,)
    with pytest.raises(ValueError, match="out_channels 2"):
        run(VariationalBound(), One(), x0)


def test_losses_of_all_processes_decide_where_times_are_drawn() -> None:
    objective = VariationalBound(times=LossSecondMoment(history=1, uniform=0.001))
    network = Linearly()
    before = run(objective, network, images(4000))["t"]
    every = torch.arange(1, T + 1, dtype=torch.float64) / T

    def with_another(tensor: Tensor) -> Tensor:
        # The other process saw the second half of the chain, where losses are 0.
        return torch.cat([tensor, torch.stack([every[T // 2 :], torch.zeros(T // 2, dtype=torch.float64)], dim=1)])

    seen = Seen(every[: T // 2], torch.ones(T // 2))
    objective.stepped(1, Denoiser(network, Eps(), PROCESS), seen, with_another)
    after = run(objective, network, images(4000))["t"]
    assert (before > 0.5).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (after > 0.5).double().mean().item() < 0.005


def test_a_chain_of_one_step_is_refused() -> None:
    for objective in (Hybrid(), VariationalBound()):
        with pytest.raises(ValueError, match="num_steps=1 must be at least 2"):
            objective(Denoiser(Linearly(), Eps(), DiscreteProcess(1)), images(2), {})


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight=-1 must be at least 0; the paper uses 0.001"):
        Hybrid(weight=-1)


def test_for_gaussian_data_the_best_learned_variance_makes_the_bound_tight() -> None:
    # Expectations over levels are sums, those over noise Gauss-Hermite quadratures: no sampling error.
    mean, deviation, betas = 0.1, 0.2, linear_betas(1000)
    bar, before = alpha_bars(betas)[1:], alpha_bars(betas)[:-1]
    # q(x_{k-1} | x_k) = the joint Gaussian's conditional variance.
    here, earlier = bar * deviation**2 + 1 - bar, before * deviation**2 + 1 - before
    true = earlier - (1 - betas) * earlier**2 / here
    small = betas * (1 - before) / (1 - bar)
    small[0] = small[1]
    best = torch.from_numpy(2 * np.log(true / small) / np.log(betas / small) - 1)
    process = DiscreteProcess()
    optimal = scalar_data(mean, deviation**2, alpha_bars(betas)).denoise(process)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        said = optimal(x_t, t)
        return Prediction(said.x0, said.eps, best[(t * 1000).round().long() - 1].reshape(-1, 1, 1, 1))

    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    probability = np.diff(stats.norm.cdf(EDGES, mean, deviation))
    x0 = LEVELS.repeat_interleave(12).reshape(-1, 1, 1, 1)
    noise = torch.from_numpy(nodes).repeat(256).reshape(-1, 1, 1, 1)
    weight = np.outer(probability, weights / weights.sum()).ravel()
    found = bits_per_dim(denoise, x0, process, LearnedRange(), lambda: noise, clip=False)
    bound = float(weight @ found.total.numpy())
    entropy = float(stats.entropy(probability, base=2))
    # All that is left: the prior, and a level's own width in the last step.
    ratio = true[0] / (true[0] + (2 / 255) ** 2 / 12)
    left = ratio - 1 - math.log(ratio) + bar[-1] * deviation**2 - bar[-1] - math.log(here[-1])
    assert bound == pytest.approx(entropy + left / 2 / math.log(2), abs=1.5e-3)
