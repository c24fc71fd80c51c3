"""Consistency models: closed forms, tables computed otherwise, sampling and editing of Gaussian data."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from diffusion_lit.diffusion import (
    X0,
    Denoiser,
    DiscreteProcess,
    Eps,
    Karras,
    LogNormal,
    Preconditioned,
    Process,
    Seen,
    VarianceExploding,
    VariancePreserving,
)
from diffusion_lit.diffusion.projection import KnownPixels, Luminance, PatchMeans
from diffusion_lit.diffusion.samplers.heun import heun_step
from diffusion_lit.edit import Edit, Edited
from diffusion_lit.methods.consistency import (
    LPIPS,
    Absolute,
    Boundary,
    ConsistencyDistillation,
    ConsistencyTraining,
    Distance,
    Doubling,
    Fixed,
    InverseGap,
    InverseOutput,
    Levels,
    Multistep,
    Neighbors,
    PseudoHuber,
    Shrinking,
    Sigmas,
    Squared,
    SquareRoot,
    TimeSearch,
    Unweighted,
)
from diffusion_lit.methods.consistency.search import ternary
from diffusion_lit.methods.projected import Projected
from diffusion_lit.methods.sdedit import SDEdit
from diffusion_lit.module import DiffusionModule
from diffusion_lit.types import DenoiseFn, Prediction

MEAN, VARIANCE, LEAST = 0.4, 0.09, 0.002
PROCESS = VarianceExploding(LEAST, 80.0)


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(x: Tensor, seed: int = 0) -> Callable[[], Tensor]:
    generator = seeded(seed)
    return lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def grid(count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Noise levels of Karras et al. 2022, rising."""
    i = np.arange(count)
    levels: np.ndarray[Any, np.dtype[np.float64]] = (
        LEAST ** (1 / 7) + i / (count - 1) * (80 ** (1 / 7) - LEAST ** (1 / 7))
    ) ** 7
    return levels


# Parameterization


class Noisy(nn.Module):
    """A network whose output depends on everything."""

    def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
        return (3 * x).sin() + time.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) - 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_first_time_an_image_is_its_own_prediction_to_the_bit(dtype: torch.dtype) -> None:
    x = torch.randn(4, 1, 3, 3, dtype=dtype, generator=seeded())
    found = Denoiser(Noisy(), Boundary(), PROCESS)(x, torch.full((4,), PROCESS.first_time, dtype=torch.float64), {})
    assert torch.equal(found.x0, x)


@pytest.mark.parametrize("process", [VariancePreserving(), DiscreteProcess(100)], ids=["vp", "chain"])
def test_on_any_process_the_first_time_gives_the_image_without_its_scale(process: Process) -> None:
    x, t = torch.randn(1, 1, 3, 3, dtype=torch.float64), times(process.first_time)
    found = Denoiser(Noisy(), Boundary(), process)(x, t, {})
    torch.testing.assert_close(found.x0, x / process.alpha_sigma(t)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(process.perturb(found.x0, found.eps, t), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.25, 250.0])
def test_the_boundary_parameterization_is_the_papers(scale: float) -> None:
    x, sigma, d = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=seeded()), np.array([0.01, 1.0, 50.0]), 0.5
    seen: list[Tensor] = []

    class Record(nn.Module):
        def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
            seen.extend([x, time])
            return torch.full_like(x, 2.0)

    found = Denoiser(Record(), Boundary(d, scale), PROCESS)(x, torch.from_numpy(sigma / 80), {})
    s = sigma.reshape(-1, 1, 1, 1)
    skip, out = d**2 / ((s - LEAST) ** 2 + d**2), (s - LEAST) * d / np.sqrt(s**2 + d**2)
    np.testing.assert_allclose(found.x0, skip * x.numpy() + 2 * out, rtol=1e-10)
    np.testing.assert_allclose(found.eps, (x.numpy() - found.x0.numpy()) / s, rtol=1e-8)
    np.testing.assert_allclose(seen[0], x.numpy() / np.sqrt(s**2 + d**2), rtol=1e-12)
    np.testing.assert_allclose(seen[1], scale * np.log(sigma), rtol=1e-6)


# Curricula and pairs


