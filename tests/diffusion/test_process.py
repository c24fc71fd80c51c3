import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from diffusion_lit.diffusion import (
    Cosine,
    Denoiser,
    DiscreteProcess,
    Eps,
    FixedLarge,
    FixedSmall,
    Linear,
    Schedule,
)
from tests.diffusion.gaussian import linear_betas


def times(num_steps: int) -> Tensor:
    return torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps


def at(k: int, num_steps: int = 1000) -> Tensor:
    return torch.tensor(k / num_steps, dtype=torch.float64)


def test_the_posterior_variance_has_ddpms_value() -> None:
    _, _, variance = DiscreteProcess().posterior(at(2), at(1))
    assert variance.item() == pytest.approx(5.4531876613e-5, rel=1e-10)


@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()])
def test_the_last_steps_log_variance_is_the_one_before(variance: FixedSmall | FixedLarge) -> None:
    log_variance = variance.between(DiscreteProcess(), at(1), at(0)).log()
    assert log_variance.item() == pytest.approx(-9.81672514, abs=1e-8)


def test_the_first_noise_level_keeps_its_digits() -> None:
    _, sigma = DiscreteProcess().alpha_sigma(at(1))
    assert sigma.item() ** 2 == pytest.approx(1e-4, rel=1e-11)


@pytest.mark.parametrize(("k", "j", "i"), [(1000, 500, 1), (2, 1, 0), (300, 299, 17)])
def test_transitions_compose_as_the_chain_does(k: int, j: int, i: int) -> None:
    process, betas = DiscreteProcess(), linear_betas(1000)
    gain, variance = 1.0, 0.0
    for beta in betas[i:k]:
        gain, variance = gain * math.sqrt(1 - beta), (1 - beta) * variance + beta
    alpha_ts, variance_ts = process.transition(at(k), at(i))
    assert alpha_ts.item() == pytest.approx(gain, rel=1e-11)
    assert variance_ts.item() == pytest.approx(variance, rel=1e-10)
    # Chapman-Kolmogorov through the time between.
    (a_kj, v_kj), (a_ji, v_ji) = process.transition(at(k), at(j)), process.transition(at(j), at(i))
    assert (a_kj * a_ji).item() == pytest.approx(gain, rel=1e-11)
    assert (a_kj**2 * v_ji + v_kj).item() == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
@pytest.mark.parametrize(("k", "j"), [(1000, 999), (1000, 1), (500, 400), (2, 1), (7, 0)])
def test_the_posterior_obeys_bayes_rule(k: int, j: int, schedule: Schedule) -> None:
    # The joint of (x_0, x_j, x_k) for x_0 ~ N(0, 1), by pushing the chain's linear maps through.
    betas = schedule.betas(1000).numpy()
    rows = np.zeros((1001, 1001))
    rows[0, 0] = 1.0
    for n in range(1, k + 1):
        rows[n] = np.sqrt(1 - betas[n - 1]) * rows[n - 1]
        rows[n, n] += np.sqrt(betas[n - 1])
    maps = rows[[0, j, k]]
    a, b, variance = (c.item() for c in DiscreteProcess(1000, schedule).posterior(at(k), at(j)))
    if j == 0:
        assert (a, b, variance) == pytest.approx((0, 1, 0), abs=1e-12)
        return
    covariance = maps @ maps.T
    known = covariance[np.ix_([0, 2], [0, 2])]
    weights = np.linalg.solve(known, covariance[[0, 2], 1])
    residual = maps[1] - weights @ maps[[0, 2]]
    assert b == pytest.approx(weights[0], rel=1e-8, abs=1e-12)
    assert a == pytest.approx(weights[1], rel=1e-8, abs=1e-12)
    assert variance == pytest.approx(residual @ residual, rel=1e-8)


def test_perturb_draws_what_the_chain_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    count, k = 200_000, 6
    process = DiscreteProcess(10, Linear(0.05, 0.3))
    x0 = torch.full((count,), 0.7, dtype=torch.float64)
    chain = x0
    for beta in linear_betas(10, 0.05, 0.3)[:k]:
        noise = torch.randn(count, dtype=torch.float64, generator=generator)
        chain = math.sqrt(1 - beta) * chain + math.sqrt(beta) * noise
    eps = torch.randn(count, dtype=torch.float64, generator=generator)
    direct = process.perturb(x0, eps, at(k, 10))
    assert direct.mean().item() == pytest.approx(chain.mean().item(), abs=0.01)
    assert direct.std().item() == pytest.approx(chain.std().item(), abs=0.01)


