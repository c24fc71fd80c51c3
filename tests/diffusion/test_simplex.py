import numpy as np
import pytest
import torch
from opensimplex import OpenSimplex
from torch import Tensor

from diffusion_lit.diffusion import NormalizedSimplex, Simplex
from diffusion_lit.diffusion.simplex import VARIANCE, simplex


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def permutation_of(noise: OpenSimplex) -> Tensor:
    return torch.tensor(np.array(noise._perm))[None]


def points(count: int, size: float = 100.0) -> Tensor:
    return (torch.rand(3, 1, count, generator=seeded(), dtype=torch.float64) - 0.5) * size


@pytest.mark.parametrize("seed", [1, 7])
def test_values_are_those_of_opensimplex_except_for_lattice_points_that_it_leaves_out(seed: int) -> None:
    reference = OpenSimplex(seed)
    where = points(3000)
    ours = simplex(permutation_of(reference), *where)[0].double()
    theirs = torch.tensor([reference.noise3(*map(float, point)) for point in where[:, 0].T])
    error = (ours - theirs).abs()
    assert error.quantile(0.95) < 1e-6
    assert error.max() < 2e-4
    assert theirs.abs().max() > 0.5


def test_a_field_is_the_published_sum_of_octaves() -> None:
    reference = OpenSimplex(3)
    source = Simplex(octaves=3, persistence=0.8, wavelength=16)
    field = source.field(permutation_of(reference), torch.tensor([37]), (2, 12, 9))
    expected = sum(
        0.8**o
        * reference.noise3array(np.arange(9) * 2**o / 16, np.arange(12) * 2**o / 16, np.array([37 * 2**o / 16]))[0]
        for o in range(3)
    )
    torch.testing.assert_close(field[0, 0].double(), torch.tensor(expected), atol=5e-4, rtol=0)
    assert torch.equal(field[0, 0], field[0, 1])


def test_the_variance_of_the_noise_is_its_closed_form() -> None:
    keys = torch.rand(400, 256, generator=seeded()).argsort(dim=1)
    where = (torch.rand(3, 400, 500, generator=seeded(1), dtype=torch.float64) - 0.5) * 100
    values = simplex(keys, *where)
    assert float(values.square().mean()) == pytest.approx(VARIANCE, rel=0.01)
    assert abs(float(values.mean())) < 0.005


def test_the_noise_has_no_jumps() -> None:
    keys = torch.rand(1, 256, generator=seeded()).argsort(dim=1)
    line = torch.linspace(0, 40, 40_001, dtype=torch.float64)[None]
    steps = simplex(keys, line, 0.61 * line, 0.37 * line).diff().abs()
    # The slope of the noise is below 3, and a neighbour that is forgotten leaves a jump of up to 1e-2.
    assert steps.max() < 3e-3


def test_the_published_field_is_half_of_variance_and_smooth_and_the_normalized_one_has_variance_one() -> None:
    zeros = torch.zeros(60, 1, 64, 64)
    field = Simplex().like(zeros, seeded())
    assert float(field.std()) == pytest.approx(0.505, abs=0.03)
    neighbours = torch.stack([field[..., 1:].flatten(), field[..., :-1].flatten()])
    assert float(torch.corrcoef(neighbours)[0, 1]) == pytest.approx(0.96, abs=0.02)
    normalized = NormalizedSimplex().like(zeros, seeded())
    torch.testing.assert_close(normalized * Simplex().std, field)


def test_training_noise_differs_between_images_and_follows_the_generator() -> None:
    x = torch.zeros(3, 2, 8, 8, dtype=torch.float64)
    first = Simplex(wavelength=8).like(x, seeded())
    assert torch.equal(first, Simplex(wavelength=8).like(x, seeded()))
    assert (first[0] - first[1]).abs().max() > 0.1
    assert (first.shape, first.dtype) == (x.shape, x.dtype)


def test_draw_n_of_image_i_depends_on_seed_i_and_n_alone() -> None:
    source, shape = Simplex(octaves=2, wavelength=8), (1, 8, 8)
    together, alone = source.images(5, [4, 9, 2**40], shape), source.images(5, [9], shape)
    draws = [(together.draw()[1], alone.draw()[0]) for _ in range(3)]
    for a, b in draws:
        assert torch.equal(a, b)
    assert (draws[0][0] - draws[1][0]).abs().max() > 0.1
    other_seed, other_image = source.images(6, [9], shape).draw()[0], source.images(5, [8], shape).draw()[0]
    assert (draws[0][0] - other_seed).abs().max() > 0.1
    assert (draws[0][0] - other_image).abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"octaves": 0}, "octaves=0"), ({"persistence": 0}, "persistence=0"), ({"wavelength": -1}, "-1")],
)
def test_settings_that_make_no_noise_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Simplex(**settings)  # type: ignore[arg-type]