def test_levels_and_decays_are_those_of_the_papers_formulas() -> None:
    curriculum, s_0, s_1, total = SquareRoot(2, 150, 800_000), 2, 150, 800_000
    assert [curriculum.levels(0), curriculum.levels(total), curriculum.levels(10 * total)] == [2, 151, 151]
    for k in [1, 2, 1000, 33_333, 100_000, 400_000, 799_999]:
        wanted = np.ceil(np.sqrt(k / total * ((s_1 + 1) ** 2 - s_0**2) + s_0**2) - 1) + 1
        assert curriculum.levels(k) == wanted
        assert curriculum.decay(0.9, k) == pytest.approx(np.exp(s_0 * np.log(0.9) / wanted), rel=1e-14)
    assert curriculum.decay(0.9, 0) == pytest.approx(0.9)
    # N is n from the least k on with k ((s_1 + 1)^2 - s_0^2) > K ((n - 1)^2 - s_0^2).
    small = SquareRoot(3, 9, 50)
    by_search = [next(n for n in range(2, 12) if 50 * n**2 >= k * (10**2 - 3**2) + 50 * 3**2) for k in range(51)]
    assert [small.levels(k) for k in range(51)] == by_search


def test_improved_training_has_eight_stages_of_doubling_intervals() -> None:
    curriculum = Doubling(10, 1280, 400_000)
    stages = [(k, curriculum.levels(k) - 1) for k in range(0, 400_000, 50_000)]
    assert stages == [(50_000 * i, 10 * 2**i) for i in range(8)]
    assert [curriculum.levels(k) - 1 for k in (49_999, 50_000, 399_999, 10**9)] == [10, 20, 1280, 1280]
    assert (curriculum.most, SquareRoot(2, 150, 10).most, Fixed(40).most) == (1281, 151, 40)
    # Where s_1 is no power of two times s_0: K' = floor(1000 / (log2(floor(50 / 4)) + 1)) = 218.
    odd = Doubling(4, 50, 1000)
    assert [odd.levels(k) - 1 for k in (0, 217, 218, 436, 654, 872)] == [4, 4, 8, 16, 32, 50]


def test_a_fixed_number_of_levels_has_the_decay_itself() -> None:
    assert Fixed(40).decay(0.95, 123) == pytest.approx(0.95)
    assert Fixed(40).decay(0.0, 123) == 0


def test_pairs_are_neighbouring_levels_all_equally_likely() -> None:
    pairs, count = Neighbors(Fixed(6)), 30_000
    t, weights = pairs.draw(count, PROCESS, torch.device("cpu"), seeded(1))
    assert weights is None
    levels = grid(6)
    upper = np.abs(80 * t.numpy()[:, None] - levels).argmin(1)
    np.testing.assert_allclose(80 * t.numpy(), levels[upper], rtol=1e-9)
    np.testing.assert_allclose(80 * pairs.before(t, PROCESS).numpy(), levels[upper - 1], rtol=1e-9)
    counts = np.bincount(upper, minlength=6)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 0.01


def test_pairs_of_improved_training_are_log_normal() -> None:
    pairs, count = Neighbors(Doubling(10, 1280, 400_000), noise=LogNormal(-1.1, 2.0)), 40_000
    t, _ = pairs.draw(count, PROCESS, torch.device("cpu"), seeded())
    levels = grid(11)
    shares = np.diff(stats.norm(-1.1, 2.0).cdf(np.log(levels)))
    np.testing.assert_allclose(pairs.shares(PROCESS), shares / shares.sum(), rtol=1e-9)
    counts = np.bincount(np.abs(80 * t.numpy()[:, None] - levels).argmin(1), minlength=11)
    assert stats.chisquare(counts[1:], count * shares / shares.sum()).pvalue > 0.01
    # The number of levels follows the step.
    pairs.step = 50_000
    assert len(pairs.levels(PROCESS)) == 21
    torch.testing.assert_close(pairs.levels(PROCESS)[[0, -1]], times(PROCESS.first_time, 1.0), rtol=1e-14, atol=0)


