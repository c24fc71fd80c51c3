import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lit.data import CorruptImage, CorruptImageWarning, ImageData, InMemoryImages
from diffusion_lit.data.decode import EXTENSIONS, SmallImageWarning
from diffusion_lit.data.folder import Folder, FolderImages, find
from tests.data.adm import adm_center_crop

Write = Callable[..., Path]


def paint(path: Path, grey: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), grey).save(path)


def greys(data: ImageData) -> list[int]:
    images = data.dataset("train")
    return [int(images.read(i)["image"][0, 0, 0]) for i in range(len(images))]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_flat_folder_has_images_in_order_and_no_labels(tmp_path: Path, in_memory: bool) -> None:
    for name, grey in (("b.png", 20), ("a.png", 10), ("C.PNG", 5), ("notes.txt", 0), (".hidden.png", 99)):
        paint(tmp_path / name, grey) if name.lower().endswith("png") else (tmp_path / name).write_text("x")
    data = ImageData(Folder(str(tmp_path), 8, in_memory=in_memory))
    assert greys(data) == [5, 10, 20]
    assert "label" not in next(iter(data.train_dataloader()))


@pytest.mark.parametrize("in_memory", [True, False])
def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path: Path, in_memory: bool) -> None:
    for path, grey in (("dog/1.png", 1), ("cat/deep/2.png", 2), ("cat/3.png", 3), ("eel/4.png", 4)):
        paint(tmp_path / path, grey)
    images = ImageData(Folder(str(tmp_path), 8, in_memory=in_memory)).dataset("train")
    by_grey = {int(example["image"][0, 0, 0]): example["label"] for example in (images.read(i) for i in range(4))}
    assert by_grey == {1: 1, 2: 0, 3: 0, 4: 2}
    batch = images.batch([0, 1, 2, 3])
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [images.read(i)["label"] for i in range(4)]


@pytest.mark.parametrize("paths", [("1.png", "cat/2.png", "3.png"), ("only/1.png", "only/2.png", "only/3.png")])
def test_a_single_sub_folder_is_no_class(tmp_path: Path, paths: tuple[str, ...]) -> None:
    for path in paths:
        paint(tmp_path / path, 7)
    images = ImageData(Folder(str(tmp_path), 8)).dataset("train")
    assert len(images) == 3
    assert "label" not in images.read(0)


def test_a_share_of_a_folder_is_held_out_by_name_and_by_nothing_else(tmp_path: Path) -> None:
    for i in range(40):
        paint(tmp_path / "ab"[i % 2] / f"{i:02d}.png", i)

    def split(**kwargs: float) -> tuple[set[int], set[int]]:
        source = Folder(str(tmp_path), 8, val_fraction=0.2, **kwargs)  # type: ignore[arg-type]
        train, val = source.load("train"), source.load("val")
        assert train is not None
        assert val is not None
        assert train.class_names == val.class_names == ["a", "b"]
        assert len(source.load("test") or ()) == len(val)
        first, second = ({int(s.read(i)["image"][0, 0, 0]) for i in range(len(s))} for s in (train, val))
        return first, second

    train, val = split()
    assert (len(train), len(val)) == (32, 8)
    assert train | val == set(range(40))
    for path in sorted(tmp_path.rglob("*.png")):
        os.utime(path, (0, 0))
    paint(tmp_path / "a" / "more.png", 50)
    paint(tmp_path / "b" / "other.png", 51)
    more_train, more_val = split()
    assert (more_train | more_val) - (train | val) == {50, 51}
    assert len(val - more_val) <= 2


def test_a_share_that_cannot_be_held_out_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "1.png", 1)
    paint(tmp_path / "2.png", 2)
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"val_fraction=.* must lie in \[0, 1\)"):
            Folder(str(tmp_path), 8, val_fraction=fraction)
    with pytest.raises(ValueError, match="exclude each other"):
        Folder(str(tmp_path), 8, val_root=str(tmp_path), val_fraction=0.5)
    with pytest.raises(ValueError, match=r"has 2 images, of which val_fraction=0\.1 leaves 0 for validation"):
        Folder(str(tmp_path), 8, val_fraction=0.1).load("val")


