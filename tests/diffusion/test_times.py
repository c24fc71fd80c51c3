import pytest
import torch
from scipy import stats

from diffusion_lit.diffusion import DiscreteProcess, LogNormal, UniformTimes, VarianceExploding, VariancePreserving

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_on_a_chain_uniform_times_are_integers_from_1_to_T() -> None:
    t, weights = UniformTimes().draw(1000, DiscreteProcess(5), CPU, seeded())
    assert weights is None
    assert torch.equal(t, torch.randint(1, 6, (1000,), generator=seeded()).double() / 5)
    assert sorted(set(t.tolist())) == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_in_continuous_time_uniform_times_fill_the_interval_from_the_first_time_to_1() -> None:
    t, weights = UniformTimes().draw(20_000, VariancePreserving(first_time=0.25), CPU, seeded())
    assert weights is None
    assert t.dtype == torch.float64
    assert stats.kstest(t.numpy(), "uniform", (0.25, 0.75)).pvalue > 0.01


def test_the_logarithm_of_the_noise_level_is_normal() -> None:
    for process in (VarianceExploding(1e-6, 1e6), VariancePreserving(1e-3, 30.0, 1e-9)):
        t, weights = LogNormal(-1.2, 1.2).draw(20_000, process, CPU, seeded())
        assert weights is None
        assert stats.kstest((process.log_snr(t) / -2).numpy(), "norm", (-1.2, 1.2)).pvalue > 0.01


def test_noise_levels_outside_the_process_are_moved_to_its_ends() -> None:
    process = VarianceExploding(0.1, 1.0)
    t, _ = LogNormal(-1.2, 1.2).draw(20_000, process, CPU, seeded())
    assert t.min() == process.first_time == 0.1
    assert t.max() == 1
    low, high = stats.norm.cdf([(-2.302585 + 1.2) / 1.2, 1.2 / 1.2])
    assert (t == 0.1).double().mean().item() == pytest.approx(low, abs=0.01)
    assert (t == 1).double().mean().item() == pytest.approx(1 - high, abs=0.01)


def test_on_a_chain_log_normal_times_are_entries() -> None:
    t, _ = LogNormal().draw(100, DiscreteProcess(10), CPU, seeded())
    assert set((t * 10).tolist()) <= set(range(1, 11))


def test_a_deviation_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"times.std=0 must be above 0; EDM uses 1\.2"):
        LogNormal(std=0)


def test_times_up_to_a_largest_one_are_uniform_below_it() -> None:
    t, _ = UniformTimes(last=0.8).draw(20_000, DiscreteProcess(1000), CPU, seeded())
    assert (float(t.min()), float(t.max())) == (0.001, 0.8)
    assert float(t.mean()) == pytest.approx(0.4005, abs=0.005)
    t, _ = UniformTimes(last=0.5).draw(20_000, VariancePreserving(first_time=0.25), CPU, seeded())
    assert 0.25 <= float(t.min()) < 0.26
    assert 0.49 < float(t.max()) <= 0.5
    with pytest.raises(ValueError, match=r"last=1.5 must lie in \(0, 1\]"):
        UniformTimes(last=1.5)
