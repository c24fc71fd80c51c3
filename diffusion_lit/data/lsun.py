"""LSUN: scenes and objects in LMDB databases, read without unpacking by any number of processes."""

import contextlib
import difflib
import hashlib
import io
import os
import zipfile
from pathlib import Path

import lmdb
import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from diffusion_lit.data.dataset import CorruptImage, Example, ImageDataset, Split
from diffusion_lit.data.decode import PREPROCESSING, decode, spread, warn_of_small_images
from diffusion_lit.data.source import Resized
from diffusion_lit.files import default_cache_dir, keep

SCENES = (
    "bedroom", "bridge", "church_outdoor", "classroom", "conference_room", "dining_room", "kitchen", "living_room",
    "restaurant", "tower",
)  # fmt: skip
"""Categories with training and validation images."""

OBJECTS = (
    "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining_table", "dog",
    "horse", "motorbike", "person", "potted_plant", "sheep", "sofa", "train", "tv-monitor",
)  # fmt: skip
"""Categories with training images only."""

_SPARE_PAGES = 16
_environments: dict[tuple[str, int], lmdb.Environment] = {}

# LMDB must not be used across a fork, and lmdb refuses to open a database twice in one process. A child
# therefore forgets its parent's environments and opens its own at its first read.
os.register_at_fork(after_in_child=_environments.clear)


class LSUN(Resized):
    """One category of LSUN, in its published LMDB databases.

    Scenes are stored as `<root>/<category>_train_lmdb` and `<root>/<category>_val_lmdb`, objects as
    `<root>/<category>`, without validation images; either spelling is found. Images are cropped and resized as by
    `decode.square`. Missing validation images are reported and do not prevent training.

    DDPM mirrors the training images of all categories but bedroom.

    Args:
        root: Folder that contains the databases' folders.
        category: One of the ten scenes and twenty objects.
        image_size: Height and width in pixels.

    Raises:
        ValueError: If there is no such category, or a number is out of range.

    Source: Yu et al. 2015, LSUN.
    """

    eval_batch_size = 64

    def __init__(self, root: str, category: str = "church_outdoor", image_size: int = 256) -> None:
        super().__init__(image_size)
        known = SCENES + OBJECTS
        if category not in known:
            near = difflib.get_close_matches(category, known, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"LSUN has no category {category!r}; {meant} Set --data.source.category")
        self.root = Path(root).expanduser()
        self.category = category

    def prepare(self) -> None:
        """Lists the keys, which takes minutes for millions of images; the other processes read the list."""
        path = self._find("train")
        if path is not None:
            list_keys(path)

    def load(self, split: Split) -> ImageDataset | None:
        path = self._find(split)
        if path is not None:
            return LSUNImages(f"LSUN {self.category} {split}", path, self.image_size)
        looked_for = " and ".join(str(path) for path in self._candidates(split))
        if split != "train":
            if self.category in SCENES:
                rank_zero_info(f"no LSUN {self.category} validation images: looked for {looked_for}")
            return None
        zipped = [path.with_name(path.name + ".zip") for path in self._candidates(split)]
        there = [str(path) for path in zipped if path.is_file()]
        remedy = f"unzip {there[0]} where it is" if there else f"download {zipped[0].name} and unzip it in {self.root}"
        raise FileNotFoundError(
            f"no LSUN {self.category} training images: looked for {looked_for}, each to hold data.mdb; "
            f"{remedy}, or point --data.source.root at the folder that holds it"
        )

    def remedy(self, split: Split) -> str:
        if self.category in OBJECTS:
            return f": LSUN's {self.category} comes without a validation part"
        return f"; put {self._candidates(split)[0].name} into {self.root}"

    def _candidates(self, split: Split) -> list[Path]:
        if split != "train":
            return [self.root / f"{self.category}_val_lmdb"]
        return [self.root / f"{self.category}_train_lmdb", self.root / self.category]

    def _find(self, split: Split) -> Path | None:
        return next((path for path in self._candidates(split) if (path / "data.mdb").is_file()), None)


