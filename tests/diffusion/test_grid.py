import numpy as np
import pytest
import torch

from diffusion_lit.diffusion import DiscreteProcess, Grid, Karras, LogSNR, Quadratic, Spanning, Trailing, Uniform

GRIDS = [Uniform(), Quadratic(), Spanning(), Trailing(), LogSNR(), Karras()]


def named(part: object) -> str:
    return type(part).__name__


def indices(grid: Grid, steps: int, process: DiscreteProcess) -> list[int]:
    """The papers' indices, rising, counted from zero."""
    times = grid(steps, process)
    return [round(t * process.num_steps) - 1 for t in times[:-1].flip(0).tolist()]


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
    message = rf"sampler.steps={steps} must lie in 1 .. 1000.*init_args.steps"
    with pytest.raises(ValueError, match=message):
        grid(steps, DiscreteProcess())
