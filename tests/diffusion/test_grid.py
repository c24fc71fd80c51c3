import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_lit.diffusion import (
    DiscreteProcess,
    Grid,
    Karras,
    Leading,
    Linear,
    LogSNR,
    Process,
    Quadratic,
    Spanning,
    Trailing,
    Uniform,
    VarianceExploding,
    VariancePreserving,
)

GRIDS = [Uniform(), Quadratic(), Spanning(), Trailing(), LogSNR(), Karras()]


def named(part: object) -> str:
    return type(part).__name__


def indices(grid: Grid, steps: int, process: DiscreteProcess) -> list[int]:
    """The papers' indices, rising, counted from zero."""
    times = grid(steps, process)
    return [round(t * process.num_steps) - 1 for t in times[:-1].flip(0).tolist()]


def frozen_positions(name: str, steps: int, total: int, process: DiscreteProcess) -> Tensor:
    """The rules of version 0.1.0, as they were written there: positions counted from zero, before rounding down."""
    f64 = torch.float64

    def nearest(lambdas: Tensor) -> Tensor:
        return (process.time_at(2 * lambdas) * total).round().flip(0) - 1

    least, most = (process.log_snr(torch.tensor([1, 1 / total], dtype=f64)) / 2).tolist()
    high, low = min(80.0, math.exp(-least)) ** (1 / 7.0), max(0.002, math.exp(-most)) ** (1 / 7.0)
    rules: dict[str, Callable[[], Tensor]] = {
        "Uniform": lambda: torch.arange(steps, dtype=f64) * total / steps,
        "Quadratic": lambda: torch.linspace(0, (0.8 * total) ** 0.5, steps, dtype=f64).square() + 1e-9,
        "Spanning": lambda: torch.linspace(0, total - 1, steps, dtype=f64).round(),
        "Trailing": lambda: (torch.arange(1, steps + 1, dtype=f64) * total / steps).round() - 1,
        "LogSNR": lambda: nearest(torch.linspace(max(-5.1, least), most, steps, dtype=f64)),
        "Karras": lambda: nearest(-7.0 * torch.linspace(high, low, steps, dtype=f64).log()),
    }
    return rules[name]()


