"""From the keys of a batch to the batch."""

import multiprocessing
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusion_lit.data.dataset import CorruptImage, CorruptImageWarning, ImageDataset, NoImage
from diffusion_lit.data.stream import Key
from diffusion_lit.types import Batch


class Batches(Dataset[Batch]):
    """Reads the images of a batch by their keys, and leaves out what cannot be read.

    Args:
        images: The dataset.
        training: Whether batches have `flip`, and how an unreadable image is left out: in training the next readable
            image takes its place, so that the batch keeps its size; otherwise the batch becomes smaller, possibly
            empty, so that no image counts twice.
        unreadable: Which images were found to be unreadable, bool, (N,); written to, and shared with worker processes.
            None: an unreadable image is an error.
        pixels: Whether batches need `image`; else they are what `ImageDataset.without_pixels` returns.
    """

    def __init__(
        self, images: ImageDataset, training: bool, unreadable: Tensor | None = None, pixels: bool = True
    ) -> None:
        self.images = images
        self.pixels = pixels
        self.training = training
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> Batch:
        batch = self._read(keys)
        if self.training:
            batch["flip"] = torch.tensor([key.flip for key in keys], dtype=torch.bool)
        return batch

    def _read(self, keys: list[Key]) -> Batch:
        while True:
            try:
                readable = self._readable(keys)
                indices = [key.image for key in readable]
                batch = (self.images.batch if self.pixels else self.images.without_pixels)(indices)
                return self.images.vary(batch, indices, [key.draw for key in readable])
            except CorruptImage as error:
                if self.unreadable is None or error.index < 0:
                    raise
                if not self.unreadable[error.index]:
                    self.unreadable[error.index] = True
                    warnings.warn(f"left out: {error}", CorruptImageWarning, stacklevel=2)

    def _readable(self, keys: list[Key]) -> list[Key]:
        if self.unreadable is None or not self.unreadable.any():
            return keys
        if not self.training:
            return [key for key in keys if not self.unreadable[key.image]]
        if self.unreadable.all():
            raise NoImage(f"{self.images.name}: none of the {len(self)} images can be read")
        readable = []
        for key in keys:
            index = key.image
            while self.unreadable[index]:
                index = (index + 1) % len(self)
            readable.append(key._replace(image=index))
        return readable


def as_is(batch: Any) -> Any:
    """The collate function of a dataset that makes whole batches."""
    return batch


def require_shared_memory(num_workers: int) -> None:
    """Checks that worker processes can share batches with this one.

    Raises:
        ValueError: If there is no shared memory.
    """
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise ValueError(
            f"num_workers={num_workers} needs shared memory, and /dev/shm cannot be used ({error.strerror}); "
            "set --data.num_workers 0"
        ) from error
