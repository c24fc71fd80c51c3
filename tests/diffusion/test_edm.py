"""EDM: its loss weight, and its sampler with churn, against numpy."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_lit.diffusion import (
    EDM,
    DenoisingLoss,
    DiscreteProcess,
    Gaussian,
    Heun,
    Karras,
    Preconditioned,
    VarianceExploding,
    VariancePreserving,
)
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.types import Prediction
from tests.diffusion.gaussian import Array, Mixture

MEAN, VARIANCE = 0.4, 0.09
ONE = Mixture(np.array([1.0]), np.array([MEAN]), np.array([VARIANCE]))


def optimal(x: Array, sigma: float) -> Array:
    found: Array = (VARIANCE * x + sigma**2 * MEAN) / (VARIANCE + sigma**2)
    return found


def denoise(x_t: Tensor, t: Tensor) -> Prediction:
    sigma = 80 * float(t)
    x0 = torch.from_numpy(optimal(x_t.numpy(), sigma))
    return Prediction(x0, (x_t - x0) / sigma)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_the_loss_is_the_papers_weighted_error_of_the_image(sigma_data: float) -> None:
    process = VarianceExploding()
    weight = torch.tensor(0.3, dtype=torch.float64)

    class Network(torch.nn.Module):
        def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
            return weight * x + time[:, None, None, None].double()

    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 16, 3, 4, 4, dtype=torch.float64, generator=generator)
    t = torch.rand(16, dtype=torch.float64, generator=generator).clamp(min=1e-4)
    denoiser = Denoiser(Network(), Preconditioned(sigma_data), process)
    found = DenoisingLoss(EDM(sigma_data)).losses_at(denoiser, x0, eps, t, {})
    # EDM's code: c_skip, c_out, c_in, c_noise, and weight (sigma^2 + d^2) / (sigma d)^2.
    y, s, d = x0.numpy(), (80 * t.numpy()).reshape(-1, 1, 1, 1), sigma_data
    x = y + s * eps.numpy()
    raw = 0.3 * x / np.sqrt(s**2 + d**2) + (np.log(s) / 4).astype(np.float32)
    image = d**2 / (s**2 + d**2) * x + s * d / np.sqrt(s**2 + d**2) * raw
    expected = ((s**2 + d**2) / (s * d) ** 2 * (image - y) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def edm_sampler(latents: Array, count: int, churn: tuple[float, float, float, float], draws: list[Array]) -> Array:
    """Karras et al. 2022, algorithm 2, in numpy."""
    s_churn, s_min, s_max, s_noise = churn
    i = np.arange(count)
    steps = (80 ** (1 / 7) + i / (count - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    x = latents * steps[0]
    remaining = iter(draws)
    for here, there in pairwise(np.append(steps, 0.0).tolist()):
        gamma = min(s_churn / count, math.sqrt(2) - 1) if s_min <= here <= s_max else 0.0
        hat = here + gamma * here
        if gamma > 0:
            x = x + math.sqrt(hat**2 - here**2) * s_noise * next(remaining)
        d = (x - optimal(x, hat)) / hat
        x_next = x + (there - hat) * d
        if there > 0:
            x_next = x + (there - hat) * (d / 2 + (x_next - optimal(x_next, there)) / there / 2)
        x = x_next
    assert next(remaining, None) is None
    end: Array = x
    return end


@pytest.mark.parametrize("churn", [(30.0, 0.01, 1.0, 1.007), (40.0, 0.05, 50.0, 1.003), (1e3, 0.05, 50.0, 1.0)])
def test_churn_is_that_of_edm_draw_for_draw(churn: tuple[float, float, float, float]) -> None:
    process, draws = VarianceExploding(), []
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 1, 2, 2, dtype=torch.float64, generator=generator)

    def noise() -> Tensor:
        draws.append(torch.randn(latents.shape, dtype=torch.float64, generator=generator))
        return draws[-1]

    s_churn, s_min, s_max, s_noise = churn
    sampler = Heun(79, Karras(), False, s_churn, s_min, s_max, s_noise)
    found = sampler(denoise, latents, process, noise)
    np.testing.assert_allclose(
        found, edm_sampler(latents.numpy(), 40, churn, [d.numpy() for d in draws]), rtol=1e-9, atol=1e-9
    )
    assert draws
    assert sampler.evaluations(process) == 79


@pytest.mark.parametrize("process", [VariancePreserving(first_time=1e-3), VarianceExploding(), DiscreteProcess(1000)])
def test_with_churn_samples_have_the_moments_of_the_data(
    process: VariancePreserving | VarianceExploding | DiscreteProcess,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, dtype=torch.float64, generator=generator)

    def noise() -> Tensor:
        return torch.randn(x.shape, dtype=torch.float64, generator=generator)

    found = Heun(199, clip=False, s_churn=20)(ONE.denoise(process), x, process, noise)
    assert found.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert found.var().item() == pytest.approx(VARIANCE, rel=0.05)


def test_with_churn_an_image_depends_on_its_seed_and_index_alone() -> None:
    process, sampler = VarianceExploding(), Heun(19, clip=False, s_churn=30)

    def images(indices: list[int]) -> Tensor:
        noise = Gaussian().images(5, indices, (1, 2, 2))
        return sampler(lambda x, t: denoise(x, t), noise.draw(), process, noise.draw)

    torch.testing.assert_close(images([7, 3])[1:], images([3]), rtol=0, atol=0)


def test_without_churn_nothing_is_drawn() -> None:
    def silent() -> Tensor:
        raise AssertionError("noise was drawn")

    Heun(9, clip=False)(denoise, torch.zeros(1, 1, dtype=torch.float64), VarianceExploding(), silent)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heun(s_churn=-1.0), r"s_churn=-1\.0 >= 0"),
        (lambda: Heun(s_min=2.0, s_max=1.0), r"0 <= s_min=2\.0 <= s_max=1\.0"),
        (lambda: Heun(s_noise=0.0), r"s_noise=0\.0 > 0.*1\.003"),
        (lambda: EDM(0.0), r"weighting\.sigma_data=0\.0 must be above 0"),
    ],
)
def test_errors_name_the_value_and_the_bound(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
