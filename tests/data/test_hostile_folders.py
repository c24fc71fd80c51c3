"""Folders as people have them: links, odd names, one image or very many, and things that are no images."""

import os
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion_lit import cli
from diffusion_lit.data import CorruptImage, CorruptImageWarning, Folder, ImageData
from diffusion_lit.images import from_uint8
from tests import tiny
from tests.data.test_folder import greys, paint
from tests.test_cli import CPU, QUIET, fit_args

SMALL = ["--evaluation.every_n_steps", "null", "--sample_grid.every_n_steps", "null", "--model.network.width"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_links_to_images_and_folders_elsewhere_are_followed(tmp_path: Path, in_memory: bool) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    paint(root / "a.png", 10)
    paint(outside / "deep" / "c.png", 30)
    paint(outside / "b.png", 20)
    (root / "b.png").symlink_to(outside / "b.png")
    (root / "c").symlink_to(outside / "deep")
    assert greys(ImageData(Folder(str(root), 8, in_memory=in_memory))) == [10, 20, 30]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, in_memory: bool) -> None:
    paint(tmp_path / "a.png", 10)
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(CorruptImage, match=r"b\.png: .*No such file"):
        greys(ImageData(Folder(str(tmp_path), 8, in_memory=in_memory)))
    if in_memory:
        with pytest.warns(CorruptImageWarning, match=r"b\.png"):
            assert greys(ImageData(Folder(str(tmp_path), 8, in_memory=True), on_corrupt="skip")) == [10]


def test_pipes_and_folders_with_names_of_images_are_no_images(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 10)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    assert greys(ImageData(Folder(str(tmp_path), 8))) == [10]


@pytest.mark.parametrize("in_memory", [True, False])
def test_names_that_are_not_utf_8_are_read(tmp_path: Path, in_memory: bool) -> None:
    for name, grey in ((b"\xff\xfe", 10), (b"caf\xe9", 20)):
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)
        Image.new("L", (8, 8), grey).save(os.fsdecode(folder + b"/\xe4.png"))
    data = ImageData(Folder(str(tmp_path), 8, in_memory=in_memory))
    assert sorted(greys(data)) == [10, 20]
    labels = data.dataset("train").batch([0, 1])["label"]
    assert labels.tolist() == [0, 1]
    assert len(data.fingerprint()) == 64


def test_a_damaged_image_whose_name_is_not_utf_8_can_be_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "images")
    os.mkdir(root)
    (Path(root) / os.fsdecode(b"\xfc.png")).write_bytes(b"nothing")
    paint(Path(root) / "a.png", 1)
    overrides = ["--data.source", "Folder", "--data.source.root", root, "--data.source.channels", "1"]
    args = fit_args(tmp_path / "run", *QUIET, *SMALL, "16", *overrides, "--data.source.image_size", "8")
    with pytest.raises(SystemExit):
        cli.main([*args, *CPU])
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("diffusion_lit: error: ")
    assert ".png: not an image of a known format" in line


def test_a_folder_whose_name_is_not_utf_8_is_refused_and_trains_through_a_link(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn")
    for i in range(3):
        paint(Path(root) / f"{i}.png", 20 * i)
    overrides = ["--data.source", "Folder", "--data.source.channels", "1"]
    args = fit_args(tmp_path / "run", *QUIET, *SMALL, "16", *overrides, "--data.source.image_size", "8")
    with pytest.raises(SystemExit):
        cli.main([*args, *CPU, "--data.source.root", root])
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.endswith(r"gr\udcfcn is not UTF-8, as configurations are; rename it, or give a link to it")
    (tmp_path / "link").symlink_to(root)
    cli.main([*args, *CPU, "--data.source.root", str(tmp_path / "link")])
    assert tiny.load(tiny.last(tmp_path / "run"))["global_step"] == 2


def test_a_single_image_trains(tmp_path: Path) -> None:
    paint(tmp_path / "images" / "a.png", 70)
    data = ImageData(Folder(str(tmp_path / "images"), 8, channels=1), batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    torch.testing.assert_close(from_uint8(batch["image"]), torch.full((4, 1, 8, 8), 70 / 127.5 - 1))
    tiny.trainer(tmp_path / "run", 2, logger=False).fit(tiny.module(), data)


def test_modes_and_sizes_may_be_mixed_in_one_folder(tmp_path: Path) -> None:
    modes = {
        "L": 80,
        "RGB": (80, 80, 80),
        "RGBA": (80, 80, 80, 255),
        "I;16": 80 * 257,
        "P": 80,
        "1": 0,
        "LA": (80, 255),
    }
    for i, (mode, colour) in enumerate(modes.items()):
        image = Image.new(mode, (8 + i, 20 - i), colour)  # type: ignore[arg-type]
        if mode == "P":
            image.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
        image.save(tmp_path / f"{i}.png")
    Image.new("CMYK", (9, 31), (0, 0, 0, 175)).save(tmp_path / "7.jpg", quality=100)
    images = ImageData(Folder(str(tmp_path), 8)).dataset("train").batch(range(8))["image"]
    assert images.shape == (8, 3, 8, 8)
    expected = torch.tensor([80, 80, 80, 80, 80, 0, 80, 80], dtype=torch.uint8).view(8, 1, 1, 1).expand_as(images)
    assert (images.int() - expected.int()).abs().max() <= 1


@pytest.mark.slow
def test_a_hundred_thousand_files_in_one_folder_are_listed_and_read(tmp_path: Path) -> None:
    paint(tmp_path / "kept" / "image.png", 33)
    content = (tmp_path / "kept" / "image.png").read_bytes()
    (tmp_path / "many").mkdir()
    for i in range(100_000):
        (tmp_path / "many" / f"{i:06}.png").write_bytes(content)
    start = time.monotonic()
    data = ImageData(Folder(str(tmp_path / "many"), 8, channels=1, in_memory=False), batch_size=128)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    print(f"100,000 files listed and a batch read in {time.monotonic() - start:.1f} s")
    assert len(data.dataset("train")) == 100_000
    assert batch["image"].eq(33).all()
