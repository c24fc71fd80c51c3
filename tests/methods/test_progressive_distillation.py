"""Progressive distillation: two steps as one in closed form, the process, the stages and their resumption."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.callbacks import Checkpoints, Scalars
from diffusion_lit.diffusion import (
    DDIM,
    X0,
    CosineProcess,
    Denoiser,
    DiscreteProcess,
    Eps,
    EvenTimes,
    Gaussian,
    Process,
    Seen,
    Trailing,
    TruncatedSNR,
    V,
    VarianceExploding,
    VariancePreserving,
    Velocity,
)
from diffusion_lit.methods.progressive_distillation import LinearByStage, ProgressiveDistillation, stage_at, two_steps
from diffusion_lit.types import Condition, Prediction
from tests import systems, tiny
from tests.systems import student

PROCESSES = [CosineProcess(), VariancePreserving(), VarianceExploding(), DiscreteProcess(64)]


class GaussianX0(nn.Module):
    """The best x_0 for data N(0.3, variance), pixel by pixel, from x_t and, in place of the time, log-SNR."""

    def __init__(self, process: Process, variance: float = 0.5) -> None:
        super().__init__()
        self.image_size, self.in_channels = 4, 1
        self.process, self.variance = process, variance
        self.mean = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def at(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in self.process.alpha_sigma(t))
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)


def gaussian(process: Process) -> Any:
    network = GaussianX0(process)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        x0 = network.at(x_t, t).detach()
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in process.alpha_sigma(t))
        return Prediction(x0, (x_t - alpha * x0) / sigma)

    return denoise


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_a_distilled_gaussian_student_makes_the_two_steps_of_its_teacher(process: Process, steps: int) -> None:
    torch.manual_seed(0)
    teacher = gaussian(process)
    for i in range(1, steps + 1):
        t, middle, s = (torch.tensor([k / steps], dtype=torch.float64) for k in (i, i - 0.5, i - 1))
        x_t = torch.randn(1, 1, 4, 4, dtype=torch.float64)

        def student(x: Tensor, time: Tensor) -> Prediction:
            x0 = two_steps(teacher, x, process, time.reshape(1), middle, s)  # noqa: B023
            alpha, sigma = process.alpha_sigma(time)
            return Prediction(x0, (x - alpha * x0) / sigma)

        ddim = DDIM(clip=False)
        noise = lambda: torch.zeros(1)  # noqa: E731
        one, _ = ddim.step(student, x_t, process, t[0], s[0], noise)
        half, _ = ddim.step(teacher, x_t, process, t[0], middle[0], noise)
        two, _ = ddim.step(teacher, half, process, middle[0], s[0], noise)
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_the_target_is_the_paper_s_and_at_the_end_the_second_prediction() -> None:
    process = CosineProcess()
    teacher = gaussian(process)
    x_t = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    t, middle, s = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 0.25], [0.375, 0.125], [0.25, 0.0]))
    target = two_steps(teacher, x_t, process, t, middle, s)
    (a_t, s_t), (a_m, s_m), (a_s, s_s) = (
        tuple(c.reshape(-1, 1, 1, 1) for c in process.alpha_sigma(time)) for time in (t, middle, s)
    )
    first = teacher(x_t, t)
    second = teacher(a_m * first.x0 + s_m * first.eps, middle)
    x_s = a_s * second.x0 + s_s * second.eps
    ratio = s_s / s_t
    torch.testing.assert_close(target, (x_s - ratio * x_t) / (a_s - ratio * a_t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(target[1], second.x0[1], rtol=1e-12, atol=1e-12)


def test_in_single_precision_a_target_of_thousands_of_steps_keeps_its_digits() -> None:
    process = CosineProcess()
    x_t = torch.randn(64, 1, 4, 4, dtype=torch.float64)
    t = torch.linspace(1 / 4096, 1, 64, dtype=torch.float64)
    middle, s = t - 0.5 / 4096, (t - 1 / 4096).clamp(min=0)
    exact = two_steps(gaussian(process), x_t, process, t, middle, s)
    single = two_steps(gaussian(process), x_t.float(), process, t, middle, s)
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)


# The process


def test_the_angle_of_the_cosine_process_is_linear_between_its_bounds() -> None:
    process = CosineProcess()
    u = torch.linspace(1e-9, 1, 1001, dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(u)
    phi = torch.atan2(sigma, alpha)
    assert float(phi.diff().max() - phi.diff().min()) < 1e-12
    np.testing.assert_allclose(process.log_snr(u)[[0, -1]], [20, -20], atol=1e-4)
    # The paper's formula: ln(alpha^2 / sigma^2) = -2 ln tan(a u + b).
    b = np.arctan(np.exp(-10.0))
    a = np.arctan(np.exp(10.0)) - b
    np.testing.assert_allclose(process.log_snr(u), -2 * np.log(np.tan(a * u.numpy() + b)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(process.time_at(process.log_snr(u)), u, atol=1e-9)
    np.testing.assert_allclose(process.network_time(u), phi / (np.pi / 2) * 1000, rtol=1e-6)


def test_at_time_0_the_cosine_process_has_clean_data() -> None:
    alpha, sigma = CosineProcess().alpha_sigma(torch.tensor([0.0, 1.0]))
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)
    assert float(alpha[1]) == pytest.approx(np.exp(-10), rel=1e-6)
    V().check(CosineProcess())
    Eps().check(CosineProcess())


@pytest.mark.parametrize("steps", [1, 7, 8192])
def test_a_trailing_grid_has_the_times_that_students_are_trained_at(steps: int) -> None:
    times = DDIM(steps, grid=Trailing()).times(CosineProcess())
    drawn, weights = EvenTimes(steps).draw(20_000, CosineProcess(), torch.device("cpu"))
    assert weights is None
    assert set(drawn.tolist()) <= {i / steps for i in range(1, steps + 1)}
    if steps < 10:
        assert len(set(drawn.tolist())) == steps
    torch.testing.assert_close(times.flip(0)[1:], torch.arange(1, steps + 1, dtype=torch.float64) / steps)


def test_weights_of_the_error_of_x_0_are_those_of_the_paper() -> None:
    process = CosineProcess()
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    snr = process.log_snr(t).exp()
    torch.testing.assert_close(TruncatedSNR()(process, t) * snr, snr.clamp(min=1))
    torch.testing.assert_close(Velocity()(process, t) * snr, snr + 1)


# The objective


def objective(stages: Any = (2, 2, 2), **kwargs: Any) -> ProgressiveDistillation:
    return ProgressiveDistillation("none.ckpt", stages, **kwargs)


class Affine(nn.Module):
    """x_0 = w x_t + c, whatever the time and condition."""

    def __init__(self, w: float, c: float) -> None:
        super().__init__()
        self.image_size, self.in_channels = 4, 1
        self.w, self.c = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(c))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        return self.w * x + self.c


def test_the_loss_is_the_weighted_distance_to_what_the_teacher_does() -> None:
    process = CosineProcess()
    student, teacher = (Denoiser(Affine(*wc), X0(), process) for wc in ((0.5, 0.1), (0.3, -0.2)))
    distillation = objective([3, 3])
    state = {f"teacher.{n}": v.detach() for n, v in teacher.network.named_parameters()}
    distillation.load_state_dict({"steps": torch.tensor(2), **state})
    x0, eps = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    t = torch.tensor([0.5, 1.0], dtype=torch.float64)
    losses = distillation.losses_at(student, x0, eps, t, {})
    x_t = process.perturb(x0, eps, t)
    target = two_steps(teacher.bind({}), x_t, process, t, t - 0.25, t - 0.5)
    error = (target - (0.5 * x_t + 0.1)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, process.log_snr(t).exp().clamp(min=1).float() * error)
    [gradient] = torch.autograd.grad(losses.sum(), [student.network.get_parameter("w")])
    expected = process.log_snr(t).exp().clamp(min=1).float() * (2 * (0.5 * x_t + 0.1 - target) * x_t).flatten(1).mean(1)
    torch.testing.assert_close(gradient, expected.sum())


def test_a_student_that_equals_two_steps_everywhere_has_no_loss() -> None:
    process = CosineProcess()
    constant = Denoiser(Affine(0.0, 0.4), X0(), process)
    distillation = objective([3, 3])
    state = {f"teacher.{n}": v.detach() for n, v in constant.network.named_parameters()}
    distillation.load_state_dict({"steps": torch.tensor(2), **state})
    x0 = torch.randn(64, 1, 4, 4)
    losses = distillation(constant, x0, {}, Gaussian())["losses"]
    assert float(losses.max()) < 1e-10


def test_stages_halve_the_steps_and_end_at_the_last() -> None:
    assert [stage_at([2, 3, 1], step) for step in range(9)] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    distillation = objective([2, 3, 1], last_steps=3)
    network = Affine(1.0, 0.0)
    denoiser = Denoiser(network, X0(), CosineProcess())
    seen = Seen(torch.zeros(0), torch.zeros(0))
    found = []
    distillation._promote(denoiser, 0)
    for step in range(1, 7):
        with torch.no_grad():
            network.w.fill_(step)
        distillation.stepped(step, denoiser, seen, lambda x: x)
        found.append((distillation.steps, float(distillation.state_dict()["teacher.w"])))
    assert found == [(12, 1.0), (6, 2.0), (6, 2.0), (6, 2.0), (3, 5.0), (3, 5.0)]


def test_a_student_is_scored_at_the_times_of_its_own_stage() -> None:
    distillation, found = objective([2, 3, 1]), []
    for steps in range(8):
        distillation.trained(steps)
        found.append(distillation.steps)
    assert found == [4, 4, 4, 2, 2, 2, 1, 1]


def test_the_learning_rate_falls_to_nothing_in_every_stage() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = LinearByStage(optimizer, [2, 4])
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [1.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_the_published_stages_are_thirteen_from_8192_steps() -> None:
    distillation = ProgressiveDistillation("none.ckpt")
    assert 2 * distillation._steps_in(0) == 8192
    assert sum(distillation.stages) == 750_000
    distillation.check(CosineProcess())


# Runs


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return systems.teacher(tmp_path_factory.mktemp("teacher"))


def callbacks() -> list[Any]:
    return [Scalars(), Checkpoints()]


def test_a_student_starts_as_its_teacher(teacher: Path, tmp_path: Path) -> None:
    system = student(teacher)
    tiny.trainer(tmp_path, 1, callbacks()).fit(system, tiny.data())
    state, held = tiny.load(teacher)["state_dict"], tiny.load(tiny.last(tmp_path))["objective"]
    assert int(held.pop("steps")) == 4
    assert {n.removeprefix("teacher.") for n in held} == {n.removeprefix("denoiser.network.") for n in state}
    assert all(torch.equal(v, state[f"denoiser.network.{n.removeprefix('teacher.')}"]) for n, v in held.items())


@pytest.mark.further
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_run_resumes_bit_for_bit_in_any_stage_without_its_first_teacher(
    teacher: Path, tmp_path: Path, stop: int
) -> None:
    whole = student(teacher)
    tiny.trainer(tmp_path / "whole", 6, callbacks()).fit(whole, tiny.data())
    tiny.trainer(tmp_path / "parts", stop, callbacks()).fit(student(teacher), tiny.data())
    resumed = student(Path("gone.ckpt"))
    tiny.trainer(tmp_path / "parts", 6, callbacks()).fit(resumed, tiny.data(), ckpt_path="last")
    a, b = (tiny.load(tiny.last(tmp_path / name)) for name in ("whole", "parts"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "objective"):
        assert tiny.identical(a[key], b[key]), key
    assert int(a["objective"]["steps"]) == 1


@pytest.mark.parametrize(("stop", "stages", "own"), [(1, (2, 2, 2, 2), 4), (3, (4, 2, 2), 2)])
def test_stages_that_a_run_has_begun_may_not_change(
    teacher: Path, tmp_path: Path, stop: int, stages: tuple[int, ...], own: int
) -> None:
    tiny.trainer(tmp_path, stop, callbacks()).fit(student(teacher), tiny.data())
    before = tiny.last(tmp_path).read_bytes()
    line = rf"objective\.stages=.* have a student of {2 * own} steps .* the run has one of {own}; .* still to come$"
    with pytest.raises(ValueError, match=line):
        tiny.trainer(tmp_path, 6, callbacks()).fit(student(teacher, stages), tiny.data(), ckpt_path="last")
    assert tiny.last(tmp_path).read_bytes() == before


def test_a_student_can_be_tested_without_a_teacher(teacher: Path, tmp_path: Path) -> None:
    system = student(Path("gone.ckpt"))
    losses = system.eval().losses({"image": torch.randn(4, 1, 8, 8).clamp(-1, 1)})
    assert bool(losses["losses"].isfinite().all())
    with pytest.raises(RuntimeError, match="the student has no teacher"):
        system.train().losses({"image": torch.randn(4, 1, 8, 8)})


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"objective\.teacher=gone\.ckpt: there is no such file"):
        tiny.trainer(tmp_path, 1, callbacks()).fit(student(Path("gone.ckpt")), tiny.data())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"process": CosineProcess(log_snr_min=-15.0)}, "was trained with the process .* set --model.process"),
        ({"process": DiscreteProcess(8)}, "was trained with the process"),
        ({"parameterization": X0()}, "was trained with the parameterization"),
        ({"network": tiny.network(width=24)}, "has another network: .* tensors differ, first"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    teacher: Path, tmp_path: Path, parts: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, 1, callbacks()).fit(student(teacher, **parts), tiny.data())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objective([]), r"stages=\[\] must hold"),
        (lambda: objective([3, 0]), r"stages=\[3, 0\] must hold"),
        (lambda: objective(last_steps=0), "last_steps=0 must be at least 1"),
        (lambda: objective([1] * 3).check(DiscreteProcess(4)), "takes 8 steps, which does not divide the 4"),
        (lambda: objective([1] * 20).check(CosineProcess()), "takes 1048576 steps, but the first time"),
        (lambda: CosineProcess(3.0, 2.0), "log_snr_min=3.0 < log_snr_max=2.0"),
        (lambda: EvenTimes(3).draw(1, DiscreteProcess(4), torch.device("cpu")), "does not divide the 4 steps"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