def frozen_times(name: str, steps: int, process: DiscreteProcess) -> Tensor:
    total = process.num_steps
    indices: list[int] = []
    for i, index in enumerate(frozen_positions(name, steps, total, process).floor().long().tolist()):
        lowest = indices[-1] + 1 if indices else 0
        indices.append(min(max(index, lowest), total - steps + i))
    times = (torch.tensor(indices, dtype=torch.float64) + 1) / total
    return torch.cat([times.flip(0), torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 101, 256, 1000, 4000])
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_on_a_chain_every_grid_is_bit_for_bit_that_of_version_0_1_0(grid: Grid, total: int) -> None:
    process = DiscreteProcess(total)
    every = range(1, total + 1) if total <= 101 else [*range(1, 40), *range(64, total, total // 7), total - 1, total]
    for steps in every:
        assert torch.equal(grid(steps, process), frozen_times(named(grid), steps, process)), steps


def test_spanning_and_trailing_round_halves_to_even() -> None:
    # Positions 0, 49.5 and 99, and times 12.5, 25, 37.5 and 50.
    assert indices(Spanning(), 3, DiscreteProcess(100)) == [0, 50, 99]
    assert indices(Spanning(), 3, DiscreteProcess(102)) == [0, 50, 101]
    assert indices(Trailing(), 4, DiscreteProcess(50)) == [11, 24, 37, 49]


CONTINUOUS = [VariancePreserving(), VariancePreserving(first_time=1e-3), VarianceExploding()]


@pytest.mark.parametrize("process", CONTINUOUS, ids=["vp", "vp from 1e-3", "ve"])
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_in_continuous_time_a_grid_has_s_distinct_times_within_the_process(grid: Grid, process: Process) -> None:
    for steps in (1, 2, 18, 999):
        times = grid(steps, process)
        assert times.shape == (steps + 1,)
        assert times[-1] == 0
        assert (times.diff() < 0).all()
        assert process.first_time <= times[-2]
        assert times[0] <= 1


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_a_grid_in_continuous_time_is_the_limit_of_those_of_long_chains(grid: Grid) -> None:
    # beta_k = beta(k / T) / T, in the limit T -> infinity.
    total = 200_000
    chain = DiscreteProcess(total, Linear(0.1 / total, 20 / total))
    for steps in (1, 7, 50):
        limit = grid(steps, VariancePreserving(first_time=1 / total))
        torch.testing.assert_close(grid(steps, chain), limit, rtol=1e-2, atol=3 / total)


def test_a_karras_grid_on_edms_process_has_edms_noise_levels() -> None:
    for count in (18, 40):
        sigmas = 80 * Karras(0.002, 80.0)(count, VarianceExploding(0.002, 80.0)).numpy()
        i = np.arange(count)
        expected = (80 ** (1 / 7) + i / (count - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        np.testing.assert_allclose(sigmas[:-1], expected, rtol=1e-12)


def test_a_log_snr_grid_in_continuous_time_is_even_in_lambda() -> None:
    for process in (VariancePreserving(), VarianceExploding()):
        lambdas = process.log_snr(LogSNR(-100.0)(20, process)[:-1]) / 2
        first, last = (process.log_snr(torch.tensor([1, process.first_time], dtype=torch.float64)) / 2).tolist()
        np.testing.assert_allclose(lambdas, np.linspace(first, last, 20), rtol=1e-6)


def test_times_that_coincide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampler.steps=30 are too many for Trailing.*first time is 0\.1"):
        Trailing()(30, VariancePreserving(first_time=0.1))
    with pytest.raises(ValueError, match=r"sampler.steps=0 must be at least 1"):
        Trailing()(0, VariancePreserving())


@pytest.mark.few(6)
@pytest.mark.parametrize("num_steps", [7, 1000])
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_a_grid_of_s_steps_has_exactly_s_distinct_entries(grid: Grid, num_steps: int) -> None:
    process = DiscreteProcess(num_steps)
    entries = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    for steps in range(1, num_steps + 1):
        times = grid(steps, process)
        assert times.shape == (steps + 1,)
        assert times[-1] == 0
        assert (times.diff() < 0).all()
        assert torch.isin(times, entries).all()


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_as_many_steps_as_the_chain_has_visit_all_of_it(grid: Grid) -> None:
    assert indices(grid, 1000, DiscreteProcess()) == list(range(1000))


@pytest.mark.parametrize("num_steps", [7, 1000, 4000])
def test_uniform_is_pythons_range_where_steps_divide_the_chain(num_steps: int) -> None:
    process = DiscreteProcess(num_steps)
    for steps in range(1, num_steps + 1):
        if num_steps % steps == 0:
            assert indices(Uniform(), steps, process) == list(range(0, num_steps, num_steps // steps))


def test_uniform_spreads_evenly_where_steps_do_not_divide_the_chain() -> None:
    gaps = np.diff(indices(Uniform(), 30, DiscreteProcess()))
    assert set(gaps.tolist()) == {33, 34}


def test_quadratic_has_ddims_ten_steps() -> None:
    expected = [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
    assert indices(Quadratic(), 10, DiscreteProcess()) == expected


def test_quadratic_moves_only_its_duplicates_up_to_the_next_free_time() -> None:
    # The reference's rule for S = 50 gives 49 distinct times.
    rule = (np.linspace(0, np.sqrt(800), 50) ** 2 + 1e-9).astype(int)
    assert len(set(rule.tolist())) == 49
    found = indices(Quadratic(), 50, DiscreteProcess())
    assert rule[:5].tolist() == [0, 0, 1, 2, 5]
    assert found == [0, 1, 2, 3, *rule[4:].tolist()]


def test_spanning_has_the_improved_ddpms_steps() -> None:
    # Its code's rule for 4000 steps and 7: strides of 3999 / 6, rounded.
    assert indices(Spanning(), 7, DiscreteProcess(4000)) == [0, 666, 1333, 2000, 2666, 3332, 3999]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 30, 999, 1000])
def test_trailing_starts_at_the_end_of_the_chain(steps: int) -> None:
    times = Trailing()(steps, DiscreteProcess())
    assert times[0] == 1


def test_trailing_has_lins_ten_steps() -> None:
    assert indices(Trailing(), 10, DiscreteProcess()) == list(range(99, 1000, 100))


def test_trailing_rounds_to_the_nearest_time() -> None:
    assert indices(Trailing(), 3, DiscreteProcess()) == [332, 666, 999]


@pytest.mark.parametrize("steps", [1001, 0, -3])
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_more_steps_than_the_chain_has_or_fewer_than_one_are_refused(grid: Grid, steps: int) -> None:
    message = rf"sampler.steps={steps} must lie in 1 .. 1000.*--model.sampler.steps 1000"
    with pytest.raises(ValueError, match=message):
        grid(steps, DiscreteProcess())


def test_the_grid_of_latent_diffusions_code() -> None:
    """Its DDIM visits range(0, 1000, 1000 // S) + 1, and ends at the first time, whose noise stays."""
    process = DiscreteProcess()
    grid = Leading(offset=1, clean=False)
    assert indices(grid, 200, process) == list(range(1, 1000, 5))
    assert float(grid(200, process)[-1]) == process.first_time
    assert indices(Leading(), 4, DiscreteProcess(10)) == [0, 2, 4, 6]
    assert torch.equal(Leading()(50, process), Uniform()(50, process))
    # Where there is no room for the offset, it is given up.
    assert indices(Leading(1), 10, DiscreteProcess(10)) == list(range(10))
    with pytest.raises(ValueError, match="offset=-1 must be at least 0"):
        Leading(-1)