def test_on_a_chain_pairs_are_entries_of_the_chain() -> None:
    process = DiscreteProcess(50)
    pairs = Neighbors(Fixed(50))
    pairs.check(process)
    t, _ = pairs.draw(100, process, torch.device("cpu"), seeded())
    assert torch.equal(process.index(pairs.before(t, process)), process.index(t) - 1)
    with pytest.raises(ValueError, match=r"51 levels exceed the 50 steps of the process; lower .* at most 50"):
        ConsistencyTraining(Neighbors(Fixed(51))).check(process)


@pytest.mark.parametrize("stage", [0, 1, 5])
def test_easy_tuning_draws_nearer_stage_by_stage_and_starts_at_the_data(stage: int) -> None:
    pairs = Shrinking(q=4.0, stage_steps=100)
    pairs.step = 100 * stage + 99
    sigma = np.array([0.01, 0.3, 1.0, 5.0, 80.0])
    found = 80 * pairs.before(torch.from_numpy(sigma / 80), PROCESS).numpy()
    wanted = np.clip(sigma * (1 - 4.0 ** -(stage + 1) * (1 + 8 / (1 + np.exp(sigma)))), 0, None)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=0)
    assert (found[0] == 0) == (stage == 0)


# Losses


def closed(x: Tensor, sigma: Tensor | float) -> Tensor:
    """The consistency function of N(MEAN, VARIANCE): (x - mean) / deviation is kept along a trajectory."""
    factor = ((VARIANCE + LEAST**2) / (VARIANCE + torch.as_tensor(sigma, dtype=torch.float64) ** 2)).sqrt()
    return MEAN + factor.reshape(-1, *[1] * (x.ndim - 1)) * (x - MEAN)


class ClosedForm(nn.Module):
    """A network that, with `X0`, is the consistency function, its slope multiplied by a number."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
        return MEAN + self.scale * (closed(x, time.double()) - MEAN)


class OptimalDenoiser(nn.Module):
    """E[x_0 | x_t] of N(MEAN, VARIANCE), told sigma."""

    def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
        s = time.double().reshape(-1, *[1] * (x.ndim - 1))
        return (VARIANCE * x + s**2 * MEAN) / (VARIANCE + s**2)


class Exact(VarianceExploding):
    """Tells the network sigma without rounding."""

    def network_time(self, t: Tensor) -> Tensor:
        return 80 * t


class Distilled(ConsistencyDistillation):
    """Has a teacher of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("", *args, **kwargs)

    def load_teacher(self) -> Denoiser:
        return Denoiser(OptimalDenoiser(), X0(), Exact())


