"""CIFAR-10, downloaded and checked by torchvision and held in memory."""

import tarfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from diffusion_lit.data.dataset import ImageDataset, InMemoryImages, Split
from diffusion_lit.data.source import Source


class CIFAR10(Source):
    """60,000 photographs of ten classes, 32 x 32 RGB: 50,000 for training; the 10,000 test images are val and test.

    Args:
        root: Folder that contains cifar-10-batches-py/, or will.
        download: Whether to download and unpack what is missing. An archive in `root` is unpacked without a network.

    Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
    """

    def __init__(self, root: str = "data", download: bool = True) -> None:
        self.root = Path(root).expanduser()
        self.download = download

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, 32, 32

    def prepare(self) -> None:
        if not self.download:
            return
        try:
            datasets.CIFAR10(self.root, download=True)
        except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
            # URLError is an OSError; torchvision reports a damaged download as a bare RuntimeError.
            raise FileNotFoundError(f"{self._what_is_wrong()}, and the download failed: {_line(error)}") from error

    def load(self, split: Split) -> ImageDataset:
        try:
            source = datasets.CIFAR10(self.root, train=split == "train")
        except (OSError, RuntimeError) as error:
            hint = "" if self.download else ", or set --data.source.download to true"
            raise FileNotFoundError(self._what_is_wrong() + hint) from error
        images = np.ascontiguousarray(source.data.transpose(0, 3, 1, 2))
        labels = torch.tensor(source.targets)
        return InMemoryImages(f"CIFAR-10 {split}", torch.from_numpy(images), labels, source.classes)

    def _what_is_wrong(self) -> str:
        official = datasets.CIFAR10
        archive, folder = self.root / official.filename, self.root / official.base_folder
        files = [*official.train_list, *official.test_list, [official.meta["filename"], official.meta["md5"]]]
        missing = [name for name, _ in files if not (folder / name).is_file()]
        damaged = [name for name, md5 in files if name not in missing and not check_integrity(folder / name, md5)]
        if damaged:
            found = f"{folder} holds incomplete or damaged files ({', '.join(damaged)})"
        elif folder.is_dir() and missing:
            found = f"{folder} lacks {', '.join(missing)}"
        elif not archive.is_file():
            found = f"neither {official.base_folder}/ nor {official.filename} is in {self.root}"
        elif not check_integrity(archive, official.tgz_md5):
            found = f"{archive} is incomplete or damaged ({archive.stat().st_size:,} bytes, another MD5 sum)"
        else:
            found = f"{archive} is there but not unpacked"
        return (
            f"{found}; put {official.filename} (MD5 {official.tgz_md5}) from {official.url} into {self.root} "
            "and let this unpack it, or point --data.source.root at the folder that holds "
            f"{official.base_folder}/"
        )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
