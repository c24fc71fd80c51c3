"""Which images are to be made: their numbers, what they show, and which process makes which of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion_lit.data import ImageData
from diffusion_lit.data.dataset import Split
from diffusion_lit.types import Condition

MOST = {"num_images": 100_000_000, "batch_size": 2**20}
"""More images than a directory takes, and more at once than any memory."""


class Conditions(ABC):
    """What images show: image i has condition i modulo N."""

    @abstractmethod
    def __len__(self) -> int:
        """N; 0: there are none."""

    @abstractmethod
    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        """The conditions of some images, (B, ...) each, as a model takes them; {} if there are none.

        Args:
            index: Which images, int64, (B,).
        """

    def described(self) -> Any:
        """What they depend on besides the model, as plain data for the key of a result; None: nothing."""
        return None


class Given(Conditions):
    """Conditions held in memory.

    Args:
        values: By name, (N, ...) each.
    """

    def __init__(self, values: Condition) -> None:
        self.values = dict(values)

    def __len__(self) -> int:
        return min(map(len, self.values.values()), default=0)

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        return {name: values[index % len(values)] for name, values in self.values.items()}


class Examples(Conditions):
    """What the examples of a data set show: image i has what the data say of example i modulo their number.

    Args:
        data: The data.
        names: Entries that every example must have. The image itself is always among what is given, as the target.
        testing: Whether test images go before validation images; training images are taken where there are neither.

    Raises:
        ValueError: If the data lack an entry.
    """

    def __init__(self, data: ImageData, names: Sequence[str], testing: bool = False) -> None:
        order: tuple[Split, ...] = ("test", "val", "train") if testing else ("val", "test", "train")
        self.data = data
        self.split = next(split for split in order if data.has(split))
        self.names = tuple(dict.fromkeys((*names, "image")))
        missing = [name for name in names if name not in data.some([0], self.split)]
        if missing:
            raise ValueError(
                f"the model needs {' and '.join(missing)}, which {data.dataset(self.split).name} lacks; choose a "
                "--data.source that has it"
            )

    def __len__(self) -> int:
        return len(self.data.dataset(self.split))

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        batch: Mapping[str, Any] = self.data.examples((index % len(self)).tolist(), self.split)
        return {name: batch[name] for name in self.names if name in batch}

    def described(self) -> Any:
        return {"split": self.split, "images": self.data.fingerprint(self.split), "entries": list(self.names)}


class Request(TypedDict):
    """One batch of images to generate.

    Attributes:
        index: Which images, int64, (B,); indices beyond the number asked for only fill the batch.
        seed: Of the noise.
        condition: What each image shows, (B, ...) each; empty: the generator's own choice.
    """

    index: Tensor
    seed: int
    condition: Condition


class Requests(Dataset[Request]):
    """Images 0 .. num_images - 1 in batches of one size; the last is filled up with further images.

    Batch b holds images b * batch_size and following, whatever the number of processes, so that the arithmetic of
    every image is the same with one process and with many.

    Args:
        num_images: At least 1.
        batch_size: Images made at once by one process, at least 1.
        conditions: What images show; None: the generator's own choice.
        seed: Of the noise.
        section: Of the configuration that the numbers are from, for messages.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        conditions: Conditions | None = None,
        seed: int = 0,
        section: str | None = None,
    ) -> None:
        prefix = "" if section is None else f"{section}."
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{prefix}{name}={value} must be at least 1")
            if value > MOST[name]:
                raise ValueError(f"{prefix}{name}={value} must be at most {MOST[name]}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"{prefix}seed={seed} must lie in 0 .. 2^64 - 1")
        self.num_images = num_images
        self.batch_size = batch_size
        self.conditions = conditions
        self.seed = seed

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __getitem__(self, batch: int) -> Request:
        """Batch `batch`; that of number `len(self)` is empty, for processes that have no other."""
        if not 0 <= batch <= len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        start = batch * self.batch_size
        index = torch.arange(start, start + (self.batch_size if batch < len(self) else 0))
        condition = {} if self.conditions is None or not len(index) else self.conditions(index)
        return {"index": index, "seed": self.seed, "condition": condition}

    def share(self, rank: int, world_size: int) -> range:
        """The batches of one of `world_size` processes; there may be none."""
        return range(rank, len(self), world_size)

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[Request, int]]:
        """The batches of one process, each with the number of its images that were asked for."""
        for batch in self.share(rank, world_size):
            yield self[batch], min(self.batch_size, self.num_images - batch * self.batch_size)

    def loader(self, rank: int, world_size: int) -> DataLoader[Request]:
        """A data loader over the batches of one process; where it has none, over an empty one."""
        return DataLoader(
            self, batch_size=None, sampler=self.share(rank, world_size) or range(len(self), len(self) + 1)
        )
