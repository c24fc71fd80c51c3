"""Which images are generated together: by whole batches, so that no image depends on who else makes some."""

from collections.abc import Iterator, Sequence
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Request(TypedDict):
    """One batch of images to generate.

    Attributes:
        index: Which images, int64, (B,); those at or above the number asked for only fill the batch.
        label: The class that each shows, int64, (B,); where classes were asked for.
    """

    index: Tensor
    label: NotRequired[Tensor]


class Requests(Dataset[Request]):
    """Images 0 .. num_images - 1 in batches of one size; the last is filled up with further images.

    Batch b holds images b * batch_size and on, whatever the number of processes, so that the arithmetic of every
    image is the same with one process and with many.

    Args:
        num_images: At least 1.
        batch_size: Images made at once by one process, at least 1.
        labels: Image i shows class labels[i modulo their number]; None: nothing is asked for.
        section: Of the configuration that the numbers are from, to name them by.

    Raises:
        ValueError: If either number is below 1.
    """

    def __init__(
        self, num_images: int, batch_size: int, labels: Sequence[int] | None = None, section: str | None = None
    ) -> None:
        prefix = "" if section is None else f"{section}."
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{prefix}{name}={value} must be at least 1")
        self.num_images = num_images
        self.batch_size = batch_size
        self.labels = None if labels is None else torch.tensor(labels)

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __getitem__(self, batch: int) -> Request:
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        start = batch * self.batch_size
        index = torch.arange(start, start + self.batch_size)
        return (
            {"index": index}
            if self.labels is None
            else {"index": index, "label": self.labels[index % len(self.labels)]}
        )

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


def check_seed(key: str, seed: int) -> None:
    """Raises ValueError if images cannot be made from such a seed."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"{key}={seed} must lie in 0 .. 2^64 - 1")


def check_labels(labels: Tensor, num_classes: int | None) -> None:
    """Raises ValueError if a model of so many classes, None being an unconditional one, cannot show these."""
    if num_classes is None:
        raise ValueError("labels: the model is unconditional and cannot be asked for a class; leave labels out")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"labels: {int(wrong[0])} must lie in 0 .. {num_classes - 1}, the model's {num_classes} classes"
        )


def asked_labels(
    labels: str | Sequence[int] | None, per_class: int | None, num_classes: int | None
) -> list[int] | None:
    """Which classes to generate, in order; None: none in particular.

    Args:
        labels: Classes one after the other, "3,3,7" or numbers.
        per_class: So many images of every class instead, class by class.
        num_classes: The model's, None if it is unconditional.

    Raises:
        ValueError: If both are given, something is no number or out of range, or the model is unconditional.
    """
    if labels is None and per_class is None:
        return None
    if labels is not None and per_class is not None:
        raise ValueError(f"labels={labels} and per_class={per_class} exclude each other; give one of them")
    if per_class is not None:
        if per_class < 1:
            raise ValueError(f"per_class={per_class} must be at least 1")
        check_labels(torch.zeros(0), num_classes)
        return [label for label in range(num_classes or 0) for _ in range(per_class)]
    words = labels.strip("[] ").split(",") if isinstance(labels, str) else labels or []
    try:
        numbers = [int(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"labels={labels!r} must be class numbers between commas, such as --labels 3,3,7")
    check_labels(torch.tensor(numbers), num_classes)
    return numbers
