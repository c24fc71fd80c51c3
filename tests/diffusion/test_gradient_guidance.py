"""Guidance by a measurement of Gaussian data, whose posterior is known in closed form."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.conditioner import Labels
from diffusion_lit.diffusion import (
    DDIM,
    Ancestral,
    Denoiser,
    DiscreteProcess,
    DPMSolver,
    Eps,
    GradientGuidance,
    LogLikelihood,
    Sampler,
)
from diffusion_lit.module import DiffusionModule
from diffusion_lit.types import Condition, DenoiseFn, Network
from tests.diffusion.gaussian import alpha_bars, linear_betas

BARS = torch.from_numpy(alpha_bars(linear_betas(1000)))
PROCESS = DiscreteProcess()
MEAN, VARIANCE = 0.3, 0.25
NOISE = 0.04
"""Variance of the measurement's error."""


class Exact(Network):
    """Predicts eps of N(MEAN, VARIANCE) perfectly; with a weight that must get no gradient."""

    image_size, in_channels = 2, 1

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        bar = BARS[time.long() + 1].reshape(-1, 1, 1, 1)
        return (1 - bar).sqrt() * (x - bar.sqrt() * MEAN) / (bar * VARIANCE + 1 - bar) * self.one


def posterior(x_t: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of p(x_0 | x_t)."""
    total = bar * VARIANCE + 1 - bar
    return MEAN + bar.sqrt() * VARIANCE * (x_t - bar.sqrt() * MEAN) / total, VARIANCE * (1 - bar) / total


class Measurement(LogLikelihood):
    """log p(y | x) of y = x_0 + error, from x_t, or from E[x_0 | x_t]."""

    entries = ("measured",)

    def __init__(self, clean: bool) -> None:
        self.clean = clean
        self.prepared = 0

    def prepare(self, given: Condition) -> Condition:
        self.prepared += 1
        return {"y": given["measured"] / 2}

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        bar = BARS[(t * 1000).round().long()].reshape(-1, 1, 1, 1)
        mean, variance = posterior(x, bar)
        return -((condition["y"] - (x if self.clean else mean)) ** 2 / (2 * (variance + NOISE))).flatten(1).sum(1)


both = pytest.mark.parametrize("clean", [False, True], ids=["of x_t", "of x_0"])
Y = torch.tensor([-0.5, 0.1, 0.9, 0.3], dtype=torch.float64).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def guided(likelihood: LogLikelihood, y: Tensor = Y, **kwargs: float) -> DenoiseFn:
    guidance = GradientGuidance(likelihood, **kwargs)  # type: ignore[arg-type]
    return guidance(Denoiser(Exact(), Eps(), PROCESS), {}, Labels(), {"measured": 2 * y})


def fused(x_t: Tensor, bar: Tensor, y: Tensor = Y) -> Tensor:
    """E[x_0 | x_t, y], as the mean of two measurements, weighted by their precisions."""
    mean, variance = posterior(x_t, bar)
    return (mean * NOISE + y * variance) / (variance + NOISE)


@both
@pytest.mark.parametrize("k", [1, 40, 500, 1000])
def test_at_scale_1_the_guided_prediction_is_the_posterior_mean(clean: bool, k: int) -> None:
    x_t, t = images(), torch.tensor(k / 1000, dtype=torch.float64)
    found = guided(Measurement(clean))(x_t, t)
    torch.testing.assert_close(found.x0, fused(x_t, BARS[k]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(BARS[k].sqrt() * found.x0 + (1 - BARS[k]).sqrt() * found.eps, x_t, rtol=0, atol=1e-9)


@both
def test_every_image_has_a_time_of_its_own(clean: bool) -> None:
    k = torch.tensor([3, 200, 600, 1000])
    x_t = images()
    expected = fused(x_t, BARS[k].reshape(-1, 1, 1, 1))
    torch.testing.assert_close(guided(Measurement(clean))(x_t, k / 1000).x0, expected, rtol=1e-9, atol=1e-9)


@both
@pytest.mark.parametrize("sampler", [DDIM(100, clip=False), DPMSolver(40, clip=False)], ids=["ddim", "dpm-solver"])
def test_samples_have_the_moments_of_the_data_given_the_measurement(clean: bool, sampler: Sampler) -> None:
    count = 3000
    x = torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.full_like(x, 0.7)
    with torch.no_grad():
        found = sampler(guided(Measurement(clean), y), x, PROCESS, lambda: torch.zeros_like(x))
    mean = (MEAN * NOISE + 0.7 * VARIANCE) / (VARIANCE + NOISE)
    deviation = math.sqrt(VARIANCE * NOISE / (VARIANCE + NOISE))
    assert float(found.mean()) == pytest.approx(mean, abs=4 * deviation / math.sqrt(count) + 0.01)
    assert float(found.std()) == pytest.approx(deviation, rel=0.1)


@both
def test_the_shift_is_proportional_to_the_scale_and_scale_0_is_the_model(clean: bool) -> None:
    x_t, t = images(), torch.tensor(0.5, dtype=torch.float64)
    plain = Denoiser(Exact(), Eps(), PROCESS)(x_t, t, {})
    once, thrice, none = (guided(Measurement(clean), scale=s)(x_t, t) for s in (1.0, 3.0, 0.0))
    torch.testing.assert_close(thrice.x0 - plain.x0, 3 * (once.x0 - plain.x0))
    assert torch.equal(none.x0, plain.x0)


@both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_while_gradients_are_off_and_leaves_none_behind(
    clean: bool, mode: Callable[[], torch.no_grad]
) -> None:
    network = Exact()
    guidance = GradientGuidance(Measurement(clean))
    x_t, t = images(), torch.tensor(0.5, dtype=torch.float64)
    expected = guided(Measurement(clean))(x_t, t).x0
    with mode():
        denoise = guidance(Denoiser(network, Eps(), PROCESS), {}, Labels(), {"measured": 2 * Y + 0})
        found = denoise(x_t + 0, t + 0)
    assert torch.equal(found.x0, expected)
    assert not found.x0.requires_grad
    assert not found.eps.requires_grad
    assert network.one.grad is None


def test_what_depends_on_the_condition_alone_is_computed_once_for_all_steps() -> None:
    likelihood = Measurement(clean=False)
    Ancestral(20, clip=False)(guided(likelihood), images(), PROCESS, lambda: torch.zeros_like(images()))
    assert likelihood.prepared == 1


def test_a_model_guided_by_an_entry_asks_for_it_in_sampling_and_not_in_training() -> None:
    likelihood = Measurement(clean=True)
    model = DiffusionModule(Exact(), PROCESS, sampler=DDIM(3, clip=False), guidance=GradientGuidance(likelihood))
    assert model.entries == ("measured",)
    with pytest.raises(ValueError, match="makes images from measured: say which"):
        model.sample([0])
    with pytest.raises(ValueError, match="was given none"):
        model.sample([0], condition={})
    assert model.losses({"image": torch.zeros(2, 1, 2, 2)})["loss"].isfinite()
    far = model.sample([0], condition={"measured": torch.full((1, 1, 2, 2), 6.0)})
    near = model.sample([0], condition={"measured": torch.full((1, 1, 2, 2), 0.6)})
    assert bool((far > near + 1).all())
