"""Good and defective images with masks: MVTec AD's layout, and digits with defects made by rule."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lit.data import ImageData, MVTec
from diffusion_lit.data.defects import STRONG, DefectDigits, DefectDigitsTest
from diffusion_lit.data.mvtec import MVTecTest


def save(path: Path, size: tuple[int, int] = (16, 16), value: int = 100, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * len(mode) if mode == "RGB" else value).save(path)


def save_mask(path: Path, size: tuple[int, int] = (16, 16), white: int = 255) -> None:
    """A mask whose right half is white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size[::-1], dtype=np.uint8)
    pixels[:, size[0] // 2 :] = white
    Image.fromarray(pixels).save(path)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    for i in range(3):
        save(tmp_path / "train" / "good" / f"{i}.png")
    for i in (10, 2):
        save(tmp_path / "test" / "scratch" / f"{i}.png")
        save_mask(tmp_path / "ground_truth" / "scratch" / f"{i}_mask.png")
    save(tmp_path / "test" / "good" / "0.png")
    return tmp_path


def opened(root: Path, image_size: int = 8, channels: int = 1) -> MVTecTest:
    images = MVTec(str(root), image_size, channels).load("test")
    assert isinstance(images, MVTecTest)
    return images


def test_images_have_anomalib_s_labels_and_masks_and_are_in_the_order_of_their_numbers(parts: Path) -> None:
    images = opened(parts)
    assert images.names == ["good/0.png", "scratch/2.png", "scratch/10.png"]
    batch = images.batch([0, 1])
    assert batch["gt_label"].tolist() == [0, 1]  # type: ignore[typeddict-item]
    masks = batch["gt_mask"]  # type: ignore[typeddict-item]
    assert masks.shape == (2, 1, 8, 8)
    assert not masks[0].any()
    assert masks[1, 0, 0].tolist() == [False] * 4 + [True] * 4
    assert images.masked.all()


def test_training_sees_good_images_only_and_there_is_no_validation(parts: Path) -> None:
    data = ImageData(MVTec(str(parts), 8, 1), batch_size=1)
    assert len(data.dataset("train")) == 3
    assert data.parts() == ["train", "test"]
    save(parts / "validation" / "good" / "7.png")
    assert len(ImageData(MVTec(str(parts), 8, 1)).dataset("val")) == 1


def test_a_mask_may_be_white_by_any_value_and_is_cropped_as_its_image_is(parts: Path) -> None:
    save(parts / "test" / "scratch" / "2.png", (24, 16))
    save_mask(parts / "ground_truth" / "scratch" / "2_mask.png", (24, 16), white=1)
    image_and_mask = opened(parts, image_size=16)
    # Columns 4 to 19 remain of 24, of which those from 12 on are white.
    assert image_and_mask.mask(1)[0, 5].tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("white", [1, 255])
def test_a_mask_may_have_any_colour_mode_and_any_value_above_0(parts: Path, mode: str, white: int) -> None:
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:, 8:] = white
    if mode == "RGB":
        mask = Image.fromarray(np.stack([0 * pixels, 0 * pixels, pixels], -1))
    elif mode == "RGBA":
        mask = Image.fromarray(np.stack([pixels, 0 * pixels, 0 * pixels, 0 * pixels + 255], -1))
    elif mode == "P":
        mask = Image.fromarray(pixels, mode="P")
        mask.putpalette([0, 0, 0] + [128, 0, 0] * 255)
    elif mode == "1":
        mask = Image.fromarray(pixels > 0)
    else:
        mask = Image.fromarray(pixels.astype({"L": np.uint8, "I;16": np.uint16}[mode]))
    assert mask.mode == mode
    mask.save(parts / "ground_truth" / "scratch" / "2_mask.png")
    assert torch.equal(opened(parts).mask(1)[0], torch.arange(8).expand(8, 8) >= 4)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_scratch_thinner_than_a_pixel_of_the_small_mask_is_not_lost(parts: Path, width: int) -> None:
    pixels = np.zeros((256, 256), dtype=np.uint8)
    pixels[:, 130 : 130 + width] = 255
    Image.fromarray(pixels).save(parts / "ground_truth" / "scratch" / "2_mask.png")
    save(parts / "test" / "scratch" / "2.png", (256, 256))
    found = opened(parts, image_size=16).mask(1)[0]
    assert torch.equal(found, torch.arange(16).expand(16, 16) == 8)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_colour_mode_and_size_fit(parts: Path, mode: str, channels: int) -> None:
    Image.new(mode, (20, 33)).save(parts / "test" / "good" / "0.png")
    assert opened(parts, channels=channels).read(0)["image"].shape == (channels, 8, 8)


