import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion_lit.diffusion import Gaussian, ImageNoise
from diffusion_lit.diffusion.noise import normals
from diffusion_lit.diffusion.philox import Words, philox

SHAPES = [(3, 8, 8), (1, 2, 2), (1,)]


def draws(seed: int, indices: list[int], shape: tuple[int, ...], count: int) -> Tensor:
    noise = ImageNoise(seed, indices, shape)
    return torch.stack([noise.draw() for _ in range(count)])


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def as_tensors(counter: list[int]) -> Words:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    # Random123, kat_vectors: philox4x32, 10 rounds.
    low, high = words(key)
    found = philox(as_tensors(words(counter)), low | high << 32)
    assert [int(word) for word in found] == words(expected)


def by_hand(counter: list[int], key: int) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key % 2**32, key >> 32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (1, 2), (2**64 - 1, 5), (2**40 + 3, 2**35 + 7)])
def test_noise_is_box_mullers_of_the_words_counted_by_block_draw_and_image(seed: int, index: int) -> None:
    noise = ImageNoise(seed, [3, index], (1, 3, 7))
    for draw in range(3):
        expected: list[float] = []
        for block in range(6):
            a, b, c, d = by_hand([block, draw, index % 2**32, index >> 32], seed)
            for u, v in ((a, b), (c, d)):
                length, turn = math.sqrt(-2 * math.log((u + 0.5) / 2**32)), 2 * math.pi * v / 2**32
                expected += [length * math.cos(turn), length * math.sin(turn)]
        np.testing.assert_allclose(noise.draw()[1].flatten().numpy(), expected[:21], rtol=1e-6, atol=1e-9)


def test_the_extreme_words_give_normals_between_0_and_seven() -> None:
    least, most = torch.tensor([0, 2**32 - 1]), torch.tensor([0, 0])
    large, small = normals(least, most)[0].tolist()
    assert large == pytest.approx(math.sqrt(2 * 33 * math.log(2)))
    assert 0 < small < 2e-5
    assert large < 6.77


@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_gets_the_same_bits_in_any_batch(shape: tuple[int, ...]) -> None:
    alone = draws(5, [42], shape, 3)
    together = draws(5, [7, 0, 42, 100_000], shape, 3)
    elsewhere = draws(5, [42, 1], shape, 3)
    assert torch.equal(alone[:, 0], together[:, 2])
    assert torch.equal(alone[:, 0], elsewhere[:, 0])


def test_images_seeds_and_draws_are_uncorrelated() -> None:
    shape, count = (3, 64, 64), 3 * 64 * 64
    streams = torch.cat([draws(0, [0, 1, 2], shape, 2).flatten(0, 1), draws(1, [0, 1], shape, 1)[0]])
    correlations = torch.corrcoef(streams.flatten(1))
    off_diagonal = correlations[~torch.eye(len(streams), dtype=torch.bool)]
    assert off_diagonal.abs().max() < 4.5 / count**0.5


def test_squares_of_images_and_draws_and_of_neighbours_in_an_image_are_uncorrelated() -> None:
    found = draws(0, list(range(4)), (4096,), 4).flatten(0, 1).square()
    by_lane = found.reshape(len(found), -1, 4).permute(0, 2, 1).flatten(0, 1)
    for rows in (found, by_lane):
        correlations = torch.corrcoef(rows)
        off_diagonal = correlations[~torch.eye(len(rows), dtype=torch.bool)]
        assert off_diagonal.abs().max() < 5 / rows.shape[1] ** 0.5


def test_no_two_images_draws_or_seeds_share_a_number() -> None:
    found = torch.cat([draws(seed, list(range(8)), (64,), 8).flatten(0, 1) for seed in (0, 1)])
    # Of 8192 numbers of 2^32 words and more, chance makes few pairs equal.
    assert len(set(found.flatten().tolist())) > found.numel() - 8


def test_seed_and_index_are_not_interchangeable() -> None:
    assert not torch.equal(draws(1, [2], (3, 4, 4), 1), draws(2, [1], (3, 4, 4), 1))
    assert not torch.equal(draws(0, [3], (3, 4, 4), 1), draws(3, [0], (3, 4, 4), 1))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 4)])
def test_noise_is_standard_normal(shape: tuple[int, ...]) -> None:
    values = draws(0, list(range(12)), shape, 8).flatten().numpy()
    assert stats.kstest(values, "norm").pvalue > 0.01


def test_noise_has_the_moments_of_a_standard_normal() -> None:
    values = draws(0, list(range(100)), (100, 100), 1).flatten().double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert values.pow(power).mean().item() == pytest.approx(moment, abs=4 * (variance / len(values)) ** 0.5)


def test_four_draws_of_the_same_place_are_independent_normals() -> None:
    squares = draws(0, [0], (20_000,), 4).square().sum(0).flatten().numpy()
    assert stats.kstest(squares, "chi2", (4,)).pvalue > 0.01


def test_first_draws_of_many_images_are_standard_normal() -> None:
    values = draws(0, list(range(4000)), (1, 1, 1), 1).flatten().numpy()
    assert stats.kstest(values, "norm").pvalue > 0.01


def test_noise_is_float32_of_one_row_for_each_image() -> None:
    noise = ImageNoise(0, [4, 9], (3, 5, 7)).draw()
    assert noise.shape == (2, 3, 5, 7)
    assert noise.dtype == torch.float32


@pytest.mark.parametrize(
    ("seed", "indices", "message"),
    [(-1, [0], "seed=-1 must lie in 0"), (2**64, [0], "seed=18446744073709551616 must"), (0, [1, -2], "not -2 .. 1")],
)
def test_a_seed_or_an_image_out_of_range_is_refused(seed: int, indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageNoise(seed, indices, (1, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_training_noise_is_torchs(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 2, 5, dtype=dtype)
    found = Gaussian().like(x, torch.Generator().manual_seed(0))
    assert torch.equal(found, torch.randn(3, 2, 5, dtype=dtype, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(1)
    found = Gaussian().like(x)
    torch.manual_seed(1)
    assert torch.equal(found, torch.randn(3, 2, 5, dtype=dtype))


def test_gaussian_sampling_noise_is_that_of_the_images() -> None:
    noise = Gaussian().images(7, [4, 9], (3, 2, 5), "cpu")
    found = torch.stack([noise.draw(), noise.draw()])
    assert torch.equal(found, draws(7, [4, 9], (3, 2, 5), 2))
