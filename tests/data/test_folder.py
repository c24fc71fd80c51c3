import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lit.data.base import CorruptImage, CorruptImageWarning, InMemoryImages
from diffusion_lit.data.folder import Folder, FolderImages
from tests.data.adm import adm_center_crop

Write = Callable[..., Path]


def paint(path: Path, grey: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), grey).save(path)


def greys(data: Folder) -> list[int]:
    images = data.dataset("train")
    return [int(images.read(i)[0][0, 0, 0]) for i in range(len(images))]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_flat_folder_has_images_in_order_and_no_labels(tmp_path: Path, in_memory: bool) -> None:
    for name, grey in (("b.png", 20), ("a.png", 10), ("C.PNG", 5), ("notes.txt", 0), (".hidden.png", 99)):
        paint(tmp_path / name, grey) if name.lower().endswith("png") else (tmp_path / name).write_text("x")
    data = Folder(str(tmp_path), 8, in_memory=in_memory)
    assert greys(data) == [5, 10, 20]
    assert "label" not in next(iter(data.train_dataloader()))


@pytest.mark.parametrize("in_memory", [True, False])
def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path: Path, in_memory: bool) -> None:
    for path, grey in (("dog/1.png", 1), ("cat/deep/2.png", 2), ("cat/3.png", 3), ("eel/4.png", 4)):
        paint(tmp_path / path, grey)
    images = Folder(str(tmp_path), 8, in_memory=in_memory).dataset("train")
    by_grey = {int(image[0, 0, 0]): label for image, label in (images.read(i) for i in range(4))}
    assert by_grey == {1: 1, 2: 0, 3: 0, 4: 2}
    batch = images.batch([0, 1, 2, 3])
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [images.read(i)[1] for i in range(4)]


@pytest.mark.parametrize("paths", [("1.png", "cat/2.png", "dog/3.png"), ("only/1.png", "only/2.png", "only/3.png")])
def test_mixed_folders_and_a_single_sub_folder_give_no_labels(tmp_path: Path, paths: tuple[str, ...]) -> None:
    for path in paths:
        paint(tmp_path / path, 7)
    images = Folder(str(tmp_path), 8).dataset("train")
    assert len(images) == 3
    assert images.read(0)[1] is None


def test_a_link_to_its_own_parent_is_walked_once(tmp_path: Path) -> None:
    paint(tmp_path / "a" / "1.png", 1)
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert len(Folder(str(tmp_path), 8).dataset("train")) == 1


def test_validation_folders_number_their_classes_as_training_does(tmp_path: Path) -> None:
    for name in ("train/ant/1.png", "train/bee/2.png", "train/cow/3.png", "val/bee/4.png", "val/cow/5.png"):
        paint(tmp_path / name, 9)
    data = Folder(str(tmp_path / "train"), 8, val_root=str(tmp_path / "val"))
    assert [data.dataset("val").read(i)[1] for i in range(2)] == [1, 2]
    paint(tmp_path / "val" / "fox" / "6.png", 9)
    with pytest.raises(ValueError, match="fox, which is not one of the 3 classes"):
        Folder(str(tmp_path / "train"), 8, val_root=str(tmp_path / "val")).dataset("val")


def test_without_a_validation_folder_there_is_no_validation(photo_folder: Write) -> None:
    data = Folder(str(photo_folder()), 16)
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"Folder has no val images; set --data\.init_args\.val_root"):
        data.setup("validate")


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_photographs_are_decoded_alike_in_memory_and_lazily(
    photo_folder: Write, in_memory: bool, channels: int
) -> None:
    root = photo_folder(9)
    data = Folder(str(root), 32, channels, in_memory=in_memory)
    images = data.dataset("train")
    assert isinstance(images, InMemoryImages) == in_memory
    assert data.image_shape == images.read(0)[0].shape == (channels, 32, 32)
    for i in range(9):
        original = Image.open(root / f"{i:03}.jpg").convert("L" if channels == 1 else "RGB")
        expected = adm_center_crop(original, 32).reshape(32, 32, channels)
        np.testing.assert_array_equal(images.read(i)[0].permute(1, 2, 0).numpy(), expected)


