import math

import pytest
import torch
from torch import Tensor

from diffusion_lit.diffusion import (
    Ancestral,
    Cosine,
    Denoiser,
    DiscreteProcess,
    Eps,
    FixedLarge,
    FixedSmall,
    FixedVariance,
    LearnedRange,
    Spanning,
)
from diffusion_lit.types import Condition, Prediction
from tests.diffusion.gaussian import alpha_bars, linear_betas

BETAS = linear_betas(1000)
BARS = alpha_bars(BETAS)


def at(k: int) -> Tensor:
    return torch.tensor(k / 1000, dtype=torch.float64)


def saying(v: Tensor) -> Prediction:
    return Prediction(x0=torch.zeros_like(v), eps=torch.zeros_like(v), extra=v)


def ends(k: int, j: int) -> tuple[float, float]:
    """(beta-tilde, beta) of the chain that has only the entries k and j, j > 0, of the whole one's."""
    beta = 1 - BARS[k] / BARS[j]
    return beta * (1 - BARS[j]) / (1 - BARS[k]), beta


@pytest.mark.parametrize(("k", "j"), [(2, 1), (500, 499), (1000, 999), (41, 1), (1000, 600)])
def test_the_variance_goes_from_small_to_large_with_what_the_network_says(k: int, j: int) -> None:
    small, large = ends(k, j)
    v = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64).reshape(1, 4, 1, 1)
    found = LearnedRange()(DiscreteProcess(), at(k), at(j), saying(v)).flatten().tolist()
    expected = [small, math.sqrt(small * large), large, large * math.sqrt(large / small)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert FixedSmall().between(DiscreteProcess(), at(k), at(j)).item() == pytest.approx(found[0], rel=1e-12)
    assert FixedLarge().between(DiscreteProcess(), at(k), at(j)).item() == pytest.approx(found[2], rel=1e-12)


def test_the_step_to_clean_data_ranges_from_the_clipped_posterior_to_beta_1() -> None:
    v = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    found = LearnedRange()(DiscreteProcess(), at(1), at(0), saying(v)).log().flatten().tolist()
    assert found == pytest.approx([-9.81672514, math.log(1e-4)], abs=1e-8)


@pytest.mark.parametrize("num_steps", [10, 1000, 4000])
def test_the_range_is_never_empty(num_steps: int) -> None:
    process = DiscreteProcess(num_steps, Cosine())
    t = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    low, high = (
        LearnedRange()(process, t, process.previous(t), saying(torch.full((num_steps, 1), v))) for v in (-1.0, 1.0)
    )
    assert (low <= high).all()
    assert (low > 0).all()


def test_every_image_has_the_range_of_its_own_time() -> None:
    t, s = (torch.tensor([a, b], dtype=torch.float64) / 1000 for a, b in ((300, 7), (299, 2)))
    v = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])
    found = LearnedRange()(DiscreteProcess(), t, s, saying(v))
    torch.testing.assert_close(found, torch.tensor([ends(300, 299), ends(7, 2)], dtype=torch.float64))


@pytest.mark.parametrize("further", [None, 1])
def test_a_network_without_enough_channels_is_told_how_many_it_needs(further: int | None) -> None:
    x0 = torch.zeros(2, 3, 4, 4)
    prediction = Prediction(x0, x0, None if further is None else torch.zeros(2, further, 4, 4))
    wanted = rf"needs 6 output channels of the network, which has {3 + (further or 0)}; set .*out_channels 6"
    with pytest.raises(ValueError, match=wanted) as error:
        LearnedRange()(DiscreteProcess(), at(2), at(1), prediction)
    assert "\n" not in str(error.value)


class HalfAndConstant(torch.nn.Module):
    """Says that half of x is noise, and v everywhere."""

    def __init__(self, v: float) -> None:
        super().__init__()
        self.v = v

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return torch.cat([x / 2, torch.full_like(x, self.v)], dim=1)


@pytest.mark.parametrize(("v", "fixed"), [(-1.0, FixedSmall()), (1.0, FixedLarge())], ids=["small", "large"])
@pytest.mark.parametrize("steps", [7, 100])
def test_sampling_at_an_end_of_the_range_is_sampling_with_the_fixed_variance(
    steps: int, v: float, fixed: FixedVariance
) -> None:
    process = DiscreteProcess(100)
    denoise = Denoiser(HalfAndConstant(v), Eps(), process).bind({})

    def sample(sampler: Ancestral) -> Tensor:
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            return torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=generator)

        return sampler(denoise, draw(), process, draw)

    learned = sample(Ancestral(steps, LearnedRange(), Spanning(), clip=False))
    torch.testing.assert_close(learned, sample(Ancestral(steps, fixed, Spanning(), clip=False)), rtol=1e-9, atol=1e-12)
