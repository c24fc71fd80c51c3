import pytest
import torch
from sklearn.datasets import load_digits

from diffusion_lit.data import ImageData, InMemoryImages
from diffusion_lit.data.digits import Digits


def test_the_seventeen_levels_are_spread_over_eight_bits() -> None:
    digits = ImageData(Digits()).dataset("train")
    assert isinstance(digits, InMemoryImages)
    assert digits.images.shape == (1797, 1, 8, 8)
    source = torch.from_numpy(load_digits().images)
    assert (digits.images[:, 0].double() / 255 * 16 - source).abs().max() <= 0.5 / 255 * 16 + 1e-9
    assert len(set(digits.images.flatten().tolist())) == 17
    assert (int(digits.images.min()), int(digits.images.max())) == (0, 255)


def test_labels_are_the_digits_shown() -> None:
    digits = ImageData(Digits()).dataset("train")
    example = digits.read(0)
    image = example["image"]
    assert example["label"] == 0
    # The first scan is a nought: dark in the middle, bright around.
    assert int(image[0, 3:5, 3:5].max()) < 100 < int(image[0, 2:6, 2].min())


def test_classes_are_named_by_their_digits() -> None:
    assert ImageData(Digits()).class_names == list("0123456789")


def test_every_part_is_the_whole_set() -> None:
    data = ImageData(Digits())
    assert {len(data.dataset(split)) for split in ("train", "val", "test")} == {1797}


def test_the_shape_is_known_before_the_data_and_right() -> None:
    data = ImageData(Digits())
    shape = data.image_shape
    assert data.dataset("train").read(5)["image"].shape == shape


def test_digits_are_not_mirrored_unless_asked() -> None:
    assert not next(iter(ImageData(Digits(), batch_size=256).train_dataloader()))["flip"].any()
    assert next(iter(ImageData(Digits(), batch_size=256, flip=True).train_dataloader()))["flip"].any()


def test_a_batch_larger_than_the_set_is_filled_from_the_next_epoch() -> None:
    batch = next(iter(ImageData(Digits(), batch_size=2 * 1797).train_dataloader()))
    expected = 2 * torch.from_numpy(load_digits().target).bincount()
    assert torch.equal(batch["label"].bincount(), expected)


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "num_workers", "seed"])
def test_a_setting_below_its_bound_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=-1 is below .*--data\.{name}"):
        ImageData(Digits(), **{name: -1})  # type: ignore[arg-type]
