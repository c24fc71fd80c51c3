"""Which images are generated together: by whole batches, so that no image depends on who else makes some."""

from collections.abc import Iterator
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Request(TypedDict):
    """One batch of images to generate.

    Attributes:
        index: Which images, int64, (B,); those at or above the number asked for only fill the batch.
    """

    index: Tensor


class Requests(Dataset[Request]):
    """Images 0 .. num_images - 1 in batches of one size; the last is filled up with further images.

    Batch b holds images b * batch_size and on, whatever the number of processes, so that the arithmetic of every
    image is the same with one process and with many.

    Args:
        num_images: At least 1.
        batch_size: Images made at once by one process, at least 1.

    Raises:
        ValueError: If either is below 1.
    """

    def __init__(self, num_images: int, batch_size: int) -> None:
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.num_images = num_images
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __getitem__(self, batch: int) -> Request:
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        start = batch * self.batch_size
        return {"index": torch.arange(start, start + self.batch_size)}

    def share(self, rank: int, world_size: int) -> range:
        """The batches of one of `world_size` processes."""
        return range(rank, len(self), world_size)

    def of_rank(self, rank: int, world_size: int) -> Iterator[tuple[Request, int]]:
        """The batches of one process, each with the number of its images that were asked for."""
        for batch in self.share(rank, world_size):
            yield self[batch], min(self.batch_size, self.num_images - batch * self.batch_size)

    def loader(self, rank: int, world_size: int) -> DataLoader[Request]:
        """A data loader over the batches of one process."""
        return DataLoader(self, batch_size=None, sampler=self.share(rank, world_size))
