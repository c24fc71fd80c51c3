import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.diffusion import (
    DDIM,
    X0,
    Ancestral,
    Cosine,
    Denoiser,
    DiscreteProcess,
    DPMSolver,
    Eps,
    Heun,
    Linear,
    Parameterization,
    PosteriorMean,
    Process,
    Quadratic,
    Sampler,
    Schedule,
    V,
)
from tests.diffusion.gaussian import GaussianData, OptimalNetwork, alpha_bars, linear_betas

KINDS: list[Parameterization] = [Eps(), X0(), V(), PosteriorMean()]


def named(part: object) -> str:
    return type(part).__name__


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=named)
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_reading_undoes_target_at_every_time(kind: Parameterization, schedule: Schedule) -> None:
    process = DiscreteProcess(1000, schedule)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    x0, eps = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = process.perturb(x0, eps, t)
    target = kind.target(process, t)
    output = target.of_x0 * x0 + target.of_eps * eps
    reading = kind.reading(process, t)
    # The last signal of the cosine schedule is 5e-5 of the whole: x_0 loses as many digits.
    torch.testing.assert_close(reading.x0_x * x_t + reading.x0_f * output, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(reading.eps_x * x_t + reading.eps_f * output, eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_whatever_the_output_the_two_views_agree(kind: Parameterization) -> None:
    process = DiscreteProcess()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    x_t, output = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reading = kind.reading(process, t)
    x0 = reading.x0_x * x_t + reading.x0_f * output
    eps = reading.eps_x * x_t + reading.eps_f * output
    torch.testing.assert_close(process.perturb(x0, eps, t), x_t, rtol=1e-9, atol=1e-9)


def test_velocity_is_the_derivative_along_the_circle() -> None:
    # x(phi) = cos(phi) x_0 + sin(phi) eps; v = dx / dphi, here by central differences.
    process, h = DiscreteProcess(), 1e-5
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = process.alpha_sigma(t)
    phi = torch.atan2(sigma, alpha)
    x0, eps = 0.3, -1.7

    def x(phi: Tensor) -> Tensor:
        return phi.cos() * x0 + phi.sin() * eps

    target = V().target(process, t)
    derivative = (x(phi + h) - x(phi - h)) / (2 * h)
    torch.testing.assert_close(target.of_x0 * x0 + target.of_eps * eps, derivative, rtol=0, atol=1e-9)


def gaussian_data(alpha_bar: np.ndarray) -> GaussianData:
    root = np.array([[0.5, 0, 0, 0], [0.2, 0.3, 0, 0], [-0.1, 0.1, 0.4, 0], [0.3, 0, -0.2, 0.1]])
    return GaussianData(np.array([0.4, -0.2, 0.1, -0.5]), root @ root.T, alpha_bar)


SAMPLERS: list[Sampler] = [
    Ancestral(250, clip=False),
    DDIM(steps=50, eta=0.0, clip=False),
    DDIM(steps=20, eta=0.7, grid=Quadratic(), clip=True),
    DPMSolver(steps=20, order=3, clip=False),
    DPMSolver(steps=15, order=2, clip=True),
    Heun(steps=25, clip=False),
]


@pytest.mark.parametrize(
    "sampler",
    SAMPLERS,
    ids=["ancestral", "ddim", "ddim, stochastic, clipped", "order 3", "order 2, clipped", "heun"],
)
def test_all_parameterizations_give_one_trajectory(sampler: Sampler) -> None:
    process = DiscreteProcess()
    data = gaussian_data(alpha_bars(linear_betas(1000)))
    x = torch.randn(8, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def states(kind: Parameterization) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        denoise = Denoiser(OptimalNetwork(data, type(kind).__name__), kind, process).bind({})

        def noise() -> Tensor:
            return torch.randn(x.shape, dtype=x.dtype, generator=generator)

        return torch.stack([state.x_t for state in sampler.path(denoise, x, process, noise)])

    expected = states(X0())
    for kind in KINDS:
        torch.testing.assert_close(states(kind), expected, rtol=0, atol=1e-9)


class Fading(Process):
    """A process that ends in pure noise: alpha = 1 - t."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = 1 - t.double()
        return alpha, (1 - alpha**2).sqrt()

    def time_at(self, log_snr: Tensor) -> Tensor:
        return 1 - log_snr.double().sigmoid().sqrt()

    def previous(self, t: Tensor) -> Tensor:
        return (t - 0.1).clamp(min=0)

    def network_time(self, t: Tensor) -> Tensor:
        return t.float()

    def sample_times(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand(count, device=device, generator=generator, dtype=torch.float64)


def test_eps_is_refused_where_nothing_of_the_data_is_left() -> None:
    with pytest.raises(ValueError, match=r"Eps cannot give x0 where alpha is 0.*V or X0"):
        Denoiser(nn.Identity(), Eps(), Fading())


@pytest.mark.parametrize("kind", [V(), X0(), PosteriorMean()], ids=named)
def test_the_others_are_accepted_where_nothing_of_the_data_is_left(kind: Parameterization) -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
            return torch.zeros_like(x)

    denoiser = Denoiser(Zero(), kind, Fading())
    prediction = denoiser(torch.ones(2, 1, dtype=torch.float64), torch.ones((), dtype=torch.float64), {})
    # Pure noise and an output of zero: no data, and x_t is the noise itself.
    torch.testing.assert_close(prediction.x0, torch.zeros(2, 1, dtype=torch.float64))
    torch.testing.assert_close(prediction.eps, torch.ones(2, 1, dtype=torch.float64))


def test_the_denoiser_answers_in_the_precision_of_its_input() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
            assert time.dtype == torch.float32
            assert time.tolist() == [499.0] * 3
            return x.to(torch.bfloat16)

    denoise = Denoiser(Half(), Eps(), DiscreteProcess()).bind({})
    prediction = denoise(torch.zeros(3, 1, 2, 2), torch.tensor(0.5, dtype=torch.float64))
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32


def test_the_condition_reaches_the_network() -> None:
    class Label(nn.Module):
        def forward(self, x: Tensor, time: Tensor, condition: dict[str, Tensor]) -> Tensor:
            return condition["label"].to(x.dtype)[:, None]

    denoise = Denoiser(Label(), X0(), DiscreteProcess()).bind({"label": torch.tensor([3, 5])})
    assert denoise(torch.zeros(2, 1), torch.tensor(0.5)).x0.flatten().tolist() == [3, 5]
