"""Files of data that something else has written: what cannot be right is refused in one line, or made anew."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from diffusion_lit.data import COCOCaptions, CorruptImage, Folder, ImageData, Metadata, Prepared, WebDataset
from diffusion_lit.data.captions import Captions
from diffusion_lit.data.lsun import list_keys
from diffusion_lit.data.prepared import FORMAT, MOMENTS_FORMAT, list_arrays
from tests.data.test_captions import captions, folder, png, web, write_tar
from tests.data.test_lsun import write as write_lmdb

IMAGES = np.zeros((2, 1, 4, 4), np.uint8)
NONE = np.zeros(0, np.int64)
TEXTS = Captions([["a"], ["b"]]).arrays
SAYS: dict[str, Any] = {
    "format": FORMAT,
    "parts": {"train": 0},
    "fingerprints": ["f"],
    "captions": [None],
    "class_names": [None],
}
MOMENTS = np.zeros((2, 2, 4, 2, 2), np.float16)
SAYS_OF_MOMENTS: dict[str, Any] = {"format": MOMENTS_FORMAT, "first_stage": "s", "images": ["f"]}


def write(path: Path, arrays: Sequence[np.ndarray], text: Any) -> Path:
    """Arrays one after another and a JSON text, as `prepare` writes them."""
    with path.open("wb") as file:
        for array in arrays:
            np.save(file, array)
        np.save(file, np.frombuffer((text if isinstance(text, str) else json.dumps(text)).encode(), np.uint8))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_that_are_no_files_are_passed_over_and_names_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(200))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            tar.addfile(special(f"link{kind.decode()}.png", kind, str(secret)))
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            tar.addfile(special(f"device{kind.decode()}.png", kind))
        for name, grey in (("../../up.png", 1), (f"{tmp_path}/secret.png", 2)):
            info = tarfile.TarInfo(name)
            info.size = len(png(grey))
            tar.addfile(info, io.BytesIO(png(grey)))
    data = ImageData(WebDataset(str(tmp_path), 8, captions=None))
    before = sorted(tmp_path.parent.iterdir())
    assert data.some([0, 1])["image"][:, 0, 0, 0].tolist() == [1, 2]
    assert data.num_images("train") == 2
    assert sorted(tmp_path.parent.iterdir()) == before
    assert secret.read_bytes() == png(200)


def sparse(path: Path) -> None:
    """A member that claims 2^60 bytes, none of which is there."""
    info = special("a.png", tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"\x80" + (2**60).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(10240 - 512))


def exaggerated(path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.size = 2**60
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240 - 512))


def long_caption(path: Path) -> None:
    write_tar(path, {"a.png": png(1), "a.txt": b"x" * (1 << 21)})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(sparse, "is a sparse file"), (exaggerated, ""), (long_caption, "more than a caption")],
)
def test_a_tar_file_whose_members_cannot_be_as_large_as_they_say_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(tmp_path / "0.tar")
    with pytest.raises(ValueError, match=rf"0\.tar is no tar file that can be read to its end: .*{said}"):
        WebDataset(str(tmp_path), 8).load("train")


@pytest.mark.parametrize(
    "change",
    [
        {"members": np.array([[0, 0, 2**62]] * 6)},
        {"members": np.array([[0, 2**62, 2**62]] * 6)},
        {"members": np.array([[7, 0, 10]] * 6)},
        {"members": np.array([[-1, 0, 10]] * 6)},
        {"members": np.array([[0, -5, 10]] * 6)},
        {"members": np.array([[0, 0, 10]] * 5)},
        {"members": np.zeros((6, 3))},
        {"members": np.array([{}] * 6)},
        {"keys": np.zeros(6)},
        {"keys": np.zeros((6, 1), "S1")},
        {"texts": np.zeros(0, np.uint8)},
        {"texts": np.zeros(6)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_index_that_cannot_be_that_of_the_tar_files_is_made_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    root = web(tmp_path)
    WebDataset(str(root), 8).prepare()
    [path] = root.glob(".index-*")
    with np.load(path) as kept:
        arrays = dict(kept)
    np.savez(path, **{**arrays, **change})
    data = ImageData(WebDataset(str(root), 8))
    assert captions(data.some([4, 0])) == ["image number 4", "image number 0"]


def test_an_index_that_is_torn_or_abandoned_is_made_anew_and_no_part_of_it_stays(tmp_path: Path) -> None:
    root = web(tmp_path)
    WebDataset(str(root), 8).prepare()
    [path] = root.glob(".index-*")
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04 no archive", whole[: len(whole) // 2], b"\x93NUMPY"):
        path.write_bytes(content)
        abandoned = path.with_name(f".{path.name}.0.part")
        abandoned.write_bytes(whole[:100])
        WebDataset(str(root), 8).prepare()
        assert not abandoned.exists()
        with np.load(path) as kept:
            assert len(kept["members"]) == 6


def test_a_list_of_keys_that_is_something_else_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "db_lmdb"
    write_lmdb(path, [png(1), png(2)])
    expected = list_keys(path)
    [kept] = tmp_path.glob("*.keys.npy")
    for content in (np.zeros(2), np.array([None, {}]), np.zeros((2, 1), "S3")):
        np.save(kept, content)
        assert list_keys(path).tolist() == expected.tolist()
    with kept.open("wb") as file:
        np.savez(file, a=expected)
    abandoned = kept.with_name(f".{kept.name}.0.part")
    abandoned.touch()
    assert list_keys(path).tolist() == expected.tolist()
    assert not abandoned.exists()


def test_names_and_captions_that_are_no_utf_8_are_read(tmp_path: Path) -> None:
    members = {"\udcff.png": png(1), "\udcff.json": b'{"caption": "a \\ud800 \\u001b[2J"}', "b.png": b"no image"}
    write_tar(tmp_path / "0.tar", {**members, "b.json": b'{"caption": ["x"]}'})
    dataset = WebDataset(str(tmp_path), 8, captions="json").load("train")
    assert dataset is not None
    assert dataset.captions is not None
    assert [dataset.captions[i] for i in range(2)] == [["a ? \x1b[2J"], ["['x']"]]
    with pytest.raises(CorruptImage, match=r"0\.tar, b: "):
        dataset.read(1)


def backwards(file: Path) -> None:
    """Arrays whose header says that they have fewer than no bytes: a reader would go back and never end."""
    with file.open("wb") as stream:
        npy.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (-128,)})


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ([IMAGES.astype(np.float64), NONE], SAYS),
        ([IMAGES[0], NONE], SAYS),
        ([IMAGES[..., :3], NONE], SAYS),
        ([np.array([[[[None]]]]), NONE], SAYS),
        ([IMAGES, np.array([-1, 0])], SAYS),
        ([IMAGES, np.array([0, 5])], {**SAYS, "class_names": [["a", "b"]]}),
        ([IMAGES, NONE], {**SAYS, "class_names": [[1, 2]]}),
        ([IMAGES, NONE], {**SAYS, "parts": {"train": -1}}),
        ([IMAGES, NONE], {**SAYS, "parts": [0]}),
        ([IMAGES, NONE], {**SAYS, "captions": [0]}),
        ([IMAGES, NONE, *(10 * array for array in TEXTS)], {**SAYS, "captions": [2]}),
        ([IMAGES, NONE, TEXTS[0][:2], TEXTS[1][:2], TEXTS[2][:1]], {**SAYS, "captions": [2]}),
        ([IMAGES, NONE], []),
        ([IMAGES, NONE], "[" * 100_000),
    ],
)
def test_a_prepared_file_that_cannot_be_right_is_refused(
    tmp_path: Path, arrays: list[np.ndarray], text: dict[str, Any]
) -> None:
    path = write(tmp_path / "x.images", arrays, text)
    with pytest.raises(ValueError, match=r"x\.images (is not a complete file|cannot be used|has (labels|captions))"):
        ImageData(Prepared(str(path), 4, 1)).dataset("train")


def test_a_prepared_file_that_is_right_is_taken_with_captions_that_are_no_utf_8(tmp_path: Path) -> None:
    first, ends, _ = TEXTS
    path = write(
        tmp_path / "x.images",
        [IMAGES, np.array([0, 7]), first, ends, np.array([97, 255], np.uint8)],
        {**SAYS, "captions": [2]},
    )
    assert captions(ImageData(Prepared(str(path), 4, 1)).some([0, 1])) == ["a", "�"]


def test_an_array_of_fewer_than_no_bytes_is_refused(tmp_path: Path) -> None:
    backwards(tmp_path / "x.images")
    with pytest.raises(ValueError, match=r"uint8 with the shape \(-128,\)"):
        list_arrays(tmp_path / "x.images")


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ([MOMENTS[:1]], SAYS_OF_MOMENTS),
        ([MOMENTS.astype(np.float32)], SAYS_OF_MOMENTS),
        ([MOMENTS[:, :1]], SAYS_OF_MOMENTS),
        ([MOMENTS[0]], SAYS_OF_MOMENTS),
        ([np.array([None, {}])], SAYS_OF_MOMENTS),
        ([MOMENTS], {**SAYS_OF_MOMENTS, "images": "xyz"}),
        ([MOMENTS], {**SAYS_OF_MOMENTS, "images": None}),
        ([MOMENTS], "[" * 100_000),
    ],
)
def test_moments_that_cannot_be_those_of_the_images_are_refused(
    tmp_path: Path, arrays: list[np.ndarray], text: Any
) -> None:
    images = write(tmp_path / "x.images", [IMAGES, NONE], SAYS)
    moments = write(tmp_path / "x.moments", arrays, text)
    with pytest.raises(ValueError, match=r"x\.moments (is not a complete file of moments|holds moments of 1 images)"):
        ImageData(Prepared(str(images), 4, 1, str(moments))).dataset("train")


ROWS = [
    "[1]",
    "3",
    '{"file_name": ["a.png"], "text": "a"}',
    '{"file_name": "a.png", "text": {"b": 1}}',
    '{"file_name": "a.png", "text": ["a", 1]}',
    "[" * 100_000,
]


@pytest.mark.parametrize("line", ROWS, ids=range(len(ROWS)))
def test_rows_of_captions_that_are_something_else_are_refused(tmp_path: Path, line: str) -> None:
    root = folder(tmp_path, "jsonl")
    (root / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"metadata\.jsonl: "):
        Folder(str(root), 8, captions=Metadata(), labels=False).load("train")
    (tmp_path / "x.json").write_text(line)
    with pytest.raises(ValueError, match=r"x\.json does not hold COCO's captions"):
        Folder(str(root), 8, captions=COCOCaptions(str(tmp_path / "x.json")), labels=False).load("train")