@pytest.mark.parametrize("stray", ["preview.png", "zebra.JPG"])
def test_an_image_beside_class_folders_is_refused_with_its_name(tmp_path: Path, stray: str) -> None:
    for path in ("cat/1.png", "dog/2.png", "eel/3.png"):
        paint(tmp_path / path, 7)
    Image.new("L", (8, 8)).save(tmp_path / stray)
    with pytest.raises(
        ValueError, match=rf"3 folders of images.* 1 images .*{stray}; move .*--data\.source\.labels false"
    ):
        Folder(str(tmp_path), 8).load("train")
    images = Folder(str(tmp_path), 8, labels=False).load("train")
    assert images is not None
    assert len(images) == 4
    assert images.class_names is None
    assert "label" not in images.read(0)
    (tmp_path / stray).unlink()
    assert ImageData(Folder(str(tmp_path), 8)).class_names == ["cat", "dog", "eel"]
    assert ImageData(Folder(str(tmp_path), 8, labels=False)).class_names is None


def test_labels_can_be_demanded(tmp_path: Path) -> None:
    paint(tmp_path / "only" / "1.png", 7)
    data = ImageData(Folder(str(tmp_path), 8, labels=True))
    assert data.class_names == ["only"]
    assert data.dataset("train").read(0)["label"] == 0
    paint(tmp_path / "2.png", 7)
    with pytest.raises(ValueError, match=r"1 images beside them: 2\.png"):
        Folder(str(tmp_path), 8, labels=True).load("train")


def test_a_stray_image_in_the_validation_folder_is_refused(tmp_path: Path) -> None:
    for path in ("train/cat/1.png", "train/dog/2.png", "val/cat/1.png", "val/preview.png"):
        paint(tmp_path / path, 7)
    with pytest.raises(ValueError, match=r"val contains preview\.png, which is not one of the 2 classes"):
        Folder(str(tmp_path / "train"), 8, val_root=str(tmp_path / "val")).load("val")


def test_class_names_are_those_of_the_training_folder_in_every_split(tmp_path: Path) -> None:
    for path in ("train/ant/1.png", "train/bee/2.png", "train/cow/3.png", "val/cow/4.png"):
        paint(tmp_path / path, 9)
    for in_memory in (True, False):
        data = ImageData(Folder(str(tmp_path / "train"), 8, val_root=str(tmp_path / "val"), in_memory=in_memory))
        assert data.dataset("val").class_names == data.class_names == ["ant", "bee", "cow"]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_extension_is_found_in_either_case(tmp_path: Path, extension: str) -> None:
    (tmp_path / f"a{extension}").touch()
    (tmp_path / f"b{extension.upper()}").touch()
    assert find(tmp_path).images == [f"a{extension}", f"b{extension.upper()}"]


def test_files_that_are_not_images_are_counted_with_examples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paint(tmp_path / "a.png", 1)
    for name in ("b.txt", "c.txt", "d.heic", "e.txt", ".hidden"):
        (tmp_path / name).touch()
    with caplog.at_level("INFO"):
        Folder(str(tmp_path), 8).load("train")
    (line,) = (record.getMessage() for record in caplog.records if "ignored" in record.getMessage())
    assert "ignored 4 files" in line
    assert "b.txt" in line
    assert "d.heic" in line
    assert ".hidden" not in line


@pytest.mark.parametrize("in_memory", [True, False])
def test_enlarged_images_are_counted_in_one_warning(tmp_path: Path, in_memory: bool) -> None:
    for i, size in enumerate((8, 16, 5, 40, 15)):
        paint(tmp_path / f"{i}.png", 9, size)
    with pytest.warns(SmallImageWarning, match=r"3 of 5 images are smaller than image_size=16 .* 5 x 5") as warned:
        ImageData(Folder(str(tmp_path), 16, in_memory=in_memory)).setup("fit")
    assert len(warned) == 1
    ImageData(Folder(str(tmp_path), 5, in_memory=in_memory)).setup("fit")


def test_a_link_to_its_own_parent_is_walked_once(tmp_path: Path) -> None:
    paint(tmp_path / "a" / "1.png", 1)
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert len(ImageData(Folder(str(tmp_path), 8)).dataset("train")) == 1


def test_validation_folders_number_their_classes_as_training_does(tmp_path: Path) -> None:
    for name in ("train/ant/1.png", "train/bee/2.png", "train/cow/3.png", "val/bee/4.png", "val/cow/5.png"):
        paint(tmp_path / name, 9)
    data = ImageData(Folder(str(tmp_path / "train"), 8, val_root=str(tmp_path / "val")))
    assert [data.dataset("val").read(i)["label"] for i in range(2)] == [1, 2]
    paint(tmp_path / "val" / "fox" / "6.png", 9)
    with pytest.raises(ValueError, match="fox, which is not one of the 3 classes"):
        ImageData(Folder(str(tmp_path / "train"), 8, val_root=str(tmp_path / "val"))).dataset("val")


