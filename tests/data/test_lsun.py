import hashlib
import io
import pickle
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffusion_lit import files
from diffusion_lit.data import CorruptImage, CorruptImageWarning, ImageData, lsun
from diffusion_lit.data.batches import Batches, as_is
from diffusion_lit.data.decode import SmallImageWarning
from diffusion_lit.data.lsun import LSUN, LSUNImages, list_keys
from diffusion_lit.data.stream import Key
from diffusion_lit.files import whole_file
from tests.data.adm import adm_center_crop

FEW_CORES = "ignore:This DataLoader will create"


def write(path: Path, files: list[bytes]) -> list[bytes]:
    """Writes an LMDB as LSUN's are, images under 40 hexadecimal digits, and returns its keys in their order."""
    path.mkdir(parents=True, exist_ok=True)
    keys = [hashlib.sha1(b"%d" % i + data).hexdigest().encode() for i, data in enumerate(files)]
    with lmdb.open(str(path), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for key, data in zip(keys, files, strict=True):
            transaction.put(key, data)
    return sorted(keys)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path, encoded: list[bytes]) -> Path:
    write(tmp_path / "tower_train_lmdb", encoded)
    write(tmp_path / "tower_val_lmdb", encoded[:3])
    write(tmp_path / "cat", encoded[:4])
    return tmp_path


def test_images_are_those_in_the_database_cropped_and_resized(root: Path, encoded: list[bytes]) -> None:
    images = ImageData(LSUN(str(root), "tower", 64)).dataset("train")
    by_key = {hashlib.sha1(b"%d" % i + data).hexdigest(): data for i, data in enumerate(encoded)}
    assert len(images) == len(encoded)
    for index, key in enumerate(sorted(by_key)):
        expected = adm_center_crop(Image.open(io.BytesIO(by_key[key])).convert("RGB"), 64)
        example = images.read(index)
        assert list(example) == ["image"]
        np.testing.assert_array_equal(example["image"].permute(1, 2, 0).numpy(), expected)


def test_scenes_have_a_validation_part_and_objects_have_none(root: Path) -> None:
    scene = ImageData(LSUN(str(root), "tower", 16))
    scene.setup("fit")
    assert len(scene.dataset("val")) == 3
    thing = ImageData(LSUN(str(root), "cat", 16))
    thing.setup("fit")
    assert len(thing.dataset("train")) == 4
    assert thing.val_dataloader() == []
    with pytest.raises(ValueError, match="cat comes without a validation part"):
        thing.setup("validate")


def test_either_spelling_of_a_folder_is_found(root: Path) -> None:
    (root / "cat").rename(root / "cat_train_lmdb")
    (root / "tower_train_lmdb").rename(root / "tower")
    assert len(ImageData(LSUN(str(root), "cat", 16)).dataset("train")) == 4
    assert len(ImageData(LSUN(str(root), "tower", 16)).dataset("train")) == 10


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("church", "church_outdoor"), ("bedrom", "bedroom"), ("tv_monitor", "tv-monitor"), ("Cat", "cat")],
)
def test_a_mistyped_category_names_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"no category '{typed}'; did you mean {meant}\?"):
        ImageData(LSUN("data", typed))


def test_missing_images_are_named_with_every_place_looked_at(root: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        ImageData(LSUN(str(root), "kitchen")).setup("fit")
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"{root}/kitchen_train_lmdb", f"{root}/kitchen,", "data.mdb", "--data.source.root"):
        assert part in message
    (root / "kitchen_train_lmdb.zip").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=r"unzip .*kitchen_train_lmdb\.zip where it is"):
        ImageData(LSUN(str(root), "kitchen")).setup("fit")


def test_training_goes_without_a_missing_validation_part(root: Path, encoded: list[bytes]) -> None:
    write(root / "bridge_train_lmdb", encoded[:2])
    data = ImageData(LSUN(str(root), "bridge", 16))
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"no val images; put bridge_val_lmdb into"):
        data.setup("validate")


def test_half_a_database_is_refused_before_it_is_read(root: Path) -> None:
    file = root / "tower_train_lmdb" / "data.mdb"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size // 2)
    with pytest.raises(ValueError, match=rf"data\.mdb is incomplete: {size // 2:,} of {size:,} bytes"):
        ImageData(LSUN(str(root), "tower", 16)).prepare_data()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "data.mdb").write_bytes(b"junk" * 4096)
    with pytest.raises(ValueError, match="cat is not a readable LMDB"):
        ImageData(LSUN(str(tmp_path), "cat", 16)).setup("fit")


def test_a_database_without_entries_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "cat", [])
    with pytest.raises(ValueError, match="without any entry"):
        ImageData(LSUN(str(tmp_path), "cat", 16)).setup("fit")


@pytest.mark.filterwarnings(FEW_CORES)
def test_forked_workers_read_a_database_that_was_open_before_the_fork(root: Path) -> None:
    images = ImageData(LSUN(str(root), "tower", 32)).dataset("train")
    expected = images.batch(range(10))["image"]
    for _ in range(2):
        loader = DataLoader(
            Batches(images, training=False),
            batch_sampler=[[Key(2 * i), Key(2 * i + 1)] for i in range(5)],
            collate_fn=as_is,
            num_workers=2,
            multiprocessing_context="fork",
        )
        assert torch.equal(torch.cat([batch["image"] for batch in loader]), expected)
        assert torch.equal(images.batch(range(10))["image"], expected)


