"""Training of autoencoders: losses by hand, both optimisers, the discriminator's start, two processes, the codebook."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.images import from_uint8
from diffusion_lit.loggers import read_curves
from diffusion_lit.methods.autoencoder import codebook
from diffusion_lit.methods.autoencoder.losses import Adversarial, ReconstructionLoss, last_gradients
from diffusion_lit.methods.autoencoder.module import AutoencoderModule
from diffusion_lit.metrics import Perceptual
from diffusion_lit.networks import DiagonalGaussian, PatchGAN, VectorQuantizer
from tests import forked, tiny
from tests.systems import autoencoder, vq

BATCH: Any = {"image": torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1}
N = 64
"""Numbers in an image."""


def descent(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def plain(make: Callable[..., AutoencoderModule] = autoencoder, rate: float = 1e-2, **kwargs: Any) -> AutoencoderModule:
    """Without dropout, batch normalization and schedules, and with plain gradient descent from the first step."""
    parts: dict[str, Any] = {
        "normalization": "group",
        "optimizer": descent(rate),
        "discriminator_optimizer": descent(1e-2),
        "lr_scheduler": None,
        "discriminator_lr_scheduler": None,
        "adversarial": Adversarial(discriminator(), start=0),
    }
    return make(**{**parts, **kwargs})


def discriminator(normalization: Any = "group") -> PatchGAN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = PatchGAN(1, 8, 1, normalization, 4)
        # Weights of 0.02 in so small a network make gradients of 1e-4, which the adaptive weight would not balance.
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network


# Losses by hand


class Brightness(Perceptual):
    """Difference of the mean brightness."""

    name = "brightness"

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return (images - targets).flatten(1).mean(1).abs()


IMAGES = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
FAKES = torch.tensor([[0.5, -1.0, 0.0, 1.0], [0.25, 0.25, 0.25, 0.25]]).view(2, 1, 2, 2)


def test_the_perceptual_distance_counts_in_every_pixel_and_channel() -> None:
    nll, parts = ReconstructionLoss("sum", perceptual=Brightness(), perceptual_weight=3.0)(FAKES, IMAGES)
    # Absolute differences 0.5, 0, 0.5, 1 and four times 0.25; of the means 0 and 0.25.
    assert parts["brightness"].tolist() == [0.0, 0.25]
    assert parts["l1"].tolist() == [0.5, 0.25]
    assert nll.tolist() == [2.0 + 4 * 0.0, 1.0 + 4 * 3 * 0.25]
    means, _ = ReconstructionLoss("mean", 1.0, Brightness(), 3.0)(FAKES, IMAGES)
    assert means.tolist() == [0.5, 0.25 + 3 * 0.25]
    alone, parts = ReconstructionLoss("mean", 1.0, None)(FAKES, IMAGES)
    assert alone.tolist() == [0.5, 0.25]
    assert parts.keys() == {"l1"}


def test_the_loss_of_a_kl_model_is_its_sums_over_the_batch_divided_by_its_size() -> None:
    system = plain(loss=ReconstructionLoss("sum", 1e-3, None))
    torch.manual_seed(0)
    found = system.losses(BATCH)
    torch.manual_seed(0)
    passed = system.network(BATCH["image"])
    mean, log_variance = system.network.moments(BATCH["image"]).chunk(2, dim=1)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
    expected = ((BATCH["image"] - passed.images).abs().sum() + 1e-3 * kl.sum()) / 4
    torch.testing.assert_close(found["loss"], expected)
    torch.testing.assert_close(found["losses"].mean(), expected)
    torch.testing.assert_close(found["kl"].sum(), kl.sum())


def test_the_loss_of_a_vq_model_is_of_means() -> None:
    system = plain(vq)
    found = system.losses(BATCH)
    z = system.network.moments(BATCH["image"])
    q = system.network.regularizer.decoded(z)
    expected = (BATCH["image"] - system.network.decode(z)).abs().mean() + 1.25 * (z - q).square().mean()
    torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=1e-6)


class Given(PatchGAN):
    """Its logits are the images."""

    def forward(self, images: Tensor) -> Tensor:
        return images


REAL, FAKE = [2.0, 0.5, -1.0], [-2.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("hinge", ((0 + 0.5 + 2) / 3 + (0 + 1.25 + 2) / 3) / 2),
        ("vanilla", sum(math.log1p(math.exp(-x)) for x in REAL) / 6 + sum(math.log1p(math.exp(x)) for x in FAKE) / 6),
    ],
)
def test_the_losses_of_both_networks_on_given_logits(loss: Any, expected: float) -> None:
    adversarial = Adversarial(Given(1, 8, 1), loss=loss)
    real, fake = (torch.tensor(logits).view(3, 1, 1, 1) for logits in (REAL, FAKE))
    found = adversarial(real, fake)
    assert float(found["discriminator"]) == pytest.approx(expected, rel=1e-6)
    assert float(found["logits_real"]) == pytest.approx(0.5)
    assert float(found["logits_fake"]) == pytest.approx(-0.25)
    assert float(adversarial.against(fake)) == pytest.approx(0.25)
    halved = Adversarial(Given(1, 8, 1), loss=loss, factor=0.5)(real, fake)
    assert float(halved["discriminator"]) == pytest.approx(expected / 2, rel=1e-6)


def test_the_adaptive_weight_is_the_ratio_of_two_gradients_up_to_a_cap() -> None:
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    nll, g = 3 * last[0] + 4 * last[1], 0.3 * last[0] - 0.4 * last[1]
    of_nll, of_g = last_gradients(nll, g, last, 1)
    assert of_nll.tolist() == [3, 4]
    adversarial = Adversarial(Given(1, 8, 1), weight=0.75, cap=1e4)
    assert float(adversarial.adaptive_weight(of_nll, of_g)) == pytest.approx(0.75 * 5 / (0.5 + 1e-4), rel=1e-6)
    nothing = torch.zeros(2)
    assert float(adversarial.adaptive_weight(of_nll / 10, nothing)) == pytest.approx(0.75 * 0.5 / 1e-4, rel=1e-6)
    assert float(adversarial.adaptive_weight(of_nll, nothing)) == pytest.approx(0.75 * 1e4, rel=1e-6)
    assert float(adversarial.adaptive_weight(nothing, of_g)) == 0


class Weights(L.Callback):
    """Keeps the weights after every step, by the part that they belong to."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.keep(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.keep(pl_module)

    def keep(self, module: L.LightningModule) -> None:
        parts: dict[str, list[Tensor]] = {}
        for name, parameter in module.named_parameters():
            parts.setdefault(name.split(".")[0], []).append(parameter.detach().flatten().clone())
        self.seen.append({name: torch.cat(tensors) for name, tensors in parts.items()})


