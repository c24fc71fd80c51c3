"""Denoising diffusion GANs: the chain in numbers, the penalty in closed form, and training."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.diffusion import DDIM, Ancestral, DiscreteProcess, FixedSmall, IntegratedLinear
from diffusion_lit.methods.ddgan import DDGAN, gradient_penalty
from diffusion_lit.networks import Discriminator, PairDiscriminator
from diffusion_lit.stepping import TRAINING, seed_step
from tests import forked, tiny
from tests.systems import ddgan

CHAIN = DiscreteProcess(4, IntegratedLinear())
K = torch.arange(1, 5, dtype=torch.float64)


def lively() -> DDGAN:
    """A system whose generator makes something: a fresh one has last layers of nearly zero."""
    system = ddgan()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in system.denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return system.eval()


def test_the_chain_of_four_steps_is_the_published_one() -> None:
    betas = IntegratedLinear().betas(4)
    np.testing.assert_allclose(betas, [0.478255, 0.849206, 0.956418, 0.987404], atol=5e-7)
    alpha, _ = CHAIN.alpha_sigma(K / 4)
    np.testing.assert_allclose(alpha**2, [0.521745, 0.0786760, 0.00342888, 4.319e-5], rtol=2e-4)
    a, b, variance = CHAIN.posterior(K / 4, (K - 1) / 4)
    np.testing.assert_allclose(variance, [0, 0.440819, 0.884202, 0.984061], atol=5e-7)
    np.testing.assert_allclose(b, [1, 0.665778, 0.269191, 0.0578215], atol=5e-7)
    np.testing.assert_allclose(a, [0, 0.201576, 0.193001, 0.111852], atol=5e-7)
    assert CHAIN.network_time(K / 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_alpha_bar_is_that_of_the_continuous_process_relative_to_its_first_time(steps: int) -> None:
    def alpha_bar(t: float) -> float:
        return math.exp(-0.5 * (20 - 0.1) * t**2 - 0.1 * t)

    process = DiscreteProcess(steps, IntegratedLinear())
    alpha, _ = process.alpha_sigma(torch.arange(1, steps + 1, dtype=torch.float64) / steps)
    times = [k / steps * (1 - 1e-3) + 1e-3 for k in range(1, steps + 1)]
    np.testing.assert_allclose(alpha**2, [alpha_bar(t) / alpha_bar(1e-3) for t in times], rtol=1e-12)


def test_pairs_have_the_moments_of_the_chain() -> None:
    torch.manual_seed(0)
    x0 = torch.full((200_000, 1, 1, 1), 0.8)
    t, x_s, x_t = ddgan().pairs(x0)
    a_bar, _ = CHAIN.alpha_sigma(torch.arange(5, dtype=torch.float64) / 4)
    for k in range(1, 5):
        mine = t * 4 == k
        pair = torch.stack([x_s[mine].flatten(), x_t[mine].flatten()]).double()
        scale_s, scale_t = a_bar[k - 1], a_bar[k]
        torch.testing.assert_close(pair.mean(1), 0.8 * torch.stack([scale_s, scale_t]), atol=0.02, rtol=0)
        step = scale_t / scale_s
        off = step * (1 - scale_s**2)
        expected = torch.stack([1 - scale_s**2, off, off, 1 - scale_t**2]).reshape(2, 2)
        torch.testing.assert_close(torch.cov(pair), expected, atol=0.02, rtol=0)


def test_the_penalty_of_a_quadratic_discriminator_is_known() -> None:
    """D(x) = x^T A x / 2 has the gradient A x, and the penalty |A x|^2 the gradient 2 A x x^T in A."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    matrix = (matrix + matrix.T).requires_grad_()
    x = torch.randn(5, 1, 2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    flat = x.flatten(1)
    penalty = gradient_penalty(torch.einsum("bi,ij,bj->b", flat, matrix, flat) / 2, x)
    expected = np.mean([np.sum((matrix.detach().numpy() @ row) ** 2) for row in flat.detach().numpy()])
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-12)
    [gradient] = torch.autograd.grad(penalty, matrix)
    mean = (matrix.detach() @ flat.detach().T @ flat.detach()) / 5
    # D uses A by its symmetric part, so that A x x^T counts half from either side.
    torch.testing.assert_close(gradient, mean + mean.T, rtol=1e-10, atol=1e-10)


