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
    Parameterization,
    PosteriorMean,
    Preconditioned,
    Process,
    Quadratic,
    Sampler,
    V,
    VarianceExploding,
    VariancePreserving,
)
from tests.diffusion.gaussian import GaussianData, OptimalNetwork, alpha_bars, linear_betas

KINDS: list[Parameterization] = [Eps(), X0(), V(), PosteriorMean(), Preconditioned()]
CHAINS = [DiscreteProcess(), DiscreteProcess(1000, Cosine())]
PROCESSES = [*CHAINS, VariancePreserving(), VarianceExploding()]


def named(part: object) -> str:
    return type(part).__name__


def output(kind: Parameterization, process: Process, t: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """What a perfect network puts out, by the formulas of the papers."""
    alpha, sigma = process.alpha_sigma(t)
    x_t = alpha * x0 + sigma * eps
    if isinstance(kind, Eps):
        return eps
    if isinstance(kind, X0):
        return x0
    if isinstance(kind, V):
        return alpha * eps - sigma * x0
    if isinstance(kind, PosteriorMean):
        # Ho et al. 2020, eq. 7.
        before = process.alpha_sigma(t - 1 / 1000)[0] ** 2
        beta = 1 - alpha**2 / before
        return (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x_t) / sigma**2
    # Karras et al. 2022, table 1, with sigma / alpha for sigma and x_t / alpha for x.
    assert isinstance(kind, Preconditioned)
    level, data = sigma / alpha, kind.sigma_data
    c_skip, c_out = data**2 / (level**2 + data**2), level * data / (data**2 + level**2).sqrt()
    return (x0 - c_skip * x_t / alpha) / c_out


def pairs() -> list[tuple[Process, Parameterization, Parameterization]]:
    def kinds(process: Process) -> list[Parameterization]:
        excluded: tuple[type, ...] = () if process.num_steps else (PosteriorMean,)
        if isinstance(process, VarianceExploding):
            excluded = (*excluded, V)
        return [kind for kind in KINDS if not isinstance(kind, excluded)]

    return [(process, a, b) for process in PROCESSES for a in kinds(process) for b in kinds(process)]


@pytest.mark.parametrize(("process", "first", "second"), pairs(), ids=named)
def test_every_pair_of_parameterizations_is_equivalent(
    process: Process, first: Parameterization, second: Parameterization
) -> None:
    first.check(process)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    x0, eps = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = process.perturb(x0, eps, t)

    def views(kind: Parameterization, x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        answer = output(kind, process, t, x0, eps)
        coefficients = kind.coefficients(process, t)
        return (
            coefficients.x0_x * x_t + coefficients.x0_f * answer,
            coefficients.eps_x * x_t + coefficients.eps_f * answer,
        )

    # At the ends of the cosine schedule alpha and beta are 5e-5 and 4e-5: as many digits are lost.
    for found, expected in zip(views(second, *views(first, x0, eps)), (x0, eps), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-9)


@pytest.mark.parametrize(("process", "kind"), [(p, a) for p, a, b in pairs() if a is b], ids=named)
def test_whatever_the_output_the_two_views_agree(process: Process, kind: Parameterization) -> None:
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    x_t, answer = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0_x, x0_f, eps_x, eps_f = kind.coefficients(process, t)
    found = process.perturb(x0_x * x_t + x0_f * answer, eps_x * x_t + eps_f * answer, t)
    torch.testing.assert_close(found, x_t, rtol=1e-9, atol=1e-9)


def test_velocity_is_the_derivative_along_the_circle() -> None:
    # x(phi) = cos(phi) x_0 + sin(phi) eps; v = dx / dphi, here by central differences.
    process, h = DiscreteProcess(), 1e-5
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = process.alpha_sigma(t)
    phi = torch.atan2(sigma, alpha)
    x0, eps = 0.3, -1.7

    def x(phi: Tensor) -> Tensor:
        return phi.cos() * x0 + phi.sin() * eps

    derivative = (x(phi + h) - x(phi - h)) / (2 * h)
    x0_x, x0_f, eps_x, eps_f = V().coefficients(process, t)
    expected = torch.full_like(t, x0), torch.full_like(t, eps)
    torch.testing.assert_close(x0_x * x(phi) + x0_f * derivative, expected[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(eps_x * x(phi) + eps_f * derivative, expected[1], rtol=0, atol=1e-9)


class Recorder(nn.Module):
    """A network that keeps its inputs and puts out a fixed function of them."""

    def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
        self.inputs = x, time
        return (3 * x).sin()


def test_the_preconditioned_denoiser_is_edms() -> None:
    process, network = VarianceExploding(), Recorder()
    sigma = torch.tensor([0.002, 0.3, 80.0], dtype=torch.float64)
    x = sigma[:, None] * torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = Denoiser(network, Preconditioned(0.5), process)(x, sigma / 80, {})
    s = sigma[:, None]
    c_in = 1 / (0.25 + s**2).sqrt()
    torch.testing.assert_close(network.inputs[0], c_in * x, rtol=1e-12, atol=0)
    torch.testing.assert_close(network.inputs[1], (sigma.log() / 4).float())
    assert network.inputs[1].dtype == torch.float32
    expected = 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * (3 * c_in * x).sin()
    torch.testing.assert_close(found.x0, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.eps, (x - expected) / s, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [DiscreteProcess(), VariancePreserving()], ids=named)
def test_for_data_of_variance_1_preconditioning_is_velocity_with_the_other_sign(process: Process) -> None:
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    ours, theirs = Preconditioned(1.0).coefficients(process, t), V().coefficients(process, t)
    for found, expected in zip(ours, (theirs.x0_x, -theirs.x0_f, theirs.eps_x, -theirs.eps_f), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    scale = Preconditioned(1.0).input_scale(process, t)
    torch.testing.assert_close(scale, torch.ones_like(t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=named)
def test_the_preconditioned_input_and_target_have_unit_variance(process: Process) -> None:
    t = torch.tensor([0.001, 0.1, 0.5, 0.9], dtype=torch.float64)
    x0, eps = torch.randn(2, 200_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = 0.3 * x0
    kind = Preconditioned(0.3)
    x_t = process.perturb(x0.expand(-1, 4).T, eps.expand(-1, 4).T, t)
    target = torch.stack([output(kind, process, time, x0[:, 0], eps[:, 0]) for time in t])
    for values in (kind.input_scale(process, t)[:, None] * x_t, target):
        torch.testing.assert_close(values.std(1), torch.ones(4, dtype=torch.float64), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("kind", "process", "message"),
    [
        (V(), VarianceExploding(), r"V needs a process with alpha\^2 \+ sigma\^2 = 1.*Preconditioned"),
        (
            PosteriorMean(),
            VariancePreserving(),
            r"PosteriorMean is defined on a chain.*process DiscreteProcess",
        ),
    ],
    ids=["v", "posterior mean"],
)
def test_what_the_process_does_not_allow_is_refused(kind: Parameterization, process: Process, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoiser(nn.Identity(), kind, process)


def test_sigma_data_must_be_above_0() -> None:
    with pytest.raises(ValueError, match=r"sigma_data=0 must be above 0; EDM uses 0\.5"):
        Preconditioned(0)


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
    for kind in KINDS[:4]:
        torch.testing.assert_close(states(kind), expected, rtol=0, atol=1e-9)


class Fading(Process):
    """A process that ends in pure noise: alpha = 1 - t."""

    first_time = 1e-3

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = 1 - t.double()
        return alpha, (1 - alpha**2).sqrt()

    def time_at(self, log_snr: Tensor) -> Tensor:
        return 1 - log_snr.double().sigmoid().sqrt()

    def network_time(self, t: Tensor) -> Tensor:
        return t.float()


@pytest.mark.parametrize("kind", [Eps(), Preconditioned()], ids=named)
def test_eps_and_preconditioning_are_refused_where_nothing_of_the_data_is_left(kind: Parameterization) -> None:
    with pytest.raises(ValueError, match=rf"{named(kind)} .*alpha is 0.*V or X0"):
        Denoiser(nn.Identity(), kind, Fading())


@pytest.mark.parametrize("kind", [V(), X0()], ids=named)
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
