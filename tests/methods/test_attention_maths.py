"""Prompt-to-Prompt on small matrices, against its definitions written out in loops and against other programs."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from diffusion_lit.diffusion import DDIM, Ancestral, DiscreteProcess, DPMSolver, Heun, Sampler
from diffusion_lit.methods.prompt_to_prompt.alignment import Alignment, refinement, replacement
from diffusion_lit.methods.prompt_to_prompt.control import Change, Clock, Maps, blend_mask, steer, steps_of
from diffusion_lit.types import Prediction

PROCESS = DiscreteProcess(100)


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def spread(*sizes: int) -> list[tuple[str, list[int]]]:
    """Words of so many tokens each, behind one token that begins the text."""
    ends = np.cumsum([1, *sizes]).tolist()
    return [(f"word{n}", list(range(a, b))) for n, (a, b) in enumerate(pairwise(ends))]


# Alignments


def test_a_swapped_word_of_as_many_tokens_gives_the_identity() -> None:
    alignment = replacement(spread(1, 2, 1), spread(1, 2, 1), 8)
    assert torch.equal(alignment.matrix, torch.eye(8))
    assert alignment.taken.all()


def test_a_swapped_word_of_other_length_is_spread_and_what_follows_moves_along() -> None:
    # begin, a, [one token -> three tokens], end, fill, fill
    matrix, taken = replacement(spread(1, 1), spread(1, 3), 6)
    third = 1 / 3
    expected = [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, third, third, third, 0],
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    torch.testing.assert_close(matrix, torch.tensor(expected))
    assert taken.all()
    # And the other way: both tokens go to the one, and the last token of the target has no source.
    matrix, taken = replacement(spread(1, 2, 1), spread(1, 1, 1), 6)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
    ]
    torch.testing.assert_close(matrix, torch.tensor(expected).float())
    assert taken.tolist() == [True] * 5 + [False]


def needleman_wunsch(source: Sequence[int], target: Sequence[int]) -> int:
    """The best score of an alignment, by its recursive definition: gap 0, match 1, mismatch -1."""

    @cache
    def best(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return 0
        pair = 1 if source[i - 1] == target[j - 1] else -1
        return max(best(i - 1, j - 1) + pair, best(i - 1, j), best(i, j - 1))

    return best(len(source), len(target))


def test_a_refined_text_is_aligned_as_well_as_needleman_and_wunsch_would() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        source, target = (generator.integers(0, 4, 9).tolist() for _ in range(2))
        matrix, taken = refinement(source, target)
        pairs = matrix.nonzero().tolist()
        assert all(source[i] == target[j] for i, j in pairs)
        assert pairs == sorted(pairs)
        assert [j for _, j in pairs] == sorted({j for _, j in pairs})
        assert [i for i, _ in pairs] == sorted({i for i, _ in pairs})
        assert len(pairs) == needleman_wunsch(source, target)
        assert taken.tolist() == [j in {b for _, b in pairs} for j in range(9)]


def test_a_new_word_has_no_source_and_what_fills_up_the_text_is_aligned_in_order() -> None:
    # begin a three end fill fill fill -> begin a bold three end fill fill
    matrix, taken = refinement([2, 10, 11, 3, 0, 0, 0], [2, 10, 12, 11, 3, 0, 0])
    assert matrix.nonzero().tolist() == [[0, 0], [1, 1], [2, 3], [3, 4], [4, 5], [5, 6]]
    assert taken.tolist() == [True, True, False, True, True, True, True]


# Changes of maps


def change(seed: int = 0, factors: Tensor | None = None) -> tuple[Change, list[Alignment]]:
    """Two images of 5 tokens: a spread word, and a word that is new; windows that differ by token."""
    alignments = [replacement(spread(1, 1), spread(1, 2), 5), refinement([1, 2, 3, 0, 0], [1, 9, 2, 3, 0])]
    windows = torch.tensor([[0, 3], [1, 4], [0, 5], [2, 2], [0, 4]]).repeat(2, 1, 1)
    factors = torch.tensor([[1, 2, 1, -1, 1], [0.5, 1, 3, 1, 1]]) if factors is None else factors
    return Change.of(alignments, factors, windows), alignments


def test_maps_change_as_the_definition_says() -> None:
    made, alignments = change()
    heads, positions, tokens = 3, 4, 5
    source, target = weights(2, heads, positions, tokens), weights(2, heads, positions, tokens, seed=1)
    for step in range(6):
        found = made(source, target, step)
        for b, h, p, j in product(range(2), range(heads), range(positions), range(tokens)):
            if not made.first[b, j] <= step < made.end[b, j]:
                expected = target[b, h, p, j]
            elif alignments[b].taken[j]:
                shares = alignments[b].matrix[:, j]
                expected = sum(source[b, h, p, i] * shares[i] for i in range(tokens)) * made.factors[b, j]
            else:
                expected = target[b, h, p, j] * made.factors[b, j]
            assert float(found[b, h, p, j]) == pytest.approx(float(expected), abs=1e-6)


def test_a_factor_changes_the_column_of_its_word_only_and_rows_are_not_normalized_anew() -> None:
    same = [replacement(spread(1, 1), spread(1, 1), 4)]
    factors = torch.tensor([[1.0, 1.0, 5.0, 1.0]])
    source = weights(1, 2, 9, 4)
    found = Change.of(same, factors, torch.tensor([[[0, 1]] * 4]))(source, weights(1, 2, 9, 4, seed=1), 0)
    assert torch.equal(found[..., [0, 1, 3]], source[..., [0, 1, 3]])
    assert torch.equal(found[..., 2], 5 * source[..., 2])
    torch.testing.assert_close(found.sum(-1), 1 + 4 * source[..., 2])


@pytest.mark.parametrize("rest", [0, 4])
def test_only_targets_change_and_only_while_they_may(rest: int) -> None:
    made, _ = change()
    clock = Clock(torch.linspace(1, 0, 11))
    control = steer(frozenset({"cross"}), made, clock, (2, 5), 16, None)
    cross = weights(4 + rest, 2, 9, 5)
    for clock.step in range(7):
        found = control("cross", cross)
        assert torch.equal(found[[0, 1, *range(4, 4 + rest)]], cross[[0, 1, *range(4, 4 + rest)]])
        assert torch.equal(found[2:4], made(cross[:2], cross[2:4], clock.step))
        for positions, small in ((16, True), (25, False)):
            own = weights(4 + rest, 2, positions, positions)
            expected = own.clone()
            if small and clock.step in (2, 3, 4):
                expected[2:4] = own[:2]
            assert torch.equal(control("own", own), expected)


def test_windows_are_those_of_the_authors_code() -> None:
    # attention by time and word: int(end * (S + 1)); self-attention: int(end * S).
    assert steps_of((0, 0.8), 51) == (0, 40)
    assert steps_of((0.2, 1.0), 51) == (10, 51)
    assert steps_of((0, 0.4), 50) == (0, 20)
    assert steps_of((0, 0.58), 50) == (0, 29)


# Steps of samplers


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (DDIM(6), [0, 1, 2, 3, 4, 5]),
        (Ancestral(4), [0, 1, 2, 3]),
        (DPMSolver(5, order=3), [0, 1, 2, 3, 4]),
        (Heun(5), [0, 1, 1, 2, 2]),
    ],
    ids=["ddim", "ancestral", "dpm-solver", "heun"],
)
def test_the_number_of_a_step_follows_from_the_time_of_the_sampler(sampler: Sampler, steps: list[int]) -> None:
    clock, seen = Clock(sampler.times(PROCESS)), []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        seen.append(clock.step)
        return Prediction(x_t, x_t)

    x = torch.zeros(2, 1, 2, 2)
    sampler(clock.watch(denoise), x, PROCESS, lambda: torch.zeros_like(x))
    assert seen == steps


def test_a_trajectory_goes_on_from_what_it_was_amended_to() -> None:
    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(0.5 * x_t, x_t)

    x, sampler, seen = torch.ones(1, 1, 1, 2), DDIM(4, clip=False), []

    def amend(x_s: Tensor, s: Tensor) -> Tensor:
        seen.append(float(s))
        return torch.stack([x_s[..., 0], torch.full_like(x_s[..., 1], len(seen))], -1)

    plain = sampler(denoise, x, PROCESS, lambda: x)
    found = sampler(denoise, x, PROCESS, lambda: x, amend=amend)
    assert torch.equal(found[..., 0], plain[..., 0])
    assert found[..., 1].item() == 4
    assert seen == sampler.times(PROCESS)[1:].tolist()


# Maps that are kept


def test_a_word_s_map_is_the_mean_over_heads_layers_and_steps_of_one_resolution() -> None:
    maps = Maps(frozenset({"a", "b", "fine"}), 2, most=9)
    expected = torch.zeros(2, 9, 4)
    for seed in range(3):
        for name in ("a", "b"):
            seen = weights(5, 2, 9, 4, seed=seed)
            assert torch.equal(maps.add(name, seen), seen)
            expected += seen[:2].mean(1)
    maps.add("fine", weights(2, 2, 16, 4))
    maps.add("own", weights(2, 2, 9, 9))
    places = torch.tensor([[False, True, True, False], [True, False, False, False]])
    found = maps.of(places)
    torch.testing.assert_close(found[0], (expected[0, :, 1] + expected[0, :, 2]).reshape(3, 3))
    torch.testing.assert_close(found[1], expected[1, :, 0].reshape(3, 3))


def test_the_mask_is_where_one_of_the_two_maps_is_near_its_maximum() -> None:
    maps = weights(4, 36, seed=3).reshape(4, 6, 6) ** 2
    found = blend_mask(maps, (12, 12), 0.3)
    for b in range(2):
        masks = []
        for map_ in (maps[b].numpy(), maps[2 + b].numpy()):
            wide = ndimage.maximum_filter(map_, 3, mode="constant", cval=0).repeat(2, 0).repeat(2, 1)
            masks.append(wide / wide.max() > 0.3)
        assert np.array_equal(found[b, 0].numpy(), masks[0] | masks[1])
    assert 0 < int(found.sum()) < found.numel()
    assert not blend_mask(torch.zeros(2, 3, 3), (3, 3), 0.3).any()
