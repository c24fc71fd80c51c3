"""Perceptual distances, and scores that compare each image with its own target."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.functional.image.lpips import _LPIPS

from diffusion_lit.methods.feature_network import FeatureNetworkModule, TrainedPerceptual
from diffusion_lit.metrics import LPIPS, PSNR, SSIM, Evidence, PerceptualDistance, Pixels, Score, WeightsUnavailable
from diffusion_lit.metrics.perceptual import feature_distance
from diffusion_lit.networks import ConvClassifier
from tests import tiny

IMAGES, TARGETS = (torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in range(2))
MODELS: dict[Any, Any] = {"squeeze": torchvision.models.squeezenet1_1, "alex": torchvision.models.alexnet}


def backbone(place: Path, net: str = "squeeze") -> Path:
    """A file like torchvision's, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = MODELS[net](weights=None).features.state_dict()
    path = place / f"{net}.pth"
    torch.save({f"features.{name}": tensor for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("net", MODELS)
def test_the_distance_is_that_of_torchmetrics_with_the_backbone_of_the_file(tmp_path: Path, net: Any) -> None:
    state = torch.get_rng_state()
    distance = LPIPS(net, str(backbone(tmp_path, net)))
    distance.prepare()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = _LPIPS(net=net, pnet_rand=True)
    assert torch.equal(distance(IMAGES, TARGETS), theirs(IMAGES, TARGETS).flatten())
    assert distance(IMAGES, IMAGES).tolist() == [0, 0, 0]
    assert torch.equal(
        distance(IMAGES[:, :1], TARGETS[:, :1]), distance(*(x[:, :1].repeat(1, 3, 1, 1) for x in (IMAGES, TARGETS)))
    )


def test_gradients_reach_the_images_and_nothing_of_the_network_is_trained_or_stored(tmp_path: Path) -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.distance = LPIPS("squeeze", str(backbone(tmp_path)))

    owner = Owner()
    images = IMAGES.clone().requires_grad_()
    owner.train()
    owner.distance(images, TARGETS).sum().backward()
    assert images.grad is not None
    assert bool((images.grad.flatten(1).abs().amax(1) > 0).all())
    assert list(owner.parameters()) == []
    assert owner.state_dict() == {}
    assert torch.equal(owner.distance(IMAGES, TARGETS), owner.distance(IMAGES, TARGETS))


def test_a_backbone_in_the_folder_of_torch_hub_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    backbone(folder).rename(folder / "squeezenet1_1-b8a52dc0.pth")
    given = LPIPS("squeeze", str(folder / "squeezenet1_1-b8a52dc0.pth"))
    assert torch.equal(LPIPS("squeeze")(IMAGES, TARGETS), given(IMAGES, TARGETS))


def test_a_backbone_that_cannot_be_had_is_an_error_of_one_line_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("diffusion_lit.metrics.features.urlopen", offline)
    damaged, other = tmp_path / "damaged.pth", tmp_path / "other.pth"
    damaged.write_bytes(b"no tensors")
    torch.save({"features.0.weight": torch.zeros(2)}, other)
    wrong = torch.load(backbone(tmp_path), weights_only=True)
    wrong["features.0.weight"] = torch.zeros(2)
    torch.save(wrong, tmp_path / "wrong.pth")
    for distance, words in (
        (LPIPS(), ["no weights of vgg", "no network", "vgg16-397923af.pth", "TrainedPerceptual"]),
        (LPIPS(backbone=str(tmp_path / "none.pth")), ["none.pth: no such file", "`backbone`"]),
        (LPIPS(backbone=str(damaged)), ["damaged.pth is not a file of tensors"]),
        (LPIPS(backbone=str(other)), ["other.pth has no features.0.bias", "weights of vgg"]),
        (LPIPS("squeeze", str(tmp_path / "wrong.pth")), ["wrong.pth does not fit squeeze"]),
    ):
        with pytest.raises(WeightsUnavailable) as error:
            distance.prepare()
        assert [word for word in words if word not in str(error.value)] == []
        assert "\n" not in str(error.value)


def test_unsuitable_images_and_backbones_are_refused() -> None:
    with pytest.raises(ValueError, match="net='resnet' must be one of vgg, alex, squeeze"):
        LPIPS("resnet")  # type: ignore[arg-type]
    for shape in ((2, 32, 32), (3, 16, 16)):
        with pytest.raises(ValueError, match="LPIPS takes images of 1 or 3 channels and at least 32 pixels"):
            LPIPS().check(shape)


def test_a_distance_of_features_is_that_of_directions() -> None:
    a = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).T.reshape(1, 2, 1, 2)
    b = torch.tensor([[4.0, 3.0], [0.0, 7.0]]).T.reshape(1, 2, 1, 2)
    # Of the first position 2 - 2 (12 + 12) / 25, of the second 0.
    assert float(feature_distance([a, a], [b, a])) == pytest.approx((2 - 48 / 25) / 4, rel=1e-5)


def classifier(place: Path) -> Path:
    """A checkpoint of an untrained classifier of digits."""
    network = ConvClassifier(image_size=8, in_channels=1, num_classes=10, width=4)
    system = FeatureNetworkModule(network, tiny.optimizer)
    arguments = {"image_size": 8, "in_channels": 1, "num_classes": 10, "width": 4}
    system.config = {
        "model": {
            "class_path": "diffusion_lit.methods.feature_network.FeatureNetworkModule",
            "init_args": {
                "network": {"class_path": "diffusion_lit.networks.ConvClassifier", "init_args": arguments},
                "optimizer": {"class_path": "torch.optim.Adam"},
            },
        }
    }
    tiny.trainer(place, 2).fit(system, tiny.data())
    return tiny.last(place)


def test_a_classifier_of_one_s_own_gives_a_distance(tmp_path: Path) -> None:
    distance = TrainedPerceptual(str(classifier(tmp_path)))
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = distance(images, targets)
    assert found.shape == (2,)
    assert bool((found > 0).all())
    found.sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().max()) > 0
    assert list(distance.parameters()) == []
    distance.check((1, 8, 8))
    with pytest.raises(ValueError, match=r"takes images of \(1, 8, 8\), not \(3, 8, 8\)"):
        distance.check((3, 8, 8))
    with pytest.raises(WeightsUnavailable, match=r"perceptual\.checkpoint=none: there is no such file; train one by"):
        TrainedPerceptual("none").prepare()