def quadrature() -> tuple[Tensor, Tensor, Tensor]:
    """Data, noise and weights that integrate polynomials of both exactly."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    weights = weights / weights.sum()
    a, b = (torch.from_numpy(axis.ravel()) for axis in np.meshgrid(nodes, nodes))
    products = torch.from_numpy(np.outer(weights, weights).ravel())
    return MEAN + math.sqrt(VARIANCE) * a.reshape(-1, 1), b.reshape(-1, 1), products


def test_the_consistency_function_of_gaussian_data_is_where_distillation_ends() -> None:
    # A step of the teacher has an error of third order, and nothing else is in the loss.
    losses = []
    for count in (40, 80, 160):
        objective = Distilled(Neighbors(Fixed(count)), PseudoHuber(0.0))
        x0, eps, _ = quadrature()
        denoiser = Denoiser(ClosedForm(), X0(), Exact())
        levels = objective.times.levels(denoiser.process)  # type: ignore[attr-defined]
        worst = [
            objective.losses_at(denoiser, x0, eps, t.expand(len(x0)), {}).max().item() for t in levels[count // 2 :: 5]
        ]
        losses.append(max(worst))
    assert losses[-1] < 1e-4
    orders = np.log2(np.array(losses[:-1]) / np.array(losses[1:]))
    np.testing.assert_allclose(orders, 3, atol=0.35)


@pytest.mark.parametrize("distilled", [True, False])
def test_a_function_that_is_not_consistent_is_pushed_towards_the_one_that_is(distilled: bool) -> None:
    x0, eps, weights = quadrature()
    gradients = []
    for scale in (0.8, 1.0, 1.2):
        network = ClosedForm(scale)
        pairs = Neighbors(Fixed(1280))
        objective = Distilled(pairs, Squared()) if distilled else ConsistencyTraining(pairs, Squared(), Unweighted())
        denoiser = Denoiser(network, X0(), Exact())
        # The earliest pair, whose target is the image at the boundary: elsewhere any scale is consistent with itself.
        t = pairs.levels(denoiser.process)[1]

        class Anchored(nn.Module):
            def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
                return x

        objective.target = lambda _: Denoiser(Anchored(), X0(), Exact())  # type: ignore[method-assign, assignment]
        (weights * objective.losses_at(denoiser, x0, eps, t.expand(len(x0)), {})).sum().backward()  # type: ignore[no-untyped-call]
        assert network.scale.grad is not None
        gradients.append(network.scale.grad.item())
    assert gradients[0] < 0 < gradients[2]
    assert abs(gradients[1]) < 1e-3 * min(abs(gradients[0]), gradients[2])


def test_the_consistency_function_of_gaussian_data_is_where_training_from_data_ends() -> None:
    # Given x_t, the mean of x_r is an Euler step of the flow, whose error is of second order: so is the gradient's.
    x0, eps, weights = quadrature()
    ratios = []
    for gap in (0.1, 0.05, 0.025):
        network, sigma = ClosedForm(), 1.0
        denoiser = Denoiser(network, X0(), Exact())
        objective = ConsistencyTraining(Neighbors(Fixed(18)), Squared(), Unweighted())
        objective.times.before = lambda t, process: t - gap / 80  # type: ignore[method-assign]  # noqa: B023
        t = times(sigma / 80).expand(len(x0))
        (weights * objective.losses_at(denoiser, x0, eps, t, {})).sum().backward()  # type: ignore[no-untyped-call]
        assert network.scale.grad is not None
        # By hand: 2 E[(f(x_t) - f(x_r)) (f(x_t) - mean)] for an affine f.
        here, there = ((VARIANCE + LEAST**2) / (VARIANCE + s**2) for s in (sigma, sigma - gap))
        covariance = VARIANCE + sigma * (sigma - gap)
        by_hand = 2 * math.sqrt(here) * (math.sqrt(here) * (VARIANCE + sigma**2) - math.sqrt(there) * covariance)
        assert network.scale.grad.item() == pytest.approx(by_hand, rel=1e-9)
        ratios.append(by_hand)
    np.testing.assert_allclose(np.array(ratios[:-1]) / np.array(ratios[1:]), 4, rtol=0.15)


def test_where_the_earlier_time_is_0_the_data_are_the_target() -> None:
    x0 = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=seeded())
    eps = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=seeded(1))
    t = times(0.05, 0.1, 2.0, 0.2, 30.0) / 80
    denoiser = Denoiser(Noisy(), Preconditioned(), PROCESS)
    objective = ConsistencyTraining(Shrinking(q=2.0), PseudoHuber(0.0), InverseOutput(0.5))
    r = objective.times.before(t, PROCESS)
    assert (r == 0).tolist() == [True, True, False, True, False]
    s = 80 * t.reshape(-1, 1, 1, 1)
    later = torch.where(r > 0, r, t)
    targets = denoiser(x0 + 80 * later.reshape(-1, 1, 1, 1) * eps, later, {}).x0
    targets = torch.where((r > 0).reshape(-1, 1, 1, 1), targets, x0)
    difference = denoiser(x0 + s * eps, t, {}).x0 - targets
    wanted = (1 / (80 * t) ** 2 + 4) * difference.flatten(1).norm(dim=1)
    torch.testing.assert_close(objective.losses_at(denoiser, x0, eps, t, {}), wanted)


def test_the_weight_of_improved_training_is_the_inverse_gap() -> None:
    t, r = times(2.0, 80.0) / 80, times(1.5, 60.0) / 80
    torch.testing.assert_close(InverseGap()(PROCESS, t, r), times(2.0, 0.05))


class Masked(nn.Module):
    """Puts out nothing but its dropout mask."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
        mask: Tensor = self.gain * self.dropout(torch.ones_like(x))
        return mask


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_both_sides_have_one_dropout_mask_drawn_once(decay: float) -> None:
    objective = ConsistencyTraining(Neighbors(Fixed(18)), Squared(), Unweighted(), decay)
    denoiser = Denoiser(Masked(), X0(), PROCESS).train()
    x0 = torch.randn(4, 1, 8, 8)
    t, _ = objective.times.draw(4, PROCESS, x0.device)
    masks = []
    for _ in range(2):
        assert not objective.losses_at(denoiser, x0, x0, t, {}).any()
        masks.append(denoiser(x0, t, {}).x0)
    assert not torch.equal(*masks)
    # After a loss the generator is where one forward pass leaves it.
    torch.manual_seed(3)
    objective.losses_at(denoiser, x0, x0, t, {})
    after = torch.rand(1)
    torch.manual_seed(3)
    denoiser(x0, t, {})
    assert torch.equal(after, torch.rand(1))
    # In evaluation there is none.
    denoiser.eval()
    assert objective.target(denoiser)(x0, t, {}).x0.eq(1).all()


