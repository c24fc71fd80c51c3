"""Scores of images beside their targets, against closed forms."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.evaluation import Evaluation
from diffusion_lit.images import from_uint8
from diffusion_lit.metrics import PSNR, SSIM, Evidence, FeatureDistance, PairedScore, Pixels
from diffusion_lit.records import read_records
from tests import tiny
from tests.test_requests import data, model


def images(count: int = 3, channels: int = 3, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def value(score: PairedScore, x: Tensor, y: Tensor) -> float:
    columns = score.per_image(nn.Identity(), x, {"image": from_uint8(y)})
    return score(Evidence(torch.empty(0), columns=columns), Pixels())[score.name]


@pytest.mark.parametrize("levels", [1, 5, 51])
def test_a_constant_difference_has_the_psnr_of_its_square(levels: int) -> None:
    y = images() // 2
    assert value(PSNR(), y + levels, y) == pytest.approx(20 * torch.log10(torch.tensor(255 / levels)).item(), abs=1e-4)


def test_equal_images_have_a_finite_psnr_and_a_similarity_of_one() -> None:
    assert value(PSNR(), images(), images()) == pytest.approx(100)
    assert value(SSIM(), images(), images()) == pytest.approx(1)


@pytest.mark.parametrize(("a", "b"), [(0, 255), (100, 110)])
def test_the_similarity_of_two_flat_images_is_the_luminance_term(a: int, b: int) -> None:
    flat = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    x, y, c1 = a / 255, b / 255, 0.01**2
    assert value(SSIM(), flat + a, flat + b) == pytest.approx((2 * x * y + c1) / (x**2 + y**2 + c1), abs=5e-4)


def test_small_images_need_a_smaller_window() -> None:
    x = images(size=8)
    with pytest.raises(ValueError, match=r"SSIM: images of 8 x 8 pixels are smaller than its window of 11; lower"):
        value(SSIM(), x, x)
    assert SSIM(sigma=0.5).window == 5
    assert 0 < value(SSIM(sigma=0.5), x, x // 2) < 1
    with pytest.raises(ValueError, match="sigma=0 must be above 0"):
        SSIM(sigma=0)


def test_the_feature_distance_is_that_of_directions() -> None:
    x = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    y = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    found = FeatureDistance()(Evidence(x, targets=y), Pixels())
    # Angles of 0, 45 and 180 degrees: 2 - 2 cos.
    assert found == {"feature_distance/pixels": pytest.approx((0 + (2 - 2**0.5) + 4) / 3)}


def test_scores_without_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="PSNR: the model's images have no targets"):
        PSNR().per_image(nn.Identity(), images(), {})
    with pytest.raises(ValueError, match="FeatureDistance: the model's images have no targets"):
        FeatureDistance()(Evidence(torch.zeros(2, 3)), Pixels())


def test_an_evaluation_compares_image_i_with_what_example_i_shows(tmp_path: Path) -> None:
    """The model makes the data's own images, so that nothing differs."""
    evaluation = Evaluation(
        scores=[PSNR(), SSIM(sigma=0.5), FeatureDistance()], extractor=Pixels(2), num_images=5, batch_size=2
    )
    tiny.trainer(tmp_path, callbacks=[evaluation]).test(model(), data())
    [record] = read_records(tmp_path / "results.jsonl")
    assert record["scores"] == pytest.approx({"psnr": 100, "ssim": 1, "feature_distance/pixels": 0}, abs=1e-5)
    assert record["targets"] == ["pixels"]