def trained(place: Path, system: AutoencoderModule, steps: int, **kwargs: Any) -> list[dict[str, Tensor]]:
    weights = Weights()
    settings: dict[str, Any] = {"gradient_clip_val": None, **kwargs}
    tiny.trainer(place, steps, [weights, Scalars()], **settings).fit(system, tiny.data())
    return weights.seen


@pytest.mark.parametrize("cap", [1e6, 16.0])
def test_sums_are_means_with_the_weight_of_the_regularizer_and_the_cap_divided(tmp_path: Path, cap: float) -> None:
    """N times the loss with a rate N times smaller makes the same steps, whether the cap binds or not."""
    seen = []
    for name, scale in (("sum", 1), ("mean", N)):
        system = plain(
            loss=ReconstructionLoss(name, 1e-2 / scale, None),  # type: ignore[arg-type]
            adversarial=Adversarial(discriminator(), start=0, cap=cap / scale),
            rate=1e-2 * scale / N,
        )
        seen.append(trained(tmp_path / name, system, 3))
    weights = [dict(read_curves(tmp_path / name)["train/adaptive_weight"]) for name in ("sum", "mean")]
    assert [w / N for w in weights[0].values()] == pytest.approx(list(weights[1].values()), rel=1e-3)
    assert (max(weights[0].values()) == 0.5 * cap) == (cap == 16.0)
    for sums, means in zip(*seen, strict=True):
        for part, tensor in sums.items():
            torch.testing.assert_close(means[part], tensor, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(seen[0][3]["network"], seen[0][0]["network"], atol=1e-4)


# Steps


def test_a_step_is_one_of_the_autoencoder_and_one_of_the_discriminator_on_its_new_reconstructions(
    tmp_path: Path,
) -> None:
    images: list[Tensor] = []

    class Images(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: object) -> None:
            images.append(batch["image"].clone())

    system, expected = plain(vq), plain(vq)
    tiny.trainer(tmp_path, 1, [Images()], gradient_clip_val=None).fit(system, tiny.data())
    network, judge = expected.network, expected.adversarial.discriminator  # type: ignore[union-attr]

    def descend(parameters: Any, loss: Tensor) -> None:
        parameters = list(parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 1e-2 * gradient

    [x] = images
    passed = network(x)
    nll, g = (x - passed.images).abs().mean(), -judge(passed.images).mean()
    last = network.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, g)]
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    descend(network.parameters(), nll + passed.terms["codebook"].mean() + weight * g)
    with torch.no_grad():
        fake = network(x).images
    descend(judge.parameters(), ((1 - judge(x)).relu().mean() + (1 + judge(fake)).relu().mean()) / 2)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(system.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


def test_the_discriminator_takes_part_from_its_start_on_which_counts_optimiser_steps(tmp_path: Path) -> None:
    system = plain(adversarial=Adversarial(discriminator(), start=2))
    seen = trained(tmp_path, system, 4)
    moved = [not torch.equal(a["adversarial"], b["adversarial"]) for a, b in itertools.pairwise(seen)]
    assert moved == [False, False, True, True]
    assert all(not torch.equal(a["network"], b["network"]) for a, b in itertools.pairwise(seen))
    assert system.trainer.global_step == 4
    curves = read_curves(tmp_path)
    for name in ("adaptive_weight", "adversarial", "discriminator", "logits_real", "logits_fake"):
        assert [step for step, _ in curves[f"train/{name}"]] == [3, 4], name
    assert [step for step, _ in curves["train/kl"]] == [1, 2, 3, 4]
    before = trained(tmp_path / "before", plain(adversarial=Adversarial(discriminator(), start=9)), 2)
    alone = trained(tmp_path / "alone", plain(adversarial=None), 2)
    torch.testing.assert_close(before[2]["network"], alone[2]["network"])
    torch.testing.assert_close(before[2]["network"], seen[2]["network"])


def test_the_gradient_norm_that_is_logged_is_the_autoencoder_s(tmp_path: Path) -> None:
    limited = trained(tmp_path, plain(rate=1.0), 1, gradient_clip_val=1e-3)
    step = limited[1]["network"] - limited[0]["network"]
    assert float(step.norm()) == pytest.approx(1e-3, rel=1e-3)
    [(_, norm)] = read_curves(tmp_path)["train/gradient_norm"]
    [(_, other)] = read_curves(tmp_path)["train/discriminator_gradient_norm"]
    assert norm > 10 * other > 0


def test_the_discriminator_is_in_checkpoints_and_not_averaged(tmp_path: Path) -> None:
    system = autoencoder()
    tiny.trainer(tmp_path, 3, [EMA([0.5]), Scalars(), Checkpoints()]).fit(system, tiny.data())
    checkpoint = tiny.load(tiny.last(tmp_path))
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"network", "adversarial"}
    assert system.averages is not None
    assert {name.split(".")[0] for name in system.averages.average()} == {"network"}
    assert len(checkpoint["optimizer_states"]) == len(checkpoint["lr_schedulers"]) == 2
    running = "adversarial.discriminator.main.3.running_mean"
    assert torch.equal(checkpoint["state_dict"][running], system.state_dict()[running])
    assert float(checkpoint["state_dict"][running].abs().max()) > 0


