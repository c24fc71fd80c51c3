import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_lit import cli
from diffusion_lit.data import (
    LSUN,
    CaptionedDigits,
    CorruptImage,
    CorruptImageWarning,
    Digits,
    Folder,
    ImageData,
    Prepared,
    TextFiles,
)
from diffusion_lit.files import whole_file
from diffusion_lit.tools.prepare import parse, prepare
from tests import tiny
from tests.data.test_lsun import write
from tests.data.test_module import Descriptions
from tests.test_cli import CONFIGS, fit_args

Write = Callable[..., Path]
RECIPE = "{{class_path: ImageData, init_args: {{source: {{{}}}}}}}"


def prepared(data: ImageData, path: Path) -> ImageData:
    prepare(data, path)
    channels, image_size, _ = data.image_shape
    source = Prepared(str(path), image_size, channels)
    return ImageData(source, data.batch_size, flip=data.flip, seed=data.seed)


def assert_same_images(ours: ImageData, source: ImageData) -> None:
    assert ours.parts() == source.parts()
    for split in source.parts():
        expected = source.dataset(split)
        found = ours.dataset(split)
        assert len(found) == len(expected)
        everything = found.batch(range(len(found)))
        for index in range(len(expected)):
            example = expected.read(index)
            assert torch.equal(found.read(index)["image"], example["image"])
            assert found.read(index).get("label") == example.get("label")
            assert torch.equal(everything["image"][index], example["image"])
            assert "label" not in example or everything["label"][index] == example["label"]


@pytest.fixture
def classes(tmp_path: Path, photo_folder: Write) -> Path:
    """Six photographs in two classes, and two of them for validation, all of the second class."""
    for split, cats, dogs in (("train", 4, 2), ("val", 0, 2)):
        photographs = sorted(photo_folder(cats + dogs, name=f"{split}_photographs").iterdir())
        for i, path in enumerate(photographs):
            target = tmp_path / split / ("cat" if i < cats else "dog") / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return tmp_path


def folder(root: Path, in_memory: bool | None = None, labels: bool | None = None, **options: Any) -> ImageData:
    source = Folder(str(root / "train"), 24, val_root=str(root / "val"), labels=labels, in_memory=in_memory)
    return ImageData(source, **options)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_s_images_labels_and_parts_are_kept(classes: Path, in_memory: bool) -> None:
    source = folder(classes, in_memory=in_memory)
    ours = prepared(source, classes / "all.images")
    assert_same_images(ours, source)
    assert ours.dataset("val").batch([0, 1])["label"].tolist() == [1, 1]


def test_an_lsun_database_s_images_are_kept(tmp_path: Path, encoded: list[bytes]) -> None:
    write(tmp_path / "tower_train_lmdb", encoded)
    write(tmp_path / "tower_val_lmdb", encoded[:3])
    source = ImageData(LSUN(str(tmp_path), "tower", 32))
    ours = prepared(source, tmp_path / "tower.images")
    assert_same_images(ours, source)
    assert "label" not in ours.dataset("train").batch([0])


def test_an_object_of_lsun_has_no_validation_part_afterwards_either(tmp_path: Path, encoded: list[bytes]) -> None:
    write(tmp_path / "cat", encoded[:4])
    ours = prepared(ImageData(LSUN(str(tmp_path), "cat", 16)), tmp_path / "cat.images")
    assert ours.parts() == ["train"]
    assert ours.val_dataloader() == []
    with pytest.raises(ValueError, match=r"no val images: .*cat.images was prepared from data without any"):
        ours.dataset("val")


def test_class_names_are_kept(classes: Path) -> None:
    ours = prepared(folder(classes), classes / "all.images")
    assert ours.class_names == ours.dataset("val").class_names == ["cat", "dog"]
    assert prepared(folder(classes, labels=False), classes / "plain.images").class_names is None


def test_a_file_without_class_names_is_read(classes: Path) -> None:
    path = classes / "all.images"
    prepare(folder(classes), path)
    content = path.read_bytes()
    start = content.index(b'{"format"')
    text = json.loads(content[start:])
    assert text.pop("class_names") == [["cat", "dog"]] * 2
    file = io.BytesIO()
    np.save(file, np.frombuffer(json.dumps(text).encode(), np.uint8))
    path.write_bytes(content[: content.rindex(b"\x93NUMPY")] + file.getvalue())
    ours = ImageData(Prepared(str(path), 24))
    assert ours.class_names is None
    assert ours.dataset("val").batch([0, 1])["label"].tolist() == [1, 1]


def test_captions_are_kept_all_of_them(tmp_path: Path) -> None:
    source = ImageData(CaptionedDigits(), batch_size=16, seed=2)
    ours = prepared(source, tmp_path / "all.images")
    assert_same_images(ours, source)
    for split in source.parts():
        found, expected = ours.dataset(split), source.dataset(split)
        assert found.captions is not None
        assert expected.captions is not None
        assert [found.captions[i] for i in range(len(found))] == [expected.captions[i] for i in range(len(expected))]
        assert found.fingerprint() == expected.fingerprint()
    for here, there in zip(islice(ours.train_dataloader(), 3), islice(source.train_dataloader(), 3), strict=True):
        assert tiny.identical(dict(here), dict(there))
    assert pickle.loads(pickle.dumps(ours.dataset("train"))).texts(3) == source.dataset("train").texts(3)