def test_without_a_validation_folder_there_is_no_validation(photo_folder: Write) -> None:
    data = ImageData(Folder(str(photo_folder()), 16))
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"Folder has no val images; set --data\.source\.val_root"):
        data.setup("validate")


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_photographs_are_decoded_alike_in_memory_and_lazily(
    photo_folder: Write, in_memory: bool, channels: int
) -> None:
    root = photo_folder(9)
    data = ImageData(Folder(str(root), 32, channels, in_memory=in_memory))
    images = data.dataset("train")
    assert isinstance(images, InMemoryImages) == in_memory
    assert data.image_shape == images.read(0)["image"].shape == (channels, 32, 32)
    for i in range(9):
        original = Image.open(root / f"{i:03}.jpg").convert("L" if channels == 1 else "RGB")
        expected = adm_center_crop(original, 32).reshape(32, 32, channels)
        np.testing.assert_array_equal(images.read(i)["image"].permute(1, 2, 0).numpy(), expected)


def test_sets_beyond_two_gibibytes_are_read_lazily(photo_folder: Write) -> None:
    root = str(photo_folder(2))
    assert isinstance(ImageData(Folder(root, 64)).dataset("train"), InMemoryImages)
    # Two images of 3 x 20000 x 20000 bytes are 2.2 GiB.
    with pytest.warns(SmallImageWarning):
        assert isinstance(ImageData(Folder(root, 20_000)).dataset("train"), FolderImages)


def test_workers_yield_what_one_process_yields(photo_folder: Write) -> None:
    root = str(photo_folder())
    alone = iter(ImageData(Folder(root, 16, in_memory=False), batch_size=8).train_dataloader())
    helped = iter(ImageData(Folder(root, 16, in_memory=False), batch_size=8, num_workers=2).train_dataloader())
    for _ in range(4):
        expected, batch = next(alone), next(helped)
        assert torch.equal(batch["image"], expected["image"])
        assert torch.equal(batch["flip"], expected["flip"])


def test_missing_and_empty_folders_are_named_with_the_option_to_set(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none is not a folder; set --data\.source\.root"):
        ImageData(Folder(str(tmp_path / "none"), 8)).setup("fit")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no images in .*\.png .*--data\.source\.root"):
        ImageData(Folder(str(tmp_path), 8)).setup("fit")


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_corrupt_image_stops_and_is_named(photo_folder: Write, in_memory: bool) -> None:
    data = ImageData(Folder(str(photo_folder(broken=(3,))), 16, in_memory=in_memory), batch_size=6)
    with pytest.raises(CorruptImage, match=r"003\.jpg: .*truncated"):
        next(iter(data.train_dataloader()))


def test_a_corrupt_image_is_left_out_of_a_set_in_memory(photo_folder: Write) -> None:
    data = ImageData(Folder(str(photo_folder(broken=(1, 3))), 16), on_corrupt="skip")
    with pytest.warns(CorruptImageWarning) as warned:
        data.setup("fit")
    assert [str(warning.message).split("/")[-1][:7] for warning in warned] == ["001.jpg", "003.jpg"]
    assert data.num_images() == len(data.dataset("train")) == 4
    whole = ImageData(Folder(str(photo_folder(name="whole")), 16)).dataset("train")
    for kept, original in enumerate((0, 2, 4, 5)):
        assert torch.equal(data.dataset("train").read(kept)["image"], whole.read(original)["image"])


@pytest.mark.filterwarnings("ignore::diffusion_lit.data.dataset.CorruptImageWarning")
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_without_a_readable_image_is_an_error(photo_folder: Write, in_memory: bool) -> None:
    root = photo_folder(3, broken=(0, 1, 2))
    data = ImageData(Folder(str(root), 16, in_memory=in_memory), on_corrupt="skip")
    with pytest.raises(CorruptImage, match="none of the 3 images"):
        next(iter(data.train_dataloader()))


def test_fingerprints_differ_where_images_do_and_only_there(photo_folder: Write, tmp_path: Path) -> None:
    root = photo_folder()
    for in_memory in (True, False):

        def fingerprint(folder: Path = root, image_size: int = 16, in_memory: bool = in_memory) -> str:
            return ImageData(Folder(str(folder), image_size, in_memory=in_memory)).fingerprint()

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
        ImageData(Folder(str(tmp_path), 0))
    with pytest.raises(ValueError, match="channels=2 is neither 1"):
        ImageData(Folder(str(tmp_path), 8, channels=2))
    with pytest.raises(ValueError, match="on_corrupt='ignore' is neither"):
        ImageData(Folder(str(tmp_path), 8), on_corrupt="ignore")  # type: ignore[arg-type]
