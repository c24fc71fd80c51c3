"""Images and captions in tar files, as img2dataset writes them, read at random by an index of their members."""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from diffusion_lit.data.captions import Captions
from diffusion_lit.data.dataset import CorruptImage, Example, ImageDataset, Split
from diffusion_lit.data.decode import EXTENSIONS, PREPROCESSING, decode, spread, warn_of_small_images
from diffusion_lit.data.source import Resized
from diffusion_lit.files import default_cache_dir, keep

VERSION = 1
LONGEST_CAPTION = 1 << 20
"""Bytes of a member with a caption."""


class WebDataset(Resized):
    """Tar files in a folder, in the order of their names, whose members belong together where their names agree.

    A name counts up to its first dot: `000000012.jpg` and `000000012.txt` are an image and its caption. Members that
    belong to no image are ignored. Tar files are made to be read from front to back; here their headers are read once,
    and images are then read in any order. The index is kept beside the folder if that can be written to, else in
    $DIFFUSION_LIT_CACHE (default ~/.cache/diffusion_lit). Images are cropped and resized as by `decode.square`.

    Args:
        root: Folder of the tar files with training images.
        image_size: Height and width in pixels.
        channels: 3 for RGB, 1 for grey.
        val_root: Folder of the tar files with validation and test images. None: there is no validation.
        captions: Where captions are: the extension of their members, "txt", or "json" for the entry `caption` of these,
            which img2dataset writes. None: there are none.

    Raises:
        ValueError: If a number is out of range, or captions are somewhere else.
    """

    def __init__(
        self,
        root: str,
        image_size: int,
        channels: int = 3,
        val_root: str | None = None,
        captions: str | None = "txt",
    ) -> None:
        super().__init__(image_size, channels)
        if captions not in ("txt", "json", None):
            raise ValueError(f"captions={captions!r} is neither txt nor json nor null; set --data.source.captions")
        self.root = Path(root).expanduser()
        self.val_root = None if val_root is None else Path(val_root).expanduser()
        self.captions = captions

    def prepare(self) -> None:
        """Reads the headers of all tar files, unless an index is there; the other processes read the index."""
        for root in (self.root, self.val_root):
            if root is not None and root.is_dir():
                index_of(root, self.captions)

    def load(self, split: Split) -> ImageDataset | None:
        root, option = (self.root, "root") if split == "train" else (self.val_root, "val_root")
        if root is None:
            return None
        if not root.is_dir() or not tars(root):
            raise FileNotFoundError(f"there are no .tar files in {root}; set --data.source.{option} to their folder")
        return TarImages(f"{root} ({split})", root, self.image_size, self.channels, self.captions)

    def remedy(self, split: Split) -> str:
        return "; set --data.source.val_root to a folder of tar files"