class Scaled(Discriminator):
    """w times the mean of x_s: the penalty is w^2 / number of pixels, however the images are."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.in_channels = 8, 1
        self.w = nn.Parameter(torch.tensor(3.0))

    def forward(self, x_s: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        return self.w * x_s.flatten(1).mean(1)


def test_the_penalty_enters_by_half_of_gamma_and_not_by_its_interval() -> None:
    system = ddgan(discriminator=Scaled(), r1_gamma=0.5, r1_every=15)
    batch: Any = {"image": torch.randn(4, 1, 8, 8)}
    losses = []
    for penalize in (True, False):
        torch.manual_seed(0)
        losses.append(system.discriminator_losses(batch, penalize))
    assert float(losses[0]["r1"]) == pytest.approx(9 / 64, rel=1e-5)
    difference = (losses[0]["discriminator"] - losses[1]["discriminator"]).detach()
    assert float(difference) == pytest.approx(0.25 * 9 / 64, rel=1e-4)


def test_the_penalty_is_part_of_every_nth_step(tmp_path: Path) -> None:
    penalized = []

    class Watched(DDGAN):
        def discriminator_losses(self, batch: Any, penalize: bool) -> dict[str, Tensor]:
            penalized.append(penalize)
            return super().discriminator_losses(batch, penalize)

    system = ddgan(Watched, r1_every=3)
    tiny.trainer(tmp_path, 5).fit(system, tiny.data())
    assert penalized == [True, False, False, True, False]


def test_losses_are_the_non_saturating_ones() -> None:
    system = ddgan(discriminator=Scaled(), r1_gamma=0.0)
    with torch.no_grad():
        next(system.discriminator.parameters()).zero_()
    batch: Any = {"image": torch.randn(4, 1, 8, 8)}
    assert float(system.losses(batch)["loss"].detach()) == pytest.approx(math.log(2))
    assert float(system.discriminator_losses(batch, False)["discriminator"].detach()) == pytest.approx(2 * math.log(2))


def test_the_generator_s_step_leaves_the_discriminator_alone_and_the_other_way_round(tmp_path: Path) -> None:
    frozen = ddgan(discriminator_optimizer=lambda p: torch.optim.SGD(p, lr=0.0), discriminator_lr_scheduler=None)
    before = {n: p.detach().clone() for n, p in frozen.named_parameters()}
    tiny.trainer(tmp_path, 2).fit(frozen, tiny.data())
    moved = {n.split(".")[0] for n, p in frozen.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"denoiser"}


def test_the_generator_alone_is_averaged_and_both_rates_fall(tmp_path: Path) -> None:
    system = ddgan()
    trainer = tiny.trainer(tmp_path, 3, [EMA([0.5]), Scalars(), Checkpoints()])
    trainer.fit(system, tiny.data())
    assert system.averages is not None
    assert {name.split(".")[0] for name in system.averages.average()} == {"denoiser"}
    rate = 1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * 3 / 10)) / 2
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == pytest.approx([rate, rate])
    assert trainer.global_step == 3


def test_samples_follow_the_posterior_with_a_fresh_latent_variable_in_each_step() -> None:
    system = lively()
    noise = system.noise([4, 9], seed=1)
    x = noise.draw()
    with torch.no_grad():
        for k in (4, 3, 2, 1):
            t, s = torch.tensor(k / 4, dtype=torch.float64), torch.tensor((k - 1) / 4, dtype=torch.float64)
            x0 = system.denoiser.network(x, torch.full((2,), k - 1.0), {"latent": noise.draw([5])})
            a, b, variance = (float(c) for c in CHAIN.posterior(t, s))
            x = a * x + b * x0
            if k > 1:
                x = x + math.sqrt(variance) * noise.draw()
    torch.testing.assert_close(system.sample([4, 9], seed=1), x, atol=1e-5, rtol=0)


def test_an_image_is_the_same_in_whatever_batch() -> None:
    system = lively()
    many = system.sample(range(6), seed=2)
    torch.testing.assert_close(system.sample([4], seed=2), many[4:5], atol=1e-5, rtol=0)
    assert not torch.allclose(many[4], many[5], atol=1e-2)
    assert system.evaluations(None) == 4


class Compiled(Scaled):
    """Looks as torch.compile leaves a module, which a machine without a compiler cannot make."""

    _orig_mod = None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"network": tiny.network()}, "UNet has no latent variable"),
        ({"r1_every": 0}, r"r1_gamma=0\.02 must be finite and at least 0, and r1_every=0 at least 1"),
        ({"discriminator": Compiled()}, "needs second derivatives, which a compiled discriminator does not have"),
        ({"discriminator": PairDiscriminator(16, 1, [8, 8])}, r"the generator makes \(1, 8\) and the discriminator"),
        ({"sampler": DDIM(steps=5)}, r"sampler\.steps=5 must lie in 1 \.\. 4"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddgan(**parts)


def test_accumulated_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches=2: a DDGAN has several optimisers"):
        tiny.trainer(tmp_path, 2, accumulate_grad_batches=2).fit(ddgan(), tiny.data())


def test_the_default_sampler_is_the_chain_s_posterior() -> None:
    sampler = ddgan().sampler
    assert type(sampler) is Ancestral
    assert type(sampler.variance) is FixedSmall
    assert not sampler.clip


def test_both_networks_step_by_the_mean_gradient_of_two_processes(tmp_path: Path) -> None:
    """Compared with the gradients of the shares, computed one after the other in this process."""

    def descent(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    def system() -> DDGAN:
        plain: dict[str, Any] = {"optimizer": descent, "discriminator_optimizer": descent}
        return ddgan(**plain, lr_scheduler=None, discriminator_lr_scheduler=None)

    class Images(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: object) -> None:
            torch.save(batch["image"], tmp_path / f"image_{trainer.global_rank}.pt")

    def train() -> None:
        made = system()
        settings: dict[str, Any] = {"devices": 2, "strategy": "ddp", "gradient_clip_val": None}
        tiny.trainer(tmp_path, 1, [Images()], **settings).fit(made, tiny.data())
        torch.save(made.state_dict(), tmp_path / "weights.pt")

    child = forked.fork(lambda: forked.in_two(train), tmp_path / "output.txt")
    assert forked.wait(child) == 0, (tmp_path / "output.txt").read_text()[-3000:]

    expected = system()
    batches: list[Any] = [{"image": torch.load(tmp_path / f"image_{rank}.pt", weights_only=True)} for rank in (0, 1)]
    assert not torch.equal(batches[0]["image"], batches[1]["image"])
    states = []
    for rank in (0, 1):
        seed_step(expected.seed, TRAINING, rank, 0)
        states.append(torch.get_rng_state())

    def descend(parameters: list[nn.Parameter], loss: Callable[[Any], Tensor]) -> None:
        total = [torch.zeros_like(p) for p in parameters]
        for rank in (0, 1):
            torch.set_rng_state(states[rank])
            gradients = torch.autograd.grad(loss(batches[rank]), parameters)
            states[rank] = torch.get_rng_state()
            total = [a + b for a, b in zip(total, gradients, strict=True)]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, total, strict=True):
                parameter.sub_(0.1 * gradient / 2)

    descend(
        list(expected.discriminator.parameters()), lambda b: expected.discriminator_losses(b, True)["discriminator"]
    )
    descend(list(expected.denoiser.parameters()), lambda b: expected.losses(b)["loss"])
    trained = torch.load(tmp_path / "weights.pt", weights_only=True)
    start = system().state_dict()
    moved = [name for name in trained if not torch.equal(trained[name], start[name])]
    assert {name.split(".")[0] for name in moved} == {"denoiser", "discriminator"}
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-7)