def test_sets_beyond_two_gibibytes_are_read_lazily(photo_folder: Write) -> None:
    root = str(photo_folder(2))
    assert isinstance(Folder(root, 64).dataset("train"), InMemoryImages)
    # Two images of 3 x 20000 x 20000 bytes are 2.2 GiB.
    assert isinstance(Folder(root, 20_000).dataset("train"), FolderImages)


def test_workers_yield_what_one_process_yields(photo_folder: Write) -> None:
    root = str(photo_folder())
    alone = iter(Folder(root, 16, in_memory=False, batch_size=8).train_dataloader())
    helped = iter(Folder(root, 16, in_memory=False, batch_size=8, num_workers=2).train_dataloader())
    for _ in range(4):
        expected, batch = next(alone), next(helped)
        assert torch.equal(batch["image"], expected["image"])
        assert torch.equal(batch["flip"], expected["flip"])


def test_missing_and_empty_folders_are_named_with_the_option_to_set(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none is not a folder; set --data\.init_args\.root"):
        Folder(str(tmp_path / "none"), 8).setup("fit")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no images in .*\.png .*--data\.init_args\.root"):
        Folder(str(tmp_path), 8).setup("fit")


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_corrupt_image_stops_and_is_named(photo_folder: Write, in_memory: bool) -> None:
    data = Folder(str(photo_folder(broken=(3,))), 16, in_memory=in_memory, batch_size=6)
    with pytest.raises(CorruptImage, match=r"003\.jpg: .*truncated"):
        next(iter(data.train_dataloader()))


def test_a_corrupt_image_is_left_out_of_a_set_in_memory(photo_folder: Write) -> None:
    data = Folder(str(photo_folder(broken=(1, 3))), 16, on_corrupt="skip")
    with pytest.warns(CorruptImageWarning) as warned:
        data.setup("fit")
    assert [str(warning.message).split("/")[-1][:7] for warning in warned] == ["001.jpg", "003.jpg"]
    assert data.num_images() == len(data.dataset("train")) == 4
    whole = Folder(str(photo_folder(name="whole")), 16).dataset("train")
    for kept, original in enumerate((0, 2, 4, 5)):
        assert torch.equal(data.dataset("train").read(kept)[0], whole.read(original)[0])


@pytest.mark.filterwarnings("ignore::diffusion_lit.data.base.CorruptImageWarning")
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_without_a_readable_image_is_an_error(photo_folder: Write, in_memory: bool) -> None:
    root = photo_folder(3, broken=(0, 1, 2))
    data = Folder(str(root), 16, in_memory=in_memory, on_corrupt="skip")
    with pytest.raises(CorruptImage, match="none of the 3 images"):
        next(iter(data.train_dataloader()))


def test_fingerprints_differ_where_images_do_and_only_there(photo_folder: Write, tmp_path: Path) -> None:
    root = photo_folder()
    for in_memory in (True, False):

        def fingerprint(folder: Path = root, image_size: int = 16, in_memory: bool = in_memory) -> str:
            return Folder(str(folder), image_size, in_memory=in_memory).fingerprint()

        first = fingerprint()
        assert fingerprint() == first
        assert fingerprint(image_size=32) != first
        moved = tmp_path / f"moved-{in_memory}"
        shutil.copytree(root, moved)
        assert fingerprint(moved) == first
        shutil.copyfile(moved / "001.jpg", moved / "002.jpg")
        os.utime(moved / "002.jpg", (1, 1))
        assert fingerprint(moved) != first


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size=0 is below 1"):
        Folder(str(tmp_path), 0)
    with pytest.raises(ValueError, match="channels=2 is neither 1"):
        Folder(str(tmp_path), 8, channels=2)
    with pytest.raises(ValueError, match="on_corrupt='ignore' is neither"):
        Folder(str(tmp_path), 8, on_corrupt="ignore")  # type: ignore[arg-type]