def test_under_autocast_the_gradient_is_not_lost() -> None:
    network = nn.Conv2d(1, 1, 3, padding=1)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = network

        def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
            found: Tensor = self.conv(x)
            return found

    objective = ConsistencyTraining(Neighbors(Fixed(18)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(Denoiser(Plain(), Boundary(), PROCESS), torch.randn(4, 1, 4, 4), {})["loss"]
    loss.backward()  # type: ignore[no-untyped-call]
    assert network.weight.grad is not None
    assert network.weight.grad.any()


def test_the_target_is_an_average_whose_decay_follows_the_curriculum() -> None:
    objective = ConsistencyTraining(Neighbors(SquareRoot(2, 9, 5)), Squared(), Unweighted(), decay=0.7)
    denoiser = Denoiser(ClosedForm(2.0), X0(), Exact())
    x0, eps, _ = quadrature()
    scale: Any = denoiser.network.scale
    wanted, numbers = 2.0, []
    for step in range(5):
        t, _ = objective.times.draw(len(x0), denoiser.process, x0.device)
        objective.losses_at(denoiser, x0, eps, t, {})
        with torch.no_grad():
            scale.fill_(3.0 + step)
        numbers.append(math.ceil(math.sqrt(step / 5 * (10**2 - 2**2) + 2**2) - 1) + 1)
        mu = math.exp(2 * math.log(0.7) / numbers[-1])
        wanted = mu * wanted + (1 - mu) * (3.0 + step)
        objective.stepped(step, denoiser, Seen(t, t), lambda x: x)
        target: Any = objective.target(denoiser)
        assert target.network.network.scale.item() == pytest.approx(wanted, rel=1e-12)
        assert not target.network.network.scale.requires_grad
    assert numbers == sorted(numbers)
    state = objective.state_dict()
    assert {name: value.item() for name, value in state.items()} == {"step": 5, "target.scale": pytest.approx(wanted)}
    # A fresh objective takes it over, before it has a target and after.
    for used in (False, True):
        fresh = ConsistencyTraining(Neighbors(SquareRoot(2, 9, 5)), Squared(), Unweighted(), decay=0.7)
        if used:
            fresh.target(denoiser)
        fresh.load_state_dict(state)
        assert fresh.times.step == 5
        assert fresh.state_dict().keys() == state.keys()
        renewed: Any = fresh.target(denoiser)
        assert renewed.network.network.scale.item() == pytest.approx(wanted, rel=1e-12)


def test_two_runs_do_not_share_a_count_of_steps() -> None:
    pairs = Neighbors(SquareRoot())
    first, second = ConsistencyTraining(pairs), ConsistencyTraining(pairs)
    first.times.step = 7
    assert (second.times.step, pairs.step) == (0, 0)


# Distances


@pytest.mark.parametrize("distance", [Squared(), Absolute(), PseudoHuber(), PseudoHuber(0.0), PseudoHuber(0.3)])
def test_distances_are_their_formulas_and_have_gradients_where_images_agree(distance: Distance) -> None:
    x, y = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, generator=seeded())
    y[0] = x[0]
    x.requires_grad_(True)
    found = distance(x, y)
    d = (x - y).detach().flatten(1).numpy()
    given = getattr(distance, "c", 0.0)
    c = 0.00054 * math.sqrt(75) if given is None else given
    wanted = {
        Squared: (d**2).mean(1),
        Absolute: np.abs(d).mean(1),
        PseudoHuber: np.sqrt((d**2).sum(1) + c**2) - c,
    }[type(distance)]
    np.testing.assert_allclose(found.detach(), wanted, rtol=1e-12, atol=1e-15)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not x.grad[0].any()


def test_the_constant_of_pseudo_huber_is_the_papers() -> None:
    zero = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    one = zero.clone()
    one[0, 0, 0, 0] = 1
    assert PseudoHuber()(one, zero).item() == pytest.approx(math.sqrt(1 + 0.02993**2) - 0.02993, rel=1e-5)


def test_without_its_backbone_the_perceptual_distance_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> object:
        raise OSError("no network")

    monkeypatch.setattr("torchmetrics.functional.image.lpips._get_net", refused, raising=False)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refused)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refused)
    objective = ConsistencyTraining(distance=LPIPS())
    with pytest.raises(ValueError, match=r"weights of vgg are not to be had \(no network\).*PseudoHuber") as caught:
        objective.begin(Denoiser(Noisy(), Boundary(), PROCESS))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="3 channels, not 1"):
        LPIPS()(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


# Sampling


def consistency(x_t: Tensor, t: Tensor) -> Prediction:
    """The closed form as a denoiser."""
    x0 = closed(x_t, 80 * t)
    return Prediction(x0, (x_t - x0) / (80 * t))


@pytest.mark.parametrize(
    ("sampler", "sigmas"),
    [
        (Multistep(), [80.0]),
        (Multistep(grid=Levels(40, [0, 22, 39])), [80.0, 1.382]),
        (Multistep(grid=Levels(201, [0, 106, 200])), [80.0, 1.913]),
        (Multistep(grid=Levels(40, [0, 17, 39])), [80.0, 4.366]),
        (Multistep(grid=Levels(151, [0, 67, 150])), [80.0, 3.991]),
        (Multistep(grid=Sigmas([80.0, 0.821, 0.002])), [80.0, 0.821]),
        (Multistep(grid=Sigmas([80.0, 0.821, 0.0])), [80.0, 0.821]),
        (Multistep(3), list(grid(4)[:0:-1])),
    ],
)
def test_lists_of_levels_are_the_noise_levels_of_the_authors(sampler: Multistep, sigmas: list[float]) -> None:
    found = 80 * sampler.times(PROCESS)
    np.testing.assert_allclose(found, [*sigmas, 0.0], rtol=4e-4)
    assert sampler.evaluations(PROCESS) == len(sigmas)


def test_steps_alternate_between_an_image_and_noise_as_in_the_paper() -> None:
    x = torch.randn(6, 1, 2, 2, dtype=torch.float64, generator=seeded())
    found = Multistep(grid=Sigmas([80.0, 3.0, 0.5, 0.002]), clip=False)(consistency, x, PROCESS, draws(x))
    noise = draws(x)
    image = closed(80 * x, 80.0)
    for tau in (3.0, 0.5):
        image = closed(image + math.sqrt(tau**2 - LEAST**2) * noise(), tau)
    torch.testing.assert_close(found, image, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [PROCESS, VariancePreserving()], ids=["ve", "vp"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samples_of_the_closed_form_have_the_moments_of_the_data(process: Process, steps: int) -> None:
    x = torch.randn(40_000, 1, dtype=torch.float64, generator=seeded())

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = process.alpha_sigma(t)
        x0 = closed(x_t / alpha, sigma / alpha)
        return Prediction(x0, (x_t - alpha * x0) / sigma)

    found = Multistep(steps, clip=False)(denoise, x, process, draws(x, 1))
    assert found.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert found.var().item() == pytest.approx(VARIANCE, rel=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Levels(40, [0, 22]), r"must end at the last level, 39: .* append 39"),
        (lambda: Levels(40, [3, 22, 39]), r"must rise from 0 to the last level, 39"),
        (lambda: Levels(40, [0, 22, 22, 39]), r"must rise from 0"),
        (lambda: Levels(40, [0]), r"must rise from 0"),
        (lambda: Sigmas([0.8, 80.0]), r"at least 2 falling noise levels"),
        (
            lambda: Multistep(grid=Sigmas([80.0, 0.8])).times(PROCESS),
            r"at the last level, 0\.002: .* append 0\.002",
        ),
        (lambda: Multistep(3, Levels()).times(PROCESS), r"steps=3, but the list of times has 2 before its last"),
        (lambda: Multistep(0), r"sampler\.steps=0 must be at least 1"),
        (lambda: Fixed(1), r"levels=1 must be at least 2"),
        (lambda: SquareRoot(3, 2), r"first=3 <= last=2"),
        (lambda: Doubling(0), r"1 <= first=0"),
        (lambda: Shrinking(q=1.0), r"q=1\.0 > 1"),
        (lambda: PseudoHuber(-0.1), r"distance\.c=-0\.1 must be at least 0"),
        (lambda: LPIPS("resnet"), r"distance\.net='resnet' must be 'vgg'"),
        (lambda: ConsistencyTraining(decay=1.0), r"objective\.decay=1\.0 must lie in \[0, 1\)"),
        (lambda: InverseOutput(0.0), r"sigma_data=0\.0 must be above 0"),
        (lambda: TimeSearch(40, 1), r"steps=1 must be at least 2"),
        (lambda: TimeSearch(2, 2), r"levels=2 at least 3"),
        (
            lambda: ConsistencyDistillation("nowhere.ckpt").load_teacher(),
            r"teacher=nowhere\.ckpt: there is no",
        ),
    ],
)
def test_errors_name_the_value_and_the_bound(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def with_shape(network: nn.Module, **shape: object) -> nn.Module:
    for name, value in shape.items():
        setattr(network, name, value)
    return network


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (Denoiser(with_shape(Noisy(), image_size=16), Eps(), PROCESS), r"images of image_size=16, .* image_size=8"),
        (Denoiser(with_shape(Noisy(), in_channels=1), Eps(), PROCESS), r"channels of in_channels=1, .* in_channels=3"),
        (
            Denoiser(with_shape(Noisy(), num_classes=10), Eps(), PROCESS),
            r"num_classes=10, .* num_classes=None",
        ),
        (
            Denoiser(Noisy(), Eps(), VariancePreserving()),
            r"process, VariancePreserving\(.*\), than .*VarianceExploding\(",
        ),
        (
            Denoiser(Noisy(), Eps(), VarianceExploding(0.002, 50.0)),
            r"process, VarianceExploding\(.*sigma_max=50\.0.*\), .*sigma_max=80\.0",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_training(teacher: Denoiser, message: str) -> None:
    class Other(ConsistencyDistillation):
        def load_teacher(self) -> Denoiser:
            return teacher

    network = with_shape(Noisy(), image_size=8, in_channels=3)
    with pytest.raises(ValueError, match=message) as caught:
        Other("").begin(Denoiser(network, Boundary(), PROCESS))
    assert "\n" not in str(caught.value)


def test_a_compiled_network_with_dropout_is_refused_since_its_masks_would_differ() -> None:
    denoiser = Denoiser(Masked(), X0(), PROCESS).train()
    denoiser.run = denoiser.network
    with pytest.raises(ValueError, match=r"dropout masks .* set --model\.network\.dropout 0"):
        ConsistencyTraining(Neighbors(Fixed(18)))(denoiser, torch.zeros(2, 1, 2, 2), {})


# Search


@pytest.mark.parametrize("least", [1, 2, 7, 22, 37, 38])
def test_ternary_search_finds_the_least_value_with_few_others(least: int) -> None:
    asked: list[int] = []

    def answer() -> Iterator[int]:
        search = ternary(1, 38)
        asked.append(next(search))
        try:
            while True:
                asked.append(search.send(abs(asked[-1] - least) ** 1.5))
        except StopIteration as end:
            yield end.value

    assert list(answer()) == [least]
    assert len(asked) == len(set(asked)) < 20


def test_a_table_searches_times_one_after_another() -> None:
    # The score is least at 0, 12, 30.
    table, filled = TimeSearch(40, 3), []  # type: ignore[var-annotated]
    for cell in table.sequence(None, filled):  # type: ignore[arg-type]
        indices = [int(word) for word in cell.row.split(", ")][1:-1]
        score = 100 - 10 * len(indices) + sum(abs(a - b) for a, b in zip(indices, (12, 30), strict=False))
        filled.append((cell, {"scores": {"fid": score}}))
        assert isinstance(cell.sampler, Multistep)
        assert cell.sampler.evaluations(PROCESS) == len(indices) + 1
    best = min(filled, key=lambda found: found[1]["scores"]["fid"])
    assert best[0].row == "0, 12, 30, 39"
    assert table.place(best[0].row) == 30


# Editing


def edited(how: Edit, sampler: Multistep, shape: tuple[int, int, int], scale: float = 1.0) -> Edited:
    """The consistency function of the data as a model of images, (C, H, W), with a method."""
    network = with_shape(ClosedForm(scale).float(), image_size=shape[1], in_channels=shape[0])
    return Edited(DiffusionModule(network, Exact(), X0(), sampler=sampler), how)  # type: ignore[arg-type]


def test_what_is_not_known_of_independent_pixels_has_the_distribution_of_the_data() -> None:
    # Pixels are independent, so that the known ones say nothing of the others.
    count, mask = 10_000, torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    given = {"image": torch.full((count, 1, 2, 2), 0.9), "mask": mask.expand(count, 1, 2, 2)}
    found = edited(Projected(KnownPixels()), Multistep(3, clip=False), (1, 2, 2)).sample(range(count), condition=given)
    torch.testing.assert_close(found[..., 0], given["image"][..., 0], rtol=0, atol=1e-6)
    assert found[..., 1].mean().item() == pytest.approx(MEAN, abs=0.01)
    assert found[..., 1].var().item() == pytest.approx(VARIANCE, rel=0.05)


def test_colourisation_keeps_the_luminance_and_super_resolution_the_means() -> None:
    y = torch.rand(2, 3, 8, 8, generator=seeded())
    weights = torch.tensor([0.2989, 0.587, 0.114])
    sampler = Multistep(grid=Sigmas([80.0, 5.0, 1.0, 0.002]), clip=False)
    for how, kept in (
        (Luminance(), lambda image: torch.einsum("nchw,c->nhw", image, weights)),
        (PatchMeans(4), lambda image: image.reshape(2, 3, 2, 4, 2, 4).mean((3, 5))),
    ):
        found = edited(Projected(how), sampler, (3, 8, 8)).sample(range(2), condition={"image": y})
        torch.testing.assert_close(kept(found), kept(y), rtol=0, atol=1e-5)
        assert (found - y).abs().max() > 0.1


def test_predictions_are_clipped_before_what_is_known_is_put_in() -> None:
    y, mask = torch.full((1, 1, 2, 2), 1.5), torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, None]
    model = edited(Projected(KnownPixels()), Multistep(2), (1, 2, 2), scale=1e4)
    found = model.sample([0], condition={"image": y, "mask": mask})
    assert found[..., 0].tolist() == [[[1.5, 1.5]]]
    assert found[..., 1].abs().tolist() == [[[1.0, 1.0]]]


def test_strokes_are_noised_to_the_sampler_s_first_level_and_sampled_from_there() -> None:
    strokes = torch.rand(3, 1, 2, 2, generator=seeded())
    model = edited(SDEdit(None), Multistep(grid=Sigmas([5.38, 2.24, 0.002]), clip=False), (1, 2, 2))
    found = model.sample(range(3), seed=4, condition={"image": strokes})
    noise = model.noise(range(3), seed=4)
    image = closed(strokes + 5.38 * noise.draw(), 5.38)
    image = closed(image + math.sqrt(2.24**2 - LEAST**2) * noise.draw(), 2.24)
    torch.testing.assert_close(found, image.float(), rtol=0, atol=1e-5)
    assert model.evaluations(None) == 2


def test_a_step_of_heun_takes_each_image_from_its_own_time_to_its_own() -> None:
    x = torch.randn(3, 1, dtype=torch.float64, generator=seeded())
    t, s = times(0.5, 0.1, 0.9), times(0.4, 0.05, 0.3)
    teacher: DenoiseFn = Denoiser(OptimalDenoiser(), X0(), Exact()).bind({})
    together, _ = heun_step(teacher, x, Exact(), t, s)
    alone = torch.cat([heun_step(teacher, x[i : i + 1], Exact(), t[i], s[i])[0] for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


def test_karras_levels_are_the_grid_of_the_paper() -> None:
    np.testing.assert_allclose(80 * Karras()(18, PROCESS)[:-1].flip(0), grid(18), rtol=1e-9)