def test_captions_of_images_that_are_left_out_are_left_out(tmp_path: Path, photo_folder: Write) -> None:
    root = photo_folder(4)
    files = sorted(root.iterdir())
    for number, path in enumerate(files):
        path.with_suffix(".txt").write_text(f"number {number}\nagain {number}\n")
    files[1].write_bytes(b"no picture")
    source = Folder(str(root), 24, labels=False, captions=TextFiles(), in_memory=False)
    with pytest.warns(CorruptImageWarning):
        ours = prepared(ImageData(source, on_corrupt="skip"), tmp_path / "all.images")
    captions = ours.dataset("train").captions
    assert captions is not None
    assert [captions[i] for i in range(3)] == [[f"number {n}", f"again {n}"] for n in (0, 2, 3)]
    assert ours.some([1])["caption"].tolist() == ours.examples([1], "train")["caption"].tolist()


def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="described: `prepare` cannot store caption, low_res, map, mask"):
        prepare(ImageData(Descriptions()), tmp_path / "all.images")
    assert not list(tmp_path.iterdir())


def test_progress_reaches_the_number_of_images(classes: Path) -> None:
    calls: list[tuple[int, int]] = []
    prepare(folder(classes), classes / "all.images", lambda done, total: calls.append((done, total)))
    assert calls[-1] == (8, 8)


def abandoned(path: Path) -> Path:
    """The unfinished file of a process that was killed while it wrote `path`."""
    child = multiprocessing.get_context("spawn").Process(target=write_half, args=(path,))
    child.start()
    child.join()
    (part,) = path.parent.glob(f".{path.name}.*.part")
    assert part.read_bytes() == b"half"
    return part


def write_half(path: Path) -> None:
    with whole_file(path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.further
def test_the_unfinished_file_of_a_killed_run_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    out = tmp_path / "digits.images"
    part = abandoned(out)
    other = tmp_path / ".other.images.1.part"
    other.touch()
    with whole_file(out) as living:
        assert not part.exists()
        cli.main(["prepare", "--data.source", "Digits", "--out", str(out)])
        assert Path(living.name).exists()
        assert other.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "digits.images"]


def test_grey_images_stay_grey(tmp_path: Path) -> None:
    assert_same_images(prepared(ImageData(Digits()), tmp_path / "digits.images"), ImageData(Digits()))


def test_training_batches_are_those_of_the_source(classes: Path) -> None:
    source = folder(classes, batch_size=4, seed=3)
    ours = prepared(source, classes / "all.images")
    loaders = iter(source.train_dataloader()), iter(ours.train_dataloader())
    for _ in range(5):
        expected, found = (next(loader) for loader in loaders)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], expected[key]) for key in ("image", "label", "flip"))


def test_statistics_of_the_same_images_in_memory_serve_it_too(classes: Path) -> None:
    source = folder(classes, in_memory=True)
    ours = prepared(source, classes / "all.images")
    for split in source.parts():
        assert ours.fingerprint(split) == source.fingerprint(split)


def test_parts_that_are_one_are_stored_once(classes: Path) -> None:
    path = classes / "all.images"
    ours = prepared(folder(classes), path)
    assert ours.parts() == ["train", "val", "test"]
    pixels = (6 + 2) * 3 * 24 * 24
    assert pixels < path.stat().st_size < pixels + 2000


def test_numpy_alone_reads_the_training_images(classes: Path) -> None:
    source = folder(classes)
    prepare(source, classes / "all.images")
    images = np.load(classes / "all.images", mmap_mode="r")
    np.testing.assert_array_equal(images, source.dataset("train").batch(range(6))["image"].numpy())


def test_unreadable_images_are_left_out_and_the_count_is_exact(tmp_path: Path, photo_folder: Write) -> None:
    source = ImageData(Folder(str(photo_folder(6, broken=(1, 4))), 24, in_memory=False), on_corrupt="skip")
    with pytest.warns(CorruptImageWarning):
        ours = prepared(source, tmp_path / "some.images")
    assert len(ours.dataset("train")) == ours.num_images() == source.num_images() == 4
    whole = ImageData(Folder(str(photo_folder(6, name="whole")), 24)).dataset("train")
    for kept, index in enumerate([0, 2, 3, 5]):
        assert torch.equal(ours.dataset("train").read(kept)["image"], whole.read(index)["image"])