def test_validation_measures_the_loss_without_the_adversarial_one(tmp_path: Path) -> None:
    system = plain(vq)
    tiny.trainer(tmp_path, 1, [Scalars()], val_check_interval=1, limit_val_batches=None).fit(system, tiny.data())
    images = torch.cat([from_uint8(batch["image"]) for batch in tiny.data().stored_batches(0, 1, 600, "val")])
    with torch.no_grad():
        expected = system.eval().losses({"image": images})
    curves = read_curves(tmp_path)
    for name in ("loss", "l1", "codebook"):
        assert [value for _, value in curves[f"val/{name}"]] == [pytest.approx(float(expected[name].mean()), rel=1e-4)]
    assert "val/adversarial" not in curves


def test_without_a_discriminator_batches_are_accumulated(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", plain(vq, adversarial=None), 2)
    halves = trained(tmp_path / "halves", plain(vq, adversarial=None), 2, accumulate_grad_batches=2)
    torch.testing.assert_close(whole[2]["network"], halves[-1]["network"], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2: a AutoencoderModule has several optimisers"):
        trained(tmp_path / "refused", plain(), 2, accumulate_grad_batches=2)


def test_a_run_in_bf16_stays_near_one_in_float32(tmp_path: Path) -> None:
    for name, precision in (("full", "32-true"), ("half", "bf16-mixed")):
        trained(tmp_path / name, plain(vq), 3, precision=precision)
    full, half = (dict(read_curves(tmp_path / name)["train/l1"]) for name in ("full", "half"))
    assert list(half.values()) == pytest.approx(list(full.values()), rel=0.02)


@pytest.mark.further
def test_a_compiled_autoencoder_is_the_same_and_refused_beside_a_discriminator(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.compile=eager: the adaptive weight needs"):
        trained(tmp_path / "refused", plain(), 1, compile="eager")
    plainly = trained(tmp_path / "plain", plain(vq, adversarial=None), 2)
    compiled = trained(tmp_path / "compiled", plain(vq, adversarial=None), 2, compile="eager", channels_last=True)
    torch.testing.assert_close(plainly[2]["network"], compiled[2]["network"], rtol=1e-4, atol=1e-6)


# Two processes


class FromTheImage(DiagonalGaussian):
    """Noise that is a function of the latents, so that a gradient does not depend on who computes it."""

    def sample(self, moments: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        return mean + (0.5 * log_variance).exp() * torch.sin(50 * mean.detach())


@pytest.mark.further
def test_two_processes_make_the_steps_of_one_but_for_batch_normalization(tmp_path: Path) -> None:
    """To 1e-5 of the weights' changes; with batch normalization each sees the statistics of its own share."""
    systems: dict[str, Callable[[], AutoencoderModule]] = {
        "kl": lambda: plain(regularizer=FromTheImage()),
        "vq": lambda: plain(vq),
        "batch": lambda: plain(adversarial=Adversarial(discriminator("batch"), start=0), regularizer=FromTheImage()),
    }

    def train(count: int) -> None:
        for name, make in systems.items():
            settings: dict[str, Any] = {"devices": count, "strategy": "ddp"} if count == 2 else {}
            weights = trained(tmp_path / f"{name}_{count}", made := make(), 3, **settings)
            torch.save(weights, tmp_path / f"{name}_{count}_{made.global_rank}.pt")

    train(1)
    child = forked.fork(lambda: forked.in_two(lambda: train(2)), tmp_path / "output.txt")
    assert forked.wait(child) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    for name in systems:
        one, first, second = (
            torch.load(tmp_path / f"{name}_{end}.pt", weights_only=True) for end in ("1_0", "2_0", "2_1")
        )
        for part in ("network", "adversarial"):
            assert torch.equal(first[-1][part], second[-1][part])
            change = (one[-1][part] - one[0][part]).norm()
            error = float((one[-1][part] - first[-1][part]).norm() / change)
            assert error < 1e-5 if name != "batch" else error > 1e-3, (name, part, error)
        curves = [read_curves(tmp_path / f"{name}_{count}")["train/adaptive_weight"] for count in (1, 2)]
        if name != "batch":
            assert [w for _, w in curves[1]] == pytest.approx([w for _, w in curves[0]], rel=1e-4)


# The codebook


def test_use_and_perplexity_of_counted_codes() -> None:
    counts = torch.tensor([2, 2, 0, 0])
    assert float(codebook.use(counts)) == 0.5
    assert float(codebook.perplexity(counts)) == pytest.approx(2)
    assert float(codebook.perplexity(torch.tensor([1, 3]))) == pytest.approx(4 / 3**0.75)
    assert float(codebook.perplexity(torch.ones(7))) == pytest.approx(7)


def collapsed() -> AutoencoderModule:
    """A system with one code near the latents and 299 far from them."""
    system = plain(regularizer=VectorQuantizer(300))
    with torch.no_grad():
        system.get_parameter("network.quantize.embedding.weight")[1:] = 1e4
    return system


def test_a_codebook_that_collapsed_is_a_warning_with_its_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "EVERY", 3)
    with pytest.warns(UserWarning, match=r"step 3: the last 3 steps used 1 of 300 codes \(0\.33%\): unless") as seen:
        trained(tmp_path / "collapsed", collapsed(), 6)
    assert len([warning for warning in seen if "codes" in str(warning.message)]) == 1
    # Warnings are errors here: none of these warns.
    trained(tmp_path / "early", collapsed(), 2)
    trained(tmp_path / "lively", plain(vq), 4)
    used = read_curves(tmp_path / "collapsed")
    assert dict(used["train/codebook_use"])[1] == pytest.approx(1 / 300)
    assert dict(used["train/codebook_perplexity"])[1] == pytest.approx(1)


# Mistakes


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"adversarial": Adversarial(PatchGAN(3, 8, 1))}, r"makes 1 channels and the discriminator takes 3"),
        ({"adversarial": Adversarial(PatchGAN(1, 8, 3))}, r"num_layers=3 leaves nothing of images of 8 pixels"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder(**parts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReconstructionLoss("total"), "loss.reduction='total' must be 'sum' or 'mean'"),  # type: ignore[arg-type]
        (lambda: ReconstructionLoss(regularizer_weight=-1.0), "regularizer_weight=-1.0"),
        (lambda: Adversarial(PatchGAN(), start=-1), "adversarial.start=-1 must be at least 0"),
        (lambda: Adversarial(PatchGAN(), cap=0.0), "adversarial.cap=0.0 must be above 0"),
        (lambda: Adversarial(PatchGAN(), loss="l2"), "adversarial.loss='l2'"),  # type: ignore[arg-type]
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