class LSUNImages(ImageDataset):
    """The images of one LSUN database, decoded when they are read; there are no classes.

    It can be pickled and used before and after a fork: each process that reads opens the database itself.

    Args:
        name: Name of the dataset in messages.
        path: The database's folder.
        image_size: Height and width to crop and resize to, in pixels.

    Raises:
        ValueError: If the database is incomplete, empty, or not an LMDB at all.
    """

    def __init__(self, name: str, path: Path, image_size: int) -> None:
        super().__init__(name, image_size, channels=3)
        self.path = path
        self.keys = list_keys(path)
        if not len(self.keys):
            raise ValueError(f"{path} is an LMDB without any entry; unzip it again")

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> Example:
        key = bytes(self.keys[index])
        try:
            return {"image": decode(self._file(index), self.image_size)}
        except ValueError as error:
            raise CorruptImage(f"{self.path}, key {key.decode(errors='replace')}: {error}", index) from error

    def preload(self, skip_corrupt: bool) -> ImageDataset:
        chosen = spread(len(self))
        warn_of_small_images(self.name, self.image_size, len(self), chosen, lambda i: io.BytesIO(self._file(i)))
        return self

    def _file(self, index: int) -> bytes:
        try:
            with environment(self.path).begin() as transaction:
                value: bytes | None = transaction.get(bytes(self.keys[index]))
        except lmdb.Error as error:
            raise ValueError(str(error)) from error
        if value is None:
            raise ValueError("no such entry any more")
        return value

    def fingerprint(self) -> str:
        """SHA-256 of the keys, the size of the data and the preprocessing, not of the path."""
        size = (self.path / "data.mdb").stat().st_size
        digest = hashlib.sha256(f"{len(self)} {size} {self.image_size} {PREPROCESSING}".encode())
        digest.update(self.keys.tobytes())
        return digest.hexdigest()


def environment(path: Path) -> lmdb.Environment:
    """Returns the handle that this process has of a database, opened at the first call.

    Raises:
        ValueError: If this is not a complete LMDB. A data file that was cut short is refused here, because reading past
            its end would kill the process with a bus error.
    """
    key = (os.path.realpath(path), os.getpid())
    if key not in _environments:
        try:
            opened = lmdb.open(key[0], readonly=True, lock=False, readahead=False, create=False)
        except lmdb.Error as error:
            raise ValueError(f"{path} is not a readable LMDB ({error}); unzip it again") from error
        pages, page_size = opened.info()["last_pgno"] + 1, opened.stat()["psize"]
        size = (path / "data.mdb").stat().st_size
        if size < (pages - _SPARE_PAGES) * page_size:
            opened.close()
            raise ValueError(
                f"{path}/data.mdb is incomplete: {size:,} of {pages * page_size:,} bytes; copy or unzip it again"
            )
        _environments[key] = opened
    return _environments[key]


def list_keys(path: Path) -> np.ndarray:
    """All keys of a database in its own order, (N,), dtype S.

    Listing reads the whole index, so the keys are stored in a .npy file: beside the database if that folder is
    writable, else in $DIFFUSION_LIT_CACHE (default ~/.cache/diffusion_lit). The file's name contains the number of
    entries, the size of the data and, in the cache, a hash of the path, so that a changed database is listed again.

    Raises:
        ValueError: If this is not a complete LMDB.
    """
    count = environment(path).stat()["entries"]
    size = (path / "data.mdb").stat().st_size
    name = f"{count}-{size}.keys.npy"
    where = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]
    kept_at = (path.with_name(f"{path.name}-{name}"), default_cache_dir() / f"{path.name}-{where}-{name}")
    for file in kept_at:
        with contextlib.suppress(OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile):
            keys: np.ndarray = np.load(file, allow_pickle=False)
            if keys.shape == (count,) and keys.dtype.kind == "S":
                return keys
    rank_zero_info(f"{path}: listing {count:,} keys, once")
    with environment(path).begin() as transaction:
        keys = np.array(list(transaction.cursor().iternext(keys=True, values=False)), dtype=bytes)
    keep(kept_at, lambda stream: np.save(stream, keys, allow_pickle=False))
    return keys
