import math

import pytest
import torch

from diffusion_lit.diffusion import Cosine, DiscreteProcess, Linear, ScaledLinear, Schedule, Sigmoid, Sqrt

SCHEDULES = [Linear(), ScaledLinear(), Cosine(), Sqrt(), Sigmoid()]


def alpha_bar(schedule: Schedule, num_steps: int) -> torch.Tensor:
    return (1 - schedule.betas(num_steps)).cumprod(0)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 1000, 4000])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_betas_lie_between_0_and_1_and_are_float64(schedule: Schedule, num_steps: int) -> None:
    betas = schedule.betas(num_steps)
    assert betas.dtype == torch.float64
    assert betas.shape == (num_steps,)
    assert ((betas > 0) & (betas < 1)).all()


@pytest.mark.parametrize("num_steps", [10, 1000, 4000])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_less_signal_is_left_after_every_step(schedule: Schedule, num_steps: int) -> None:
    times = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha, sigma = DiscreteProcess(num_steps, schedule).alpha_sigma(times)
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha.diff() < 0).all()
    assert alpha[-1] > 0


def test_linear_has_the_values_of_ddpm() -> None:
    bars = alpha_bar(Linear(), 1000)
    for index, value in {
        0: 0.9999,
        1: 0.9997800920721,
        100: 0.8951415908975,
        500: 0.07779665836502,
        999: 4.035829765376e-5,
    }.items():
        assert bars[index].item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("num_steps", "first_beta", "last_alpha_bar"),
    [(1000, 4.12842248e-5, 2.428767e-9), (4000, 9.86581881e-6, 1.517980e-10)],
)
def test_cosine_has_the_values_of_improved_ddpm(num_steps: int, first_beta: float, last_alpha_bar: float) -> None:
    betas = Cosine().betas(num_steps)
    assert betas[0].item() == pytest.approx(first_beta, rel=1e-8)
    assert (1 - betas).prod().item() == pytest.approx(last_alpha_bar, rel=1e-6)


@pytest.mark.parametrize("num_steps", [1000, 4000])
def test_exactly_one_beta_of_cosine_is_cut(num_steps: int) -> None:
    betas = Cosine().betas(num_steps)
    assert (betas >= 0.999).sum() == 1
    assert betas[-1] == 0.999


def test_scaled_linear_has_the_last_value_of_ldm() -> None:
    assert alpha_bar(ScaledLinear(), 1000)[-1].item() == pytest.approx(1.423040e-4, rel=1e-6)


def test_the_roots_of_scaled_linear_are_equally_spaced() -> None:
    betas = ScaledLinear(0.0015, 0.0195).betas(7)
    assert betas[0].item() == pytest.approx(0.0015, rel=1e-14)
    assert betas[-1].item() == pytest.approx(0.0195, rel=1e-14)
    torch.testing.assert_close(betas.sqrt().diff(n=2), torch.zeros(5, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize(("k", "u"), [(100, 0.1), (500, 0.5), (900, 0.9)])
def test_cosine_follows_the_papers_curve(k: int, u: float) -> None:
    def curve(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    assert alpha_bar(Cosine(), 1000)[k - 1].item() == pytest.approx(curve(u) / curve(0), rel=1e-11)


@pytest.mark.parametrize(("k", "value"), [(39, 0.8), (249, 0.5000000), (639, 0.2)])
def test_sqrt_follows_diffusion_lms_curve(k: int, value: float) -> None:
    # With T = 1000 and offset 0.001 the radicand is (k + 1) / 1000: 0.04, 0.25, 0.64.
    bars = alpha_bar(Sqrt(offset=0.001), 1000)
    assert bars[k - 1].item() == pytest.approx(value / (1 - math.sqrt(0.001)), rel=1e-11)


def test_sqrt_may_reach_zero_before_its_end() -> None:
    betas = Sqrt(offset=0.01).betas(1000)
    assert (betas[-5:] == 0.999).all()


def test_sigmoid_follows_jabris_curve() -> None:
    bars = alpha_bar(Sigmoid(start=-3, end=3, tau=1.0), 1000)
    logistic = {-3: 0.04742587317756678, -1.5: 0.18242552380635635, 0: 0.5, 1.5: 0.8175744761936437}
    for k, argument in ((250, -1.5), (500, 0), (750, 1.5)):
        expected = (1 - logistic[-3] - logistic[argument]) / (1 - 2 * logistic[-3])
        assert bars[k - 1].item() == pytest.approx(expected, rel=1e-11)


def test_a_lower_temperature_makes_the_sigmoid_steeper_about_its_middle() -> None:
    warm, cold = (alpha_bar(Sigmoid(tau=tau), 1000) for tau in (1.0, 0.5))
    assert cold[249] > warm[249]
    assert cold[499].item() == pytest.approx(0.5, rel=1e-11)
    assert cold[749] < warm[749]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Linear(0.0, 0.02), ["Linear", "beta_start=0.0", "0 < beta_start", "1e-4"]),
        (lambda: ScaledLinear(0.02, 0.01), ["ScaledLinear", "beta_end=0.01", "beta_start <= beta_end"]),
        (lambda: Cosine(1.5), ["offset=1.5", "(0, 1)", "0.008"]),
        (lambda: Sqrt(-1.0), ["offset=-1.0", "(0, 1)", "1e-4"]),
        (lambda: Sigmoid(3, -3), ["start=3", "end=-3", "start"]),
        (lambda: Sigmoid(tau=0.0), ["tau=0.0", "> 0"]),
    ],
)
def test_errors_name_the_value_and_the_bound(make: object, words: list[str]) -> None:
    assert callable(make)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("first", "last", "published"),
    [
        (0.0015, 0.0195, 1.42304e-4),
        (0.0015, 0.0155, 6.68665e-4),
        (0.0015, 0.0205, 9.69109e-5),
        (8.5e-4, 0.012, 4.66010e-3),
    ],
)
def test_the_schedules_of_latent_diffusion_end_where_the_published_ones_do(
    first: float, last: float, published: float
) -> None:
    assert alpha_bar(ScaledLinear(first, last), 1000)[-1].item() == pytest.approx(published, rel=1e-5)