class TarImages(ImageDataset):
    """Images inside the tar files of a folder, decoded when they are read.

    Args:
        name: Name of the dataset in messages.
        root: Folder of the tar files.
        image_size: Height and width to crop and resize to, in pixels.
        channels: 1 or 3.
        captions: Where captions are: see `WebDataset`.

    Raises:
        ValueError: If a file is no tar file, no image is found, or an image has no caption.
    """

    def __init__(self, name: str, root: Path, image_size: int, channels: int, captions: str | None) -> None:
        super().__init__(name, image_size, channels)
        self.root = root
        self.tars = [path.name for path in tars(root)]
        index = index_of(root, captions)
        self.members = index["members"]
        self.keys = index["keys"]
        if captions is not None:
            self.captions = Captions(
                [text] for text in index["texts"].tobytes().decode(errors="replace").split("\0")[:-1]
            )

    def __len__(self) -> int:
        return len(self.members)

    def data(self, index: int) -> bytes:
        """The bytes of an image file."""
        tar, offset, size = self.members[index].tolist()
        path: Path = self.root / self.tars[tar]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def read(self, index: int) -> Example:
        try:
            return {"image": decode(self.data(index), self.image_size, self.channels)}
        except (OSError, ValueError) as error:
            tar = self.root / self.tars[self.members[index, 0]]
            raise CorruptImage(f"{tar}, {self.keys[index].decode(errors='replace')}: {error}", index) from error

    def preload(self, skip_corrupt: bool) -> ImageDataset:
        chosen = spread(len(self))
        warn_of_small_images(self.name, self.image_size, len(self), chosen, lambda i: io.BytesIO(self.data(i)))
        return self

    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of images, of the captions, and of the preprocessing."""
        digest = hashlib.sha256(f"{self.channels} {self.image_size} {PREPROCESSING}".encode())
        digest.update(self.keys.tobytes())
        digest.update(np.ascontiguousarray(self.members[:, 2]).data)
        if self.captions is not None:
            digest.update(self.captions.fingerprint().encode())
        return digest.hexdigest()


def tars(root: Path) -> list[Path]:
    """The tar files of a folder, by name."""
    return sorted(path for path in root.iterdir() if path.suffix == ".tar" and path.name[0] != ".")


class Member(NamedTuple):
    """An image in a tar file.

    Attributes:
        key: Its name up to the first dot.
        offset: Of its first byte.
        size: In bytes.
        text: Its caption, if captions are read.
    """

    key: str
    offset: int
    size: int
    text: str | None


def members(path: Path, captions: str | None) -> Iterator[Member]:
    """The images of a tar file, in order.

    Raises:
        ValueError: If it is no tar file, or torn.
    """
    images: dict[str, tuple[int, int]] = {}
    texts: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, _, name = info.name.rpartition("/")
                key, _, extension = name.partition(".")
                key = f"{folder}/{key}" if folder else key
                if info.issparse():
                    raise EOFError(f"{info.name!r} is a sparse file, whose bytes do not stand one after another")
                if info.isfile() and f".{extension.lower()}" in EXTENSIONS:
                    images.setdefault(key, (info.offset_data, info.size))
                elif info.isfile() and extension == captions:
                    if info.size > LONGEST_CAPTION:
                        raise EOFError(f"{info.name!r} has {info.size:,} bytes, more than a caption has")
                    content = tar.extractfile(info)
                    texts[key] = "" if content is None else caption_in(content.read(), captions)
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            # The package takes a torn header for the end.
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise EOFError("it has no end")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no tar file that can be read to its end: {error}; download it again") from error
    for key, (offset, size) in images.items():
        yield Member(key, offset, size, texts.get(key))


def caption_in(content: bytes, kind: str) -> str:
    """The caption in the content of a .txt or .json member; "" if there is none."""
    text = content.decode(errors="replace")
    if kind == "json":
        try:
            text = json.loads(text)["caption"] or ""
        except (ValueError, LookupError, TypeError, RecursionError):
            text = ""
    return " ".join(str(text).replace("\0", " ").split())


def index_of(root: Path, captions: str | None) -> dict[str, np.ndarray]:
    """The index of a folder's tar files: read from where it is kept, or made and kept.

    Returns:
        `members` int64 (N, 3): number of the tar file, offset and size in bytes; `keys` (N,), dtype S; `texts` uint8:
        captions, each followed by a zero.

    Raises:
        ValueError: If a file is no tar file, no image is found, or an image has no caption.
    """
    files = tars(root)
    states = [(path.name, status.st_size, status.st_mtime_ns) for path in files for status in [path.stat()]]
    name = hashlib.sha256(repr((VERSION, captions, states)).encode()).hexdigest()[:16]
    where = hashlib.sha256(os.path.realpath(root).encode()).hexdigest()[:8]
    kept_at = (root / f".index-{name}.npz", default_cache_dir() / f"{root.name}-{where}-{name}.index.npz")
    for path in kept_at:
        with (
            contextlib.suppress(OSError, ValueError, EOFError, LookupError, AttributeError, zipfile.BadZipFile),
            path.open("rb") as opened,
            np.load(opened, allow_pickle=False) as stored,
        ):
            index = {entry: stored[entry] for entry in ("members", "keys", "texts")}
            if fits(index, [size for _, size, _ in states], captions):
                return index
    rank_zero_info(f"{root}: reading the headers of {len(files):,} tar files, once")
    found = [(number, member) for number, path in enumerate(files) for member in members(path, captions)]
    if not found:
        raise ValueError(f"there are no images in the {len(files)} tar files of {root}")
    missing = [(files[number].name, member.key) for number, member in found if not member.text]
    if captions is not None and missing:
        raise ValueError(
            f"{root}: {len(missing)} of {len(found)} images have no caption in a .{captions}, first {missing[0][1]} of "
            f"{missing[0][0]}; set --data.source.captions to json, txt or null"
        )
    texts = "".join(f"{member.text}\0" for _, member in found if member.text)
    index = {
        "members": np.array([(number, member.offset, member.size) for number, member in found], dtype=np.int64),
        "keys": np.array([member.key.encode(errors="surrogateescape") for _, member in found]),
        "texts": np.frombuffer(texts.encode(errors="replace"), dtype=np.uint8),
    }
    keep(kept_at, lambda file: np.savez(file, **index))
    return index


def fits(index: Mapping[str, np.ndarray], sizes: Sequence[int], captions: str | None) -> bool:
    """Whether an index, which is a file that anybody may have put there, can be one of tar files of these sizes."""
    members, keys, texts = (index[name] for name in ("members", "keys", "texts"))
    if members.dtype != np.int64 or members.shape != (len(keys), 3) or keys.dtype.kind != "S" or not len(keys):
        return False
    tar, offset, size = members.T
    if min(tar.min(), offset.min(), size.min()) < 0 or tar.max() >= len(sizes):
        return False
    # A difference of numbers that are not negative cannot overflow.
    if not (offset <= np.array(sizes, dtype=np.int64)[tar] - size).all():
        return False
    return texts.dtype == np.uint8 and texts.ndim == 1 and (captions is None or int((texts == 0).sum()) == len(keys))