def test_a_defect_without_masks_is_said_to_have_image_scores_only(
    parts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(parts / "test" / "stain" / "0.png")
    with caplog.at_level("INFO"):
        images = opened(parts)
    assert "no masks of stain: image scores only" in caplog.text
    assert images.masked.tolist() == [True, True, True, False]


def test_no_good_images_are_refused(parts: Path, tmp_path: Path) -> None:
    for path in (parts / "train" / "good").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no good images: .*holds none"):
        MVTec(str(parts), 8).load("train")
    (parts / "train" / "good").rmdir()
    with pytest.raises(FileNotFoundError, match=r"no good images: .*is missing"):
        MVTec(str(parts), 8).load("train")
    with pytest.raises(FileNotFoundError, match=r"set --data.source.root"):
        MVTec(str(tmp_path / "nowhere"), 8).load("train")


def test_a_mask_of_another_size_than_its_image_is_refused(parts: Path) -> None:
    save_mask(parts / "ground_truth" / "scratch" / "2_mask.png", (8, 16))
    with pytest.raises(ValueError, match=r"2_mask.png is 8 x 16, but its image .* is 16 x 16 pixels"):
        opened(parts)


def test_a_mask_that_is_no_image_is_refused_before_anything_is_computed(parts: Path) -> None:
    (parts / "ground_truth" / "scratch" / "2_mask.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2_mask.png is not readable as an image .*; replace it"):
        opened(parts)


def test_an_image_whose_mask_is_missing_is_refused(parts: Path) -> None:
    (parts / "ground_truth" / "scratch" / "10_mask.png").unlink()
    with pytest.raises(ValueError, match=r"10.png has no mask .*10_mask.png; add it"):
        opened(parts)


def test_test_images_beside_the_folders_are_refused(parts: Path) -> None:
    save(parts / "test" / "stray.png")
    with pytest.raises(ValueError, match=r"stray.png lie in no folder"):
        opened(parts)


def test_the_fingerprint_follows_the_masks(parts: Path) -> None:
    before = opened(parts).fingerprint()
    assert before == opened(parts).fingerprint()
    save_mask(parts / "ground_truth" / "scratch" / "2_mask.png", white=7)
    assert before != opened(parts).fingerprint()


def defective(classes: list[int] | None = None, judged: Literal["test", "validation"] = "test") -> DefectDigitsTest:
    images = DefectDigits(classes, judged).load("test")
    assert isinstance(images, DefectDigitsTest)
    return images


def test_defects_of_digits_lie_where_their_masks_are() -> None:
    train, test = DefectDigits().load("train"), defective()
    assert train is not None
    seen = {image.numpy().tobytes() for image in train.batch(range(len(train)))["image"]}
    unseen = torch.stack([image for image in source_digits() if image.numpy().tobytes() not in seen]).int()
    assert [test.defects.count(defect) for defect in ("good", "scratch", "spot", "gap")] == [90] * 4
    for index in range(0, len(test), 30):
        image, mask = test.images[index].int(), test.mask(index)
        different = (unseen - image).abs() >= STRONG
        # One of the digits that training does not see agrees outside of the mask and differs everywhere inside.
        assert (different == mask).flatten(1).all(1).any()
        assert bool(mask.any()) == (test.defects[index] != "good")


@pytest.mark.parametrize("classes", [None, [0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_images_that_settings_are_chosen_by_are_neither_trained_on_nor_in_the_test(classes: list[int] | None) -> None:
    train = DefectDigits(classes).load("train")
    assert train is not None
    test, validation = defective(classes), defective(classes, "validation")
    assert (test.name, validation.name) == ("digits with defects (test)", "digits with defects (validation)")
    assert test.fingerprint() != validation.fingerprint()
    sets = [list(train.batch(range(len(train)))["image"]), *(untouched(images) for images in (test, validation))]
    used = [image.numpy().tobytes() for images in sets for image in images]
    # Good images and those of other classes are as they were; no two digits are equal.
    assert len(set(used)) == len(used) > 1200
    flawed = [images.images[images.defects.index("spot")] for images in (test, validation)]
    assert not torch.equal(*flawed)
    with pytest.raises(ValueError, match="judged='train' is neither 'test' nor 'validation'"):
        DefectDigits(judged="train")  # type: ignore[arg-type]


def untouched(images: DefectDigitsTest) -> list[torch.Tensor]:
    return [images.images[i] for i, d in enumerate(images.defects) if d in ("good", "wrong_class")]


def source_digits() -> torch.Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(np.rint(load_digits().images * (255 / 16)).astype(np.uint8))[:, None]


def test_digits_of_other_classes_are_a_defect_without_a_mask() -> None:
    test = defective([3])
    wrong = [defect == "wrong_class" for defect in test.defects]
    # Of 183 threes 37 are in the test, and a quarter of these have one defect.
    assert sum(wrong) == 9
    assert test.masked.tolist() == [not is_wrong for is_wrong in wrong]
    with pytest.raises(ValueError, match=r"must be some of 0 .. 9"):
        DefectDigits([11])