# Scores


def scored(score: Score, images: Tensor, targets: Tensor) -> dict[str, float]:
    columns = score.per_image(nn.Identity(), images, {"image": targets.float() / 127.5 - 1})
    assert all(len(column) == len(images) for column in columns.values())
    return score(Evidence(torch.empty(0), columns=columns), Pixels())


def levels(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).round().to(torch.uint8)


def test_psnr_is_the_mean_of_that_of_each_image() -> None:
    images, targets = levels(IMAGES), levels(TARGETS)
    each = [
        float(peak_signal_noise_ratio(a / 255, b / 255, data_range=1.0)) for a, b in zip(images, targets, strict=True)
    ]
    assert scored(PSNR(), images, targets) == {"psnr": pytest.approx(sum(each) / 3, rel=1e-6)}
    one_level = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
    assert scored(PSNR(), one_level, one_level + 1) == {"psnr": pytest.approx(20 * math.log10(255), rel=1e-5)}
    assert scored(PSNR(), one_level, one_level) == {"psnr": pytest.approx(100)}


def test_ssim_of_constant_images_is_that_of_their_brightness() -> None:
    images, targets = (torch.full((2, 3, 16, 16), level, dtype=torch.uint8) for level in (51, 204))
    constant = 0.01**2
    expected = (2 * 0.2 * 0.8 + constant) / (0.2**2 + 0.8**2 + constant)
    assert scored(SSIM(), images, targets) == {"ssim": pytest.approx(expected, rel=1e-4)}
    assert scored(SSIM(), levels(IMAGES), levels(IMAGES)) == {"ssim": pytest.approx(1, rel=1e-6)}
    with pytest.raises(ValueError, match="images of 8 x 8 pixels are smaller than its window of 11"):
        scored(SSIM(), images[..., :8, :8], targets[..., :8, :8])


def test_a_perceptual_distance_is_a_score_in_float32_whatever_the_caller_s_precision(tmp_path: Path) -> None:
    distance = LPIPS("squeeze", str(backbone(tmp_path)))
    score = PerceptualDistance(distance)
    score.prepare()
    images, targets = levels(IMAGES), levels(TARGETS)
    expected = distance(images / 127.5 - 1, targets / 127.5 - 1).mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scored(score, images, targets)
    assert found == {"lpips": pytest.approx(float(expected), rel=1e-5)}


def test_images_without_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"PSNR: the model's images have no targets.*leave it out of --evaluation"):
        PSNR().per_image(nn.Identity(), levels(IMAGES), {})
