import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion_lit.diffusion import DiscreteProcess, LossSecondMoment, VariancePreserving

CPU = torch.device("cpu")
CHAIN = DiscreteProcess(3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def told(times: LossSecondMoment, num_steps: int, pairs: list[tuple[int, float]]) -> LossSecondMoment:
    """Tells of (k, loss), k from 1."""
    times.probabilities(num_steps)
    k, losses = zip(*pairs, strict=True)
    times.update(torch.tensor(k, dtype=torch.float64) / num_steps, torch.tensor(losses))
    return times


def test_times_are_uniform_until_every_one_has_its_losses() -> None:
    pairs = [(k, 10.0**k) for k in (1, 2, 3) for _ in range(2)]
    times = told(LossSecondMoment(history=2), 3, pairs[:-1])
    assert times.probabilities(3).tolist() == pytest.approx([1 / 3] * 3)
    times = told(times, 3, pairs[-1:])
    assert times.probabilities(3)[2] > 0.8


def test_probabilities_are_root_mean_squares_and_a_uniform_share() -> None:
    pairs = [(1, 3.0), (1, 4.0), (2, 0.0), (2, 0.0), (3, 1.0), (3, -7.0)]
    times = told(LossSecondMoment(history=2, uniform=0.3), 3, pairs)
    roots = [math.sqrt((9 + 16) / 2), 0.0, math.sqrt((1 + 49) / 2)]
    expected = [0.7 * root / sum(roots) + 0.1 for root in roots]
    assert times.probabilities(3).tolist() == pytest.approx(expected, rel=1e-12)


def test_only_the_last_losses_of_a_time_count() -> None:
    pairs = [(1, 100.0), (2, 5.0), (1, 3.0), (2, 5.0), (1, 3.0), (1, 4.0)]
    expected = told(LossSecondMoment(history=2), 2, [(1, 3.0), (1, 4.0), (2, 5.0), (2, 5.0)]).probabilities(2)
    at_once = told(LossSecondMoment(history=2), 2, pairs)
    torch.testing.assert_close(at_once.probabilities(2), expected)
    one_by_one = LossSecondMoment(history=2)
    for pair in pairs:
        told(one_by_one, 2, [pair])
    torch.testing.assert_close(one_by_one.probabilities(2), expected)
    assert all(map(torch.equal, at_once.state_dict().values(), one_by_one.state_dict().values()))


def test_losses_that_are_not_finite_are_left_out() -> None:
    pairs = [(1, 3.0), (2, math.nan), (2, 5.0), (1, math.inf)]
    found = told(LossSecondMoment(history=1, uniform=1e-9), 2, pairs)
    assert found.state_dict()["counts"].tolist() == [1, 1]
    assert found.probabilities(2).tolist() == pytest.approx([3 / 8, 5 / 8])


def test_a_chain_without_any_loss_is_visited_uniformly() -> None:
    times = told(LossSecondMoment(history=1), 4, [(k, 0.0) for k in (1, 2, 3, 4)])
    assert times.probabilities(4).tolist() == [0.25] * 4


def test_draws_follow_the_probabilities_and_weights_undo_them() -> None:
    losses = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.1], dtype=torch.float64)
    times = told(LossSecondMoment(history=1, uniform=0.05), 5, [(k, float(losses[k - 1])) for k in range(1, 6)])
    t, weights = times.draw(100_000, DiscreteProcess(5), CPU, seeded())
    k = (t * 5).round().long()
    p = times.probabilities(5)
    counts = torch.bincount(k, minlength=6)[1:].numpy()
    assert stats.chisquare(counts, 100_000 * p.numpy()).pvalue > 0.01
    torch.testing.assert_close(weights, 1 / (5 * p[k - 1]))
    # Unbiased for whatever the losses are now, and for those it knows with far less variance than uniformly.
    for now in (losses, losses.flip(0)):
        estimates = weights * now[k - 1]
        assert estimates.mean().item() == pytest.approx(now.mean().item(), abs=4 * estimates.std().item() / 316)
    assert (weights * losses[k - 1]).var() < 0.02 * losses.var()


def test_a_state_holds_all_that_was_learned_as_plain_tensors() -> None:
    first = told(LossSecondMoment(history=2), 3, [(k, float(k)) for k in (1, 1, 1, 2, 2, 3, 3)])
    state: dict[str, Tensor] = first.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {"losses": (3, 2), "counts": (3,)}
    second = LossSecondMoment(history=2)
    second.load_state_dict(state)
    for times in (first, second):
        told(times, 3, [(1, 9.0), (3, 2.0)])
    assert all(map(torch.equal, first.draw(50, CHAIN, CPU, seeded()), second.draw(50, CHAIN, CPU, seeded())))
    second.load_state_dict({})
    assert second.probabilities(3).tolist() == pytest.approx([1 / 3] * 3)
    assert LossSecondMoment().state_dict() == {}


def test_what_does_not_fit_is_refused_with_the_remedy() -> None:
    state = told(LossSecondMoment(history=2), 3, [(1, 1.0)]).state_dict()
    with pytest.raises(ValueError, match=r"keeps 2 losses per time, these 10; set history of .*times to 2"):
        LossSecondMoment().load_state_dict(state)
    times = LossSecondMoment(history=2)
    times.load_state_dict(state)
    with pytest.raises(ValueError, match=r"chain of 3 steps, the process has 4; set .*num_steps 3"):
        times.draw(1, DiscreteProcess(4), CPU)
    settings: dict[str, Any]
    for settings in ({"history": 0}, {"uniform": 0.0}, {"uniform": 1.5}):
        with pytest.raises(ValueError, match=r"the paper has 10 and 0\.001"):
            LossSecondMoment(**settings)
    with pytest.raises(RuntimeError, match="before the first draw"):
        LossSecondMoment().update(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"LossSecondMoment is defined on a chain.*--model.process DiscreteProcess"):
        LossSecondMoment().draw(1, VariancePreserving(), CPU)
