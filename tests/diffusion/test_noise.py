import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion_lit.diffusion import ImageNoise

SHAPES = [(3, 8, 8), (1, 2, 2), (1,)]


def draws(seed: int, indices: list[int], shape: tuple[int, ...], count: int) -> Tensor:
    noise = ImageNoise(seed, indices, shape)
    return torch.stack([noise.draw() for _ in range(count)])


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


def test_seed_and_index_are_not_interchangeable() -> None:
    assert not torch.equal(draws(1, [2], (3, 4, 4), 1), draws(2, [1], (3, 4, 4), 1))
    assert not torch.equal(draws(0, [3], (3, 4, 4), 1), draws(3, [0], (3, 4, 4), 1))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 4)])
def test_noise_is_standard_normal(shape: tuple[int, ...]) -> None:
    values = draws(0, list(range(12)), shape, 8).flatten().numpy()
    assert stats.kstest(values, "norm").pvalue > 0.01


def test_first_draws_of_many_images_are_standard_normal() -> None:
    values = draws(0, list(range(4000)), (1, 1, 1), 1).flatten().numpy()
    assert stats.kstest(values, "norm").pvalue > 0.01


def test_noise_is_float32_of_one_row_for_each_image() -> None:
    noise = ImageNoise(0, [4, 9], (3, 5, 7)).draw()
    assert noise.shape == (2, 3, 5, 7)
    assert noise.dtype == torch.float32
