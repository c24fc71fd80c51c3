from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from diffusion_lit.diffusion import (
    Denoiser,
    DenoisingLoss,
    DiscreteProcess,
    Eps,
    Gaussian,
    Hybrid,
    LogNormal,
    LossSecondMoment,
    MinSNR,
    Preconditioned,
    Process,
    Seen,
    Times,
    UniformTimes,
    VarianceExploding,
    VariationalBound,
    Velocity,
    Weighting,
)
from tests.diffusion.gaussian import alpha_bars, linear_betas


class Answer(nn.Module):
    """A network that computes its answer from (x_t, k)."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
        return self.answer(x, time.long() + 1)


def denoiser(answer: Callable[[Tensor, Tensor], Tensor], num_steps: int = 1000) -> Denoiser:
    return Denoiser(Answer(answer), Eps(), DiscreteProcess(num_steps))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(batch: int) -> Tensor:
    return torch.rand(batch, 1, 4, 4, dtype=torch.float64, generator=seeded(7)) * 2 - 1


def test_a_network_that_knows_the_noise_has_no_loss() -> None:
    x0 = data(64)
    bars = torch.from_numpy(alpha_bars(linear_betas(1000)))

    def true_noise(x: Tensor, k: Tensor) -> Tensor:
        bar = bars[k].reshape(-1, 1, 1, 1)
        return (x - bar.sqrt() * x0) / (1 - bar).sqrt()

    assert DenoisingLoss()(denoiser(true_noise), x0, {}, generator=seeded())["loss"] < 1e-20


def test_a_network_that_says_nothing_loses_1_on_average() -> None:
    losses = DenoisingLoss()(denoiser(lambda x, k: torch.zeros_like(x)), data(4096), {}, generator=seeded())["losses"]
    # Means of 16 squared normals: variance 2 / 16 each.
    assert losses.mean().item() == pytest.approx(1, abs=4 * (2 / 16 / 4096) ** 0.5)
    assert losses.var().item() == pytest.approx(2 / 16, rel=0.15)


def test_every_time_is_as_likely_as_any_other() -> None:
    found = DenoisingLoss()(denoiser(lambda x, k: x, 20), torch.zeros(40_000, 1), {}, generator=seeded())
    k = (found["t"] * 20).round().long()
    counts = torch.bincount(k, minlength=21)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 0.01


def test_noise_is_drawn_afresh_for_every_image_and_does_not_follow_the_time() -> None:
    seen: list[Tensor] = []

    def record(x: Tensor, k: Tensor) -> Tensor:
        seen.extend([x, k.double()])
        return torch.zeros_like(x)

    DenoisingLoss()(denoiser(record, 5), torch.zeros(20_000, 2, dtype=torch.float64), {}, generator=seeded())
    x, k = seen
    bars = torch.from_numpy(alpha_bars(linear_betas(5)))
    eps = x / (1 - bars[k.long()]).sqrt()[:, None]
    correlations = torch.corrcoef(torch.stack([eps[:, 0], eps[:, 1], eps[:, 0].roll(1), k]))
    torch.testing.assert_close(correlations, torch.eye(4, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize("weighting", [MinSNR(), Velocity()], ids=["min-snr", "velocity"])
def test_each_images_loss_is_weighted_at_its_own_time(weighting: Weighting) -> None:
    network, x0 = denoiser(lambda x, k: torch.zeros_like(x)), data(32)
    plain = DenoisingLoss()(network, x0, {}, generator=seeded())
    weighted = DenoisingLoss(weighting)(network, x0, {}, generator=seeded())
    assert torch.equal(plain["t"], weighted["t"])
    snr = torch.from_numpy(alpha_bars(linear_betas(1000)))[(plain["t"] * 1000).round().long()]
    snr = snr / (1 - snr)
    weights = (5 / snr).clamp(max=1) if isinstance(weighting, MinSNR) else 1 + 1 / snr
    torch.testing.assert_close(weighted["losses"], weights * plain["losses"], rtol=1e-9, atol=0)


def test_the_loss_is_the_mean_of_the_losses_and_only_it_has_a_gradient() -> None:
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    found = DenoisingLoss()(denoiser(lambda x, k: scale * x), data(16), {}, generator=seeded())
    torch.testing.assert_close(found["loss"].detach(), found["losses"].mean())
    assert found["loss"].requires_grad
    assert found["losses"].shape == found["t"].shape == (16,)
    assert not found["losses"].requires_grad
    assert not found["t"].requires_grad


def test_one_seed_gives_one_loss_and_another_seed_another() -> None:
    network = denoiser(lambda x, k: 0.5 * x)
    first, again, other = (DenoisingLoss()(network, data(16), {}, generator=seeded(s))["loss"] for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_times_are_drawn_before_the_noise_and_by_the_same_generator() -> None:
    network, x0 = denoiser(lambda x, k: 0.5 * x), data(16)
    found = DenoisingLoss()(network, x0, {}, Gaussian(), seeded(3))
    generator = seeded(3)
    t = torch.randint(1, 1001, (16,), generator=generator).double() / 1000
    eps = torch.randn(x0.shape, dtype=x0.dtype, generator=generator)
    assert torch.equal(found["t"], t)
    assert torch.equal(found["losses"], DenoisingLoss().losses_at(network, x0, eps, t, {}))
    torch.manual_seed(3)
    assert torch.equal(DenoisingLoss()(network, x0, {})["losses"], found["losses"])


class Halves(Times):
    """Draws the first half of the chain three times as often as the second, with weights that undo it."""

    def draw(
        self, count: int, process: Process, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        k = torch.arange(count) % 4
        t = torch.where(k < 3, 0.25, 0.75).double()
        return t, torch.where(k < 3, 2 / 3, 2.0).double()


def test_importance_weights_scale_the_loss_and_not_the_losses() -> None:
    network = denoiser(lambda x, k: k[:, None] * torch.ones_like(x), 100)
    x0 = torch.zeros(400, 1, dtype=torch.float64)
    found = DenoisingLoss(times=Halves())(network, x0, {}, generator=seeded())
    k = found["t"] * 100
    assert set(k.tolist()) == {25, 75}
    expected = (found["losses"][k == 25].mean() + found["losses"][k == 75].mean()) / 2
    torch.testing.assert_close(found["loss"], expected)
    assert found["losses"][k == 75].min() > 1000


def test_an_objective_learns_only_if_its_times_do() -> None:
    gathered: list[Tensor] = []

    def gather(tensor: Tensor) -> Tensor:
        gathered.append(tensor)
        return tensor

    network = denoiser(lambda x, k: x, 4)
    seen = Seen(torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    plain = DenoisingLoss()
    plain.stepped(1, network, seen, gather)
    assert not gathered
    assert plain.state_dict() == {}
    learning = DenoisingLoss(times=LossSecondMoment(history=1))
    learning(network, data(2), {})
    learning.stepped(1, network, seen, gather)
    torch.testing.assert_close(gathered[0], torch.stack([seen.t, seen.losses.double()], dim=1))
    other = DenoisingLoss(times=LossSecondMoment(history=1))
    other.load_state_dict(learning.state_dict())
    assert other.state_dict()["losses"].flatten().tolist() == [1, 2, 3, 4]


def test_two_bounds_do_not_share_what_they_learn() -> None:
    first, second = VariationalBound(), VariationalBound()
    first.times.draw(1, DiscreteProcess(4), torch.device("cpu"), seeded())
    first.times.update(torch.ones(1), torch.ones(1))
    assert first.state_dict()
    assert second.state_dict() == {}


@pytest.mark.parametrize("shape", [(8, 3, 2, 5), (8, 7), (8, 2, 3, 4, 5)], ids=["not square", "vectors", "volumes"])
def test_the_loss_is_the_mean_square_over_images_of_any_shape(shape: tuple[int, ...]) -> None:
    x0, eps = torch.randn(2, *shape, dtype=torch.float64, generator=seeded())
    network = denoiser(lambda x, k: torch.zeros_like(x))
    t = torch.full((8,), 0.5, dtype=torch.float64)
    found = DenoisingLoss().losses_at(network, x0, eps, t, {})
    expected = torch.stack([image.pow(2).sum() / image.numel() for image in eps])
    torch.testing.assert_close(found, expected)


def test_edms_objective_trains_on_edms_process() -> None:
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    class Linearly(nn.Module):
        def forward(self, x: Tensor, time: Tensor, condition: object) -> Tensor:
            return scale * x

    process = VarianceExploding()
    found = DenoisingLoss(times=LogNormal())(Denoiser(Linearly(), Preconditioned(), process), data(64), {})
    found["loss"].backward()  # type: ignore[no-untyped-call]
    assert scale.grad is not None
    assert scale.grad.isfinite()
    assert (process.first_time <= found["t"]).all()


def test_every_objective_has_the_times_of_its_paper_unless_others_are_given() -> None:
    assert isinstance(DenoisingLoss().times, UniformTimes)
    assert isinstance(Hybrid().times, UniformTimes)
    assert isinstance(VariationalBound().times, LossSecondMoment)
    given = LogNormal()
    assert all(make(times=given).times is given for make in (DenoisingLoss, Hybrid, VariationalBound))
