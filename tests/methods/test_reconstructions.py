"""Autoencoders as generators of reconstructions, their scores and pictures; and the perceptual loss in a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_lit.callbacks import EMA, Checkpoints, SampleGrid, Scalars
from diffusion_lit.data import Folder, ImageData
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.images import from_uint8, to_uint8
from diffusion_lit.loggers import read_curves
from diffusion_lit.methods.autoencoder.losses import Adversarial, ReconstructionLoss
from diffusion_lit.methods.autoencoder.module import AutoencoderModule
from diffusion_lit.methods.autoencoder.scores import CodebookUse
from diffusion_lit.metrics import (
    LPIPS,
    PSNR,
    FrechetDistance,
    PairedScore,
    PerceptualDistance,
    Pixels,
    WeightsUnavailable,
)
from diffusion_lit.networks import Autoencoder, PatchGAN
from diffusion_lit.records import RESULTS, read_records
from diffusion_lit.types import Condition
from tests import forked, tiny
from tests.metrics.test_perceptual import backbone
from tests.systems import autoencoder, vq


def test_image_i_is_the_reconstruction_of_image_i_from_its_likeliest_latents() -> None:
    system = autoencoder().eval()
    given = system.conditions(tiny.data())
    index = torch.tensor([3, 1797 + 3, 5])
    images = system.sample(index.tolist(), seed=1, condition=given(index))
    originals = from_uint8(tiny.data().some([3, 5], "val")["image"])
    with torch.no_grad():
        mean, _ = system.network.moments(originals).chunk(2, dim=1)
        expected = system.network.decode(mean)
    torch.testing.assert_close(images, expected[[0, 0, 1]], atol=1e-5, rtol=0)
    assert system.evaluations(None) == 1
    with pytest.raises(ValueError, match="was given none; give --data"):
        system.sample([0], condition={})


class Perfect(AutoencoderModule):
    """Gives images back as they are."""

    calls = 0
    last = 10**6

    def generate(self, noise: Any, condition: Condition, sampler: Any, on_step: Any = None) -> Tensor:
        type(self).calls += 1
        if type(self).calls > type(self).last:
            raise RuntimeError("on purpose")
        return condition["image"].to(self.device)


def evaluation(**kwargs: Any) -> Evaluation:
    settings: dict[str, Any] = {"scores": [FrechetDistance(), PSNR()], "extractor": Pixels(4), "split": "val"}
    return Evaluation(**{**settings, "num_images": 1797, "batch_size": 600, **kwargs})


def results(place: Path, system: AutoencoderModule, callback: Evaluation, **kwargs: Any) -> dict[str, Any]:
    made = tiny.trainer(place, callbacks=[callback], logger=False, limit_test_batches=1, **kwargs)
    made.test(system, tiny.data())
    scores: dict[str, Any] = read_records(place / RESULTS)[-1]["scores"]
    return scores


def test_reconstructions_are_scored_against_their_originals(tmp_path: Path) -> None:
    perfect = results(tmp_path / "perfect", autoencoder(kind=Perfect), evaluation())
    assert perfect == {"frechet/pixels": pytest.approx(0, abs=1e-6), "psnr": pytest.approx(100)}
    system = vq()
    scores = [FrechetDistance(), PSNR(), CodebookUse()]
    found = results(tmp_path / "vq", system, evaluation(scores=scores, num_images=100, batch_size=30))
    originals = tiny.data().some(range(100), "test")["image"]
    system.eval()
    with torch.no_grad():
        codes = system.codes(from_uint8(originals))
        images = to_uint8(system.network.decode(system.network.moments(from_uint8(originals))))
    mse = ((images.double() - originals.double()) / 255).square().flatten(1).mean(1)
    assert found["psnr"] == pytest.approx(float(-10 * mse.log10().mean()), rel=1e-4)
    counts = torch.bincount(codes.flatten(), minlength=16).double()
    assert found["codebook_use"] == float((counts > 0).double().mean())
    p = counts[counts > 0] / counts.sum()
    assert found["codebook_perplexity"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-6)
    with pytest.raises(ValueError, match="CodebookUse: the AutoencoderModule has no codebook; leave it out"):
        results(tmp_path / "kl", autoencoder(), evaluation(scores=[CodebookUse()], num_images=4, batch_size=4))


def test_an_evaluation_that_was_stopped_is_continued_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = results(tmp_path / "whole", autoencoder(kind=Perfect), evaluation())
    monkeypatch.setattr(Perfect, "calls", 0)
    monkeypatch.setattr(Perfect, "last", 2)
    with pytest.raises(RuntimeError, match="on purpose"):
        results(tmp_path / "parts", autoencoder(kind=Perfect), evaluation())
    monkeypatch.setattr(Perfect, "calls", 0)
    assert results(tmp_path / "parts", autoencoder(kind=Perfect), evaluation()) == whole
    assert Perfect.calls == 1


class Brightness(PairedScore):
    """Mean brightness."""

    name = "brightness"

    def compare(self, images: Tensor, targets: Tensor) -> Tensor:
        return images.flatten(1).mean(1)


def test_an_evaluation_by_further_scores_does_not_continue_a_stopped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Perfect, "calls", 0)
    monkeypatch.setattr(Perfect, "last", 2)
    with pytest.raises(RuntimeError, match="on purpose"):
        results(tmp_path, autoencoder(kind=Perfect), evaluation())
    monkeypatch.setattr(Perfect, "last", 10**6)
    found = results(tmp_path, autoencoder(kind=Perfect), evaluation(scores=[PSNR(), Brightness()]))
    assert found.keys() == {"psnr", "brightness"}


def test_scores_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    def score(place: Path, **kwargs: Any) -> None:
        scores = [FrechetDistance(), PSNR(), CodebookUse()]
        results(place, vq(), evaluation(scores=scores, num_images=50, batch_size=8), **kwargs)

    score(tmp_path / "one")
    two = lambda: score(tmp_path / "two", devices=2, strategy="ddp")  # noqa: E731
    child = forked.fork(lambda: forked.in_two(two), tmp_path / "output.txt")
    assert forked.wait(child) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    one, both = (read_records(tmp_path / name / RESULTS)[-1]["scores"] for name in ("one", "two"))
    assert one == both


def test_a_grid_shows_originals_beside_reconstructions(tmp_path: Path) -> None:
    grid = SampleGrid(num_images=4, batch_size=3)
    tiny.trainer(tmp_path, 1, [grid]).fit(autoencoder(kind=Perfect), tiny.data())
    picture = Image.open(tmp_path / "samples.png")
    # Two columns of pairs of 64 x 64 pixels, with gaps of 4.
    assert picture.size == (2 * 128 + 4, 2 * 64 + 4)
    left, right = picture.crop((0, 0, 64, 64)), picture.crop((64, 0, 128, 64))
    # Enlarged together: only the pixels at the seam differ.
    inner = (8, 0, 56, 64)
    assert left.crop(inner).tobytes() == right.crop(inner).tobytes()
    assert len(set(left.tobytes())) > 10


# The perceptual loss


@pytest.fixture
def colours(tmp_path: Path) -> ImageData:
    """Eight images of 32 x 32 noise."""
    folder = tmp_path / "images"
    folder.mkdir()
    noise = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, image in enumerate(noise):
        Image.fromarray(image.numpy()).save(folder / f"{number}.png")
    return ImageData(Folder(str(folder), 32), batch_size=4)


def perceptual(file: Path) -> AutoencoderModule:
    """A colour autoencoder with LPIPS by a small backbone."""
    network = Autoencoder(32, 3, 2, width=8, multipliers=[1, 2], num_blocks=1, num_groups=4)
    judge = Adversarial(PatchGAN(3, 8, 2, "group", 4), start=0)
    return AutoencoderModule(network, ReconstructionLoss(perceptual=LPIPS("squeeze", str(file))), judge)


def test_lpips_is_part_of_the_loss_and_in_no_checkpoint_or_optimiser(tmp_path: Path, colours: ImageData) -> None:
    system = perceptual(backbone(tmp_path))
    tiny.trainer(tmp_path / "run", 2, [EMA([0.5]), Scalars(), Checkpoints()]).fit(system, colours)
    values = dict(read_curves(tmp_path / "run")["train/lpips"])
    assert all(0 < value < 1 for value in values.values())
    checkpoint = tiny.load(tiny.last(tmp_path / "run"))
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"network", "adversarial"}
    held = sum(len(group["params"]) for state in checkpoint["optimizer_states"] for group in state["param_groups"])
    assert held == len(list(system.network.parameters())) + len(list(system.adversarial.parameters()))  # type: ignore[union-attr]
    assert not any(module.training for module in system.loss.perceptual._network.network.modules())  # type: ignore[union-attr]


def test_lpips_refuses_small_images_before_a_run_begins(tmp_path: Path) -> None:
    system = autoencoder(loss=ReconstructionLoss(perceptual=LPIPS("squeeze", str(backbone(tmp_path)))))
    with pytest.raises(ValueError, match=r"LPIPS takes images of 1 or 3 channels and at least 32 pixels"):
        tiny.trainer(tmp_path / "run", 2).fit(system, tiny.data())


def test_a_missing_backbone_ends_a_run_before_it_begins(tmp_path: Path, colours: ImageData) -> None:
    with pytest.raises(WeightsUnavailable, match=r"none\.pth: no such file; give torchvision's squeezenet1_1"):
        tiny.trainer(tmp_path / "run", 2).fit(perceptual(tmp_path / "none.pth"), colours)
    assert not (tmp_path / "run" / "checkpoints").exists()
    score = PerceptualDistance(LPIPS("squeeze", str(tmp_path / "none.pth")))
    with pytest.raises(WeightsUnavailable, match=r"none\.pth: no such file"):
        results(tmp_path / "test", autoencoder(kind=Perfect), evaluation(scores=[score]))
    assert not (tmp_path / "test" / "evaluation").exists()