def test_one_time_for_each_image_acts_image_by_image() -> None:
    process = DiscreteProcess()
    x0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64)
    together = process.perturb(x0, eps, t)
    for i in range(3):
        torch.testing.assert_close(together[i], process.perturb(x0[i], eps[i], t[i]), rtol=0, atol=0)


def test_a_time_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="3 times for a batch of 2: give one t for each image"):
        DiscreteProcess().perturb(torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
@pytest.mark.parametrize("num_steps", [1, 10, 1000, 4000])
def test_time_at_inverts_log_snr_on_every_entry(num_steps: int, schedule: Schedule) -> None:
    process, t = DiscreteProcess(num_steps, schedule), times(num_steps)
    assert torch.equal(process.time_at(process.log_snr(t)), t)
    assert torch.equal(process.time_at(process.log_snr(t[-1])), t[-1])


def test_time_at_finds_the_ends_for_an_infinite_log_snr() -> None:
    found = DiscreteProcess().time_at(torch.tensor([math.inf, -math.inf]))
    assert found.tolist() == [0.001, 1.0]


def test_log_snr_is_the_log_of_the_ratio_of_powers() -> None:
    log_snr = DiscreteProcess().log_snr(at(501)).item()
    assert log_snr == pytest.approx(math.log(0.07779665836502 / (1 - 0.07779665836502)), abs=1e-11)
    assert DiscreteProcess().log_snr(at(0)).item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_steps", [1, 10, 1000, 4000])
def test_the_network_is_told_k_minus_1(num_steps: int, dtype: torch.dtype) -> None:
    t = (torch.arange(1, num_steps + 1, dtype=dtype) / num_steps).to(dtype)
    told = DiscreteProcess(num_steps).network_time(t)
    assert told.dtype == torch.float32
    assert told.tolist() == list(range(num_steps))


def test_a_long_chain_can_tell_the_network_of_time_as_if_it_had_1000_steps() -> None:
    process = DiscreteProcess(4000, Cosine(), network_steps=1000)
    told = process.network_time(torch.tensor([1, 2, 5, 4000], dtype=torch.float64) / 4000)
    assert told.dtype == torch.float32
    assert told.tolist() == [0, 0.25, 1, 999.75]


def test_a_network_cannot_be_told_of_a_chain_without_steps() -> None:
    with pytest.raises(ValueError, match=r"network_steps=0 must be at least 1"):
        DiscreteProcess(10, network_steps=0)


@pytest.mark.parametrize("num_steps", [1, 10, 1000, 4000])
def test_the_previous_time_is_one_entry_down_and_stops_at_0(num_steps: int) -> None:
    process, t = DiscreteProcess(num_steps), times(num_steps)
    assert process.index(process.previous(t)).tolist() == list(range(num_steps))
    assert process.previous(at(0)).item() == 0


def moved(module: Denoiser) -> list[nn.Module]:
    averaged = AveragedModel(module, use_buffers=True)
    averaged.update_parameters(module)
    averaged.update_parameters(module)
    return [
        copy.deepcopy(module).to(torch.bfloat16),
        copy.deepcopy(module).half(),
        copy.deepcopy(module).float(),
        averaged.module,
    ]


def test_casts_and_averages_leave_the_schedule_alone() -> None:
    network = nn.Conv2d(1, 1, 1)
    denoiser = Denoiser(network, Eps(), DiscreteProcess())
    expected = torch.stack(DiscreteProcess().alpha_sigma(times(1000)))
    for module in moved(denoiser):
        assert isinstance(module, Denoiser)
        assert torch.equal(torch.stack(module.process.alpha_sigma(times(1000))), expected)
    assert expected.dtype == torch.float64


def test_the_schedule_leaves_no_trace_in_a_checkpoint() -> None:
    network = nn.Conv2d(1, 1, 1)
    denoiser = Denoiser(network, Eps(), DiscreteProcess())
    assert set(denoiser.state_dict()) == {"network.weight", "network.bias"}
    assert not list(denoiser.buffers())


def test_a_chain_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"process\.num_steps=0 must lie in 1 \.\. 1000000; DDPM uses 1000"):
        DiscreteProcess(0)


def test_a_schedule_with_a_beta_of_1_is_refused() -> None:
    class Total(Schedule):
        def betas(self, num_steps: int) -> Tensor:
            return torch.ones(num_steps, dtype=torch.float64)

    with pytest.raises(ValueError, match=r"Total with 3 steps has a beta outside \(0, 1\): \[1, 1\]"):
        DiscreteProcess(3, Total())