@pytest.mark.filterwarnings(FEW_CORES)
def test_workers_serve_training_validation_and_statistics(root: Path) -> None:
    alone, helped = (ImageData(LSUN(str(root), "tower", 16), batch_size=4, num_workers=n) for n in (0, 2))
    one, other = iter(alone.train_dataloader()), iter(helped.train_dataloader())
    for _ in range(6):
        assert torch.equal(next(one)["image"], next(other)["image"])
    statistics = [torch.cat([b["image"] for b in data.stored_batches(0, 1, 3)]) for data in (alone, helped)]
    assert torch.equal(*statistics)
    assert len(statistics[0]) == 10


def test_enlarged_images_are_counted_in_one_warning(root: Path) -> None:
    with pytest.warns(SmallImageWarning, match=r"3 of 3 images are smaller than image_size=301 .* 340 x 300") as warned:
        ImageData(LSUN(str(root), "tower", 301)).dataset("val")
    assert len(warned) == 1


def test_the_set_can_be_pickled_and_read_after(root: Path) -> None:
    images = ImageData(LSUN(str(root), "tower", 16)).dataset("train")
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.read(7)["image"], images.read(7)["image"])


def test_keys_are_listed_once_and_kept_beside_the_database(root: Path, encoded: list[bytes]) -> None:
    path = root / "tower_train_lmdb"
    ImageData(LSUN(str(root), "tower", 16)).prepare_data()
    (kept,) = root.glob("*.npy")
    assert kept.name.startswith("tower_train_lmdb-10-")
    listed = [bytes(key) for key in np.load(kept)]
    assert listed == sorted(hashlib.sha1(b"%d" % i + data).hexdigest().encode() for i, data in enumerate(encoded))
    # A list that says something else is believed, so it was read instead of the database.
    np.save(kept, np.load(kept)[::-1])
    assert bytes(list_keys(path)[0]) == listed[-1]


def test_a_damaged_list_of_keys_is_made_again(root: Path) -> None:
    path = root / "tower_train_lmdb"
    expected = list_keys(path)
    (kept,) = root.glob("*.npy")
    for damaged in (b"", b"junk", kept.read_bytes()[:200]):
        kept.write_bytes(damaged)
        np.testing.assert_array_equal(list_keys(path), expected)
    np.save(kept, np.array([b"x"]))
    np.testing.assert_array_equal(list_keys(path), expected)


def test_a_database_that_grew_is_listed_anew(root: Path, encoded: list[bytes]) -> None:
    path = root / "cat"
    assert len(list_keys(path)) == 4
    lsun._environments.clear()
    keys = write(path, encoded[:6])
    assert [bytes(key) for key in list_keys(path)] == keys


def test_keys_go_to_the_cache_where_the_folder_cannot_be_written(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file = whole_file

    def read_only(file: Path) -> AbstractContextManager[BinaryIO]:
        if file.parent == root:  # File modes do not stop the superuser, who may run this.
            raise PermissionError(file)
        return write_file(file)

    monkeypatch.setattr(files, "whole_file", read_only)
    for path in (root / "tower_train_lmdb", root / "tower_val_lmdb"):
        list_keys(path)
    assert sorted(file.name.split("-")[0] for file in cache.iterdir()) == [
        "tower_train_lmdb",
        "tower_val_lmdb",
    ]
    monkeypatch.setattr(files, "whole_file", write_file)
    assert len(list_keys(root / "tower_train_lmdb")) == 10
    assert not list(root.glob("*.npy"))


@pytest.fixture
def broken(tmp_path: Path, encoded: list[bytes]) -> tuple[Path, int, str]:
    """A root whose category "cat" has six images, one cut in half; its index and its key."""
    files = [*encoded[:2], encoded[2][: len(encoded[2]) // 2], *encoded[3:6]]
    keys = write(tmp_path / "cat", files)
    key = hashlib.sha1(b"2" + files[2]).hexdigest()
    return tmp_path, keys.index(key.encode()), key


@pytest.mark.filterwarnings(FEW_CORES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_image_stops_and_its_key_is_named(broken: tuple[Path, int, str], num_workers: int) -> None:
    root, _, key = broken
    data = ImageData(LSUN(str(root), "cat", 16), batch_size=6, num_workers=num_workers)
    loader = data.train_dataloader()
    with pytest.raises(CorruptImage, match=rf"cat, key {key}: .*truncated"):
        next(iter(loader))
    if num_workers:
        # Left to the garbage collector, torch waits 5 s for each worker after an error.
        loader._iterator._shutdown_workers()  # type: ignore[union-attr]


@pytest.mark.filterwarnings(FEW_CORES, f"ignore::{CorruptImageWarning.__module__}.CorruptImageWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_images_are_counted_also_by_workers(broken: tuple[Path, int, str], num_workers: int) -> None:
    root, bad, _ = broken
    data = ImageData(LSUN(str(root), "cat", 16), num_workers=num_workers, on_corrupt="skip")
    batches = [batch["image"] for batch in data.stored_batches(0, 1, 2)]
    assert data.corrupt() == [bad]
    assert sum(len(batch) for batch in batches) == data.num_images() == 5
    images = LSUNImages("cat", root / "cat", 16)
    expected = [images.read(i)["image"] for i in range(6) if i != bad]
    assert torch.equal(torch.cat(batches), torch.stack(expected))


def test_fingerprints_differ_where_images_do_and_not_with_the_path(root: Path, encoded: list[bytes]) -> None:
    first = ImageData(LSUN(str(root), "tower", 16)).fingerprint()
    assert ImageData(LSUN(str(root), "tower", 16)).fingerprint() == first
    assert ImageData(LSUN(str(root), "tower", 32)).fingerprint() != first
    assert ImageData(LSUN(str(root), "tower", 16)).fingerprint("val") != first
    write(root / "moved" / "tower_train_lmdb", encoded)
    assert ImageData(LSUN(str(root / "moved"), "tower", 16)).fingerprint() == first
