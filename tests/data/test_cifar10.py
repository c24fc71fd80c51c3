import hashlib
import pickle
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from diffusion_lit.data import ImageData, InMemoryImages
from diffusion_lit.data.cifar10 import CIFAR10

FOLDER = "cifar-10-batches-py"


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    """Twelve images to a file, as the official files hold them: 1024 reds, 1024 greens, 1024 blues."""
    generator = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {name: generator.integers(0, 256, (12, 3072), dtype=np.uint8) for name in names}


@pytest.fixture
def root(tmp_path: Path, rows: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CIFAR-10 in the official format, with its own MD5 sums made known to torchvision."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    contents: dict[str, object] = {
        name: {"data": data, "labels": [i % 10 for i in range(12)]} for name, data in rows.items()
    }
    contents["batches.meta"] = {"label_names": list("abcdefghij")}
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    official = datasets.CIFAR10
    monkeypatch.setattr(official, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(official, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(official, "meta", {**official.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(official, "url", (tmp_path / "nowhere" / official.filename).as_uri())
    return tmp_path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def archive(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same packed, in a folder of its own that a server on this machine offers for download."""
    path = root / "server" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root / FOLDER, FOLDER)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(path.parent)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{path.name}")
    yield path
    server.shutdown()
    thread.join()
    server.server_close()


def test_images_are_channels_first_and_in_the_order_of_the_files(root: Path, rows: dict[str, np.ndarray]) -> None:
    data = ImageData(CIFAR10(str(root), download=False))
    train = data.dataset("train")
    assert isinstance(train, InMemoryImages)
    assert train.images.shape == (60, 3, 32, 32)
    # Image 5 of the third file; green, row 7, column 9.
    assert int(train.images[2 * 12 + 5, 1, 7, 9]) == rows["data_batch_3"][5, 1024 + 7 * 32 + 9]
    assert train.read(2 * 12 + 5)["label"] == 5
    assert train.read(11)["label"] == 1
    assert data.image_shape == (3, 32, 32)
    assert data.class_names == list("abcdefghij")


def test_validation_and_test_are_the_test_images(root: Path, rows: dict[str, np.ndarray]) -> None:
    data = ImageData(CIFAR10(str(root), download=False))
    expected = torch.from_numpy(rows["test_batch"]).reshape(12, 3, 32, 32)
    for split in ("val", "test"):
        images = data.dataset(split)
        assert isinstance(images, InMemoryImages)
        assert torch.equal(images.images, expected)


def test_training_images_are_mirrored_by_default_and_others_never(root: Path) -> None:
    data = ImageData(CIFAR10(str(root), download=False))
    assert next(iter(data.train_dataloader()))["flip"].any()
    (batch,) = data.test_dataloader()
    assert "flip" not in batch


def test_building_the_data_module_touches_no_disk(tmp_path: Path) -> None:
    ImageData(CIFAR10(str(tmp_path / "none")))
    assert list(tmp_path.iterdir()) == []


def test_missing_images_are_named_with_what_to_do(root: Path) -> None:
    empty = root / "empty"
    data = ImageData(CIFAR10(str(empty), download=False))
    data.prepare_data()
    with pytest.raises(FileNotFoundError) as caught:
        data.setup("fit")
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(empty), FOLDER, "cifar-10-python.tar.gz", "--data.source.root", "download to true"):
        assert part in message


def test_a_failed_download_says_so_with_what_is_missing(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz is in .*download failed: .*No such file"):
        ImageData(CIFAR10(str(root / "empty"))).prepare_data()


@pytest.mark.usefixtures("archive")
def test_missing_images_are_downloaded_and_unpacked(root: Path) -> None:
    data = ImageData(CIFAR10(str(root / "fresh")))
    data.prepare_data()
    assert len(data.dataset("train")) == 60


def test_an_archive_that_is_there_is_unpacked_without_a_network(
    root: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", (root / "nowhere.tar.gz").as_uri())
    packed = ImageData(CIFAR10(str(archive.parent), download=False))
    with pytest.raises(FileNotFoundError, match="there but not unpacked"):
        packed.setup("fit")
    data = ImageData(CIFAR10(str(archive.parent)))
    data.prepare_data()
    assert len(data.dataset("test")) == 12


def test_half_an_archive_is_called_incomplete(root: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(datasets.CIFAR10, "url", (root / "nowhere.tar.gz").as_uri())
    data = ImageData(CIFAR10(str(archive.parent)))
    with pytest.raises(FileNotFoundError, match=r"tar\.gz is incomplete or damaged \([\d,]+ bytes.*download failed"):
        data.prepare_data()


def test_a_download_that_arrives_damaged_is_refused(root: Path, archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match=r"incomplete or damaged .*corrupted"):
        ImageData(CIFAR10(str(root / "fresh"))).prepare_data()


def test_a_damaged_or_missing_file_is_named(root: Path) -> None:
    third = root / FOLDER / "data_batch_3"
    third.write_bytes(third.read_bytes()[:-10])
    with pytest.raises(FileNotFoundError, match=r"damaged files \(data_batch_3\)"):
        ImageData(CIFAR10(str(root), download=False)).setup("fit")
    third.unlink()
    with pytest.raises(FileNotFoundError, match="lacks data_batch_3;"):
        ImageData(CIFAR10(str(root), download=False)).setup("fit")