@pytest.mark.parametrize(("broken", "on_corrupt"), [((1,), "stop"), ((0, 1, 2), "skip")])
@pytest.mark.filterwarnings("ignore::diffusion_lit.data.dataset.CorruptImageWarning")
def test_an_unreadable_image_leaves_no_file_behind(
    tmp_path: Path, photo_folder: Write, broken: tuple[int, ...], on_corrupt: str
) -> None:
    source = ImageData(Folder(str(photo_folder(3, broken)), 24, in_memory=False), on_corrupt=on_corrupt)  # type: ignore[arg-type]
    out = tmp_path / "out"
    with pytest.raises(CorruptImage):
        prepare(source, out / "all.images")
    assert not list(out.iterdir())


def test_workers_read_what_this_process_reads(classes: Path) -> None:
    ours = prepared(folder(classes), classes / "all.images")
    again = pickle.loads(pickle.dumps(ours.dataset("train")))
    assert len(pickle.dumps(ours.dataset("train"))) < 3000
    assert torch.equal(again.batch([5, 0])["image"], ours.dataset("train").batch([5, 0])["image"])
    with_workers = ImageData(Prepared(str(classes / "all.images"), 24), num_workers=1)
    alone = [batch["image"] for batch in ours.stored_batches(0, 1, 4)]
    by_worker = [batch["image"] for batch in with_workers.stored_batches(0, 1, 4)]
    assert len(alone) == 2
    assert all(torch.equal(a, b) for a, b in zip(alone, by_worker, strict=True))


def test_what_a_batch_is_turned_into_is_not_written_to_the_file(classes: Path) -> None:
    images = prepared(folder(classes), classes / "all.images").dataset("train")
    before = (classes / "all.images").read_bytes()
    images.batch([0])["image"].zero_()
    images.read(0)["image"].zero_()
    assert images.read(0)["image"].any()
    assert (classes / "all.images").read_bytes() == before


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_half_a_file_is_refused(classes: Path, kept: int) -> None:
    path = classes / "all.images"
    prepare(folder(classes), path)
    os.truncate(path, kept % path.stat().st_size)
    with pytest.raises(ValueError, match=r"all.images is not a complete file of prepared images.*prepare them"):
        ImageData(Prepared(str(path), 24)).dataset("train")


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "plain.npy", np.zeros((2, 3, 4, 4), np.uint8))
    (tmp_path / "text").write_text("no images")
    for name in ("plain.npy", "text"):
        with pytest.raises(ValueError, match=f"{name} is not a complete file of prepared images"):
            ImageData(Prepared(str(tmp_path / name), 4)).dataset("train")
    with pytest.raises(FileNotFoundError, match=r"nothing is not a file; set --data.source.file"):
        ImageData(Prepared(str(tmp_path / "nothing"), 4)).dataset("train")


def test_another_shape_than_was_prepared_names_the_right_one(tmp_path: Path) -> None:
    prepare(ImageData(Digits()), tmp_path / "digits.images")
    message = r"holds images of \(1, 8, 8\), but \(3, 16, 16\).*image_size to 8 and --data.source.channels to 1"
    with pytest.raises(ValueError, match=message):
        ImageData(Prepared(str(tmp_path / "digits.images"), 16)).dataset("train")


def test_a_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match=r"mine exists already.*--out"):
        prepare(ImageData(Digits()), tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_disk_that_is_too_small_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"would take 115,008 bytes, and 1,000 are free"):
        prepare(ImageData(Digits()), tmp_path / "digits.images")
    assert not list(tmp_path.iterdir())


def test_a_recipe_takes_what_the_command_line_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits.images"
    cli.main(["prepare", "-c", str(CONFIGS / "digits.yaml"), "--out", str(out)])
    use = capsys.readouterr().out.splitlines()[-1].removeprefix("use them by ").split()
    made = cli.CLI.parts(fit_args(tmp_path / "run", *use))
    made.datamodule.setup("fit")
    assert isinstance(made.datamodule.source, Prepared)
    assert made.datamodule.image_shape == made.model.image_shape
    assert made.datamodule.fingerprint() == ImageData(Digits()).fingerprint()


def test_options_win_over_recipes_and_later_recipes_over_earlier(tmp_path: Path) -> None:
    recipes = []
    for i, source in enumerate(("class_path: Folder, init_args: {root: a, image_size: 8}", "init_args: {root: b}")):
        (tmp_path / f"{i}.yaml").write_text(f"trainer: {{max_steps: 3}}\ndata: {RECIPE.format(source)}\n")
        recipes.append(str(tmp_path / f"{i}.yaml"))
    data = parse(recipes, ["--data.source.image_size", "16"]).data
    assert isinstance(data.source, Folder)
    assert (str(data.source.root), data.source.image_size) == ("b", 16)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "there are no data; give a recipe by -c"),
        (["-c", "missing.yaml"], "missing.yaml"),
        (["-c", str(CONFIGS / "digits.yaml"), "--data.colour", "3"], "colour"),
        (["--data.source", "Nowhere"], "Nowhere"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["prepare", "--out", "x", *args])
    assert end.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("diffusion_lit: error: ")
    assert message in line
