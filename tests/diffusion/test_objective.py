from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from diffusion_lit.diffusion import Denoiser, DenoisingLoss, DiscreteProcess, Eps, MinSNR, Velocity, Weighting
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

    assert DenoisingLoss()(denoiser(true_noise), x0, {}, seeded())["loss"] < 1e-20


def test_a_network_that_says_nothing_loses_1_on_average() -> None:
    losses = DenoisingLoss()(denoiser(lambda x, k: torch.zeros_like(x)), data(4096), {}, seeded())["losses"]
    # Means of 16 squared normals: variance 2 / 16 each.
    assert losses.mean().item() == pytest.approx(1, abs=4 * (2 / 16 / 4096) ** 0.5)
    assert losses.var().item() == pytest.approx(2 / 16, rel=0.15)


def test_every_time_is_as_likely_as_any_other() -> None:
    found = DenoisingLoss()(denoiser(lambda x, k: x, 20), torch.zeros(40_000, 1), {}, seeded())
    k = (found["t"] * 20).round().long()
    counts = torch.bincount(k, minlength=21)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 0.01


def test_noise_is_drawn_afresh_for_every_image_and_does_not_follow_the_time() -> None:
    seen: list[Tensor] = []

    def record(x: Tensor, k: Tensor) -> Tensor:
        seen.extend([x, k.double()])
        return torch.zeros_like(x)

    DenoisingLoss()(denoiser(record, 5), torch.zeros(20_000, 2, dtype=torch.float64), {}, seeded())
    x, k = seen
    bars = torch.from_numpy(alpha_bars(linear_betas(5)))
    eps = x / (1 - bars[k.long()]).sqrt()[:, None]
    correlations = torch.corrcoef(torch.stack([eps[:, 0], eps[:, 1], eps[:, 0].roll(1), k]))
    torch.testing.assert_close(correlations, torch.eye(4, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize("weighting", [MinSNR(), Velocity()], ids=["min-snr", "velocity"])
def test_each_images_loss_is_weighted_at_its_own_time(weighting: Weighting) -> None:
    network, x0 = denoiser(lambda x, k: torch.zeros_like(x)), data(32)
    plain = DenoisingLoss()(network, x0, {}, seeded())
    weighted = DenoisingLoss(weighting)(network, x0, {}, seeded())
    assert torch.equal(plain["t"], weighted["t"])
    snr = torch.from_numpy(alpha_bars(linear_betas(1000)))[(plain["t"] * 1000).round().long()]
    snr = snr / (1 - snr)
    weights = (5 / snr).clamp(max=1) if isinstance(weighting, MinSNR) else 1 + 1 / snr
    torch.testing.assert_close(weighted["losses"], weights * plain["losses"], rtol=1e-9, atol=0)


def test_the_loss_is_the_mean_of_the_losses_and_only_it_has_a_gradient() -> None:
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    found = DenoisingLoss()(denoiser(lambda x, k: scale * x), data(16), {}, seeded())
    torch.testing.assert_close(found["loss"].detach(), found["losses"].mean())
    assert found["loss"].requires_grad
    assert found["losses"].shape == found["t"].shape == (16,)
    assert not found["losses"].requires_grad
    assert not found["t"].requires_grad


def test_one_seed_gives_one_loss_and_another_seed_another() -> None:
    network = denoiser(lambda x, k: 0.5 * x)
    first, again, other = (DenoisingLoss()(network, data(16), {}, seeded(s))["loss"] for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
