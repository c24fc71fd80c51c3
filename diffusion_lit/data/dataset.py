"""Datasets of images."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusion_lit.data.captions import Captions
from diffusion_lit.data.decode import spread
from diffusion_lit.text import decode_text, stack_texts
from diffusion_lit.types import Batch

Split: TypeAlias = Literal["train", "val", "test"]


class CorruptImage(ValueError):
    """An image exists but cannot be read.

    Args:
        message: One line: the file or key, and the reason.
        index: Index of the image in its dataset, -1 if it is not known.

    Attributes:
        remedy: What a user can do about it.
    """

    remedy = "--data.on_corrupt skip leaves such images out"

    def __init__(self, message: str, index: int = -1) -> None:
        super().__init__(message)
        self.index = index


class NoImage(CorruptImage):
    """None of a dataset's images can be read; leaving them out is no remedy."""

    remedy = ""


class CorruptImageWarning(UserWarning):
    """Names an image that was left out because it cannot be read."""


class Example(TypedDict):
    """One image of a dataset, with whatever else the dataset says about it.

    All examples of a dataset have the same keys, and their tensors, but for captions, the same shapes.

    They are those of a `Batch` as it leaves the loader, without B; what is spatial is mirrored with the image.
    """

    image: Tensor
    label: NotRequired[int]
    caption: NotRequired[Tensor]
    map: NotRequired[Tensor]
    low_res: NotRequired[Tensor]
    mask: NotRequired[Tensor]
    moments: NotRequired[Tensor]


class ImageDataset(Dataset[Example], ABC):
    """Square 8-bit images, indexed from 0; either all of them have a label or none has.

    Args:
        name: Name of the dataset in messages: "CIFAR-10 train".
        image_size: Height and width in pixels.
        channels: 1 or 3.
        class_names: Name of each class, in the order of the labels; None if there are no classes or they have no names.

    Attributes:
        captions: Of which one is taken each time that an image is read; None: there are none, or `read` gives them.
        names: Of the images, such as paths below a folder; None: they have none, or they are files.
    """

    captions: Captions | None = None
    names: Sequence[str] | None = None

    def __init__(self, name: str, image_size: int, channels: int, class_names: Sequence[str] | None = None) -> None:
        self.name = name
        self.image_size = image_size
        self.channels = channels
        self.class_names = class_names

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Example:
        """Reads one image.

        Raises:
            CorruptImage: If the image cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that identifies the images; stored statistics are looked up by it."""

    def __getitem__(self, index: int) -> Example:
        return self.read(index)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Reads several images and stacks them: `image` uint8 (B, C, H, W), `label` int64 (B,), and so on.

        B may be 0; the batch then has `image` and, if the classes have names, `label`.

        Raises:
            CorruptImage: At the first image that cannot be read.
        """
        examples = [cast(dict[str, Any], self.read(index)) for index in indices]
        if not examples:
            empty: Batch = {"image": torch.empty(0, self.channels, self.image_size, self.image_size, dtype=torch.uint8)}
            if self.class_names is not None:
                empty["label"] = torch.empty(0, dtype=torch.int64)
            return empty
        columns = {key: [example[key] for example in examples] for key in examples[0]}
        stack: dict[str, Callable[[Any], Tensor]] = {"label": torch.tensor, "caption": stack_texts}
        return cast(Batch, {key: stack.get(key, torch.stack)(column) for key, column in columns.items()})

    def without_pixels(self, indices: Sequence[int]) -> Batch:
        """Like `batch`, but without `image`, where models of latents have something else to train on.

        Called where the source's `gives_pixels` is false. By default images are there: others may be made from them.
        """
        return self.batch(indices)

    def vary(self, batch: Batch, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        """Adds to a batch what may differ each time that an image is read: by default one of its captions, if any.

        Called with what `batch` returned, after it.

        Args:
            batch: Of these images.
            indices: Which images, (B,).
            draws: One number for each, from which all that is random follows; 0 outside of training: see `Key`.
        """
        if self.captions is not None:
            batch["caption"] = self.captions.choose(indices, draws)
        return batch

    def texts(self, at_most: int) -> list[str]:
        """Captions of images evenly spread over the set, such as to learn a vocabulary from; [] if there are none."""
        if self.captions is not None:
            return list(self.captions.some(at_most))
        if not len(self) or "caption" not in self.read(0):
            return []
        return decode_text(stack_texts([self.read(index)["caption"] for index in spread(len(self), at_most)]))

    def preload(self, skip_corrupt: bool) -> "ImageDataset":
        """Returns the dataset to use: this one, or a copy that holds all images in memory.

        Called once, when the dataset is opened. By default nothing is preloaded.

        Args:
            skip_corrupt: Whether images that cannot be read are named in a warning and left out.

        Raises:
            CorruptImage: If an image cannot be read, and with `skip_corrupt` if none can.
        """
        return self


class InMemoryImages(ImageDataset):
    """Images in one tensor; a batch is one gather.

    Args:
        name: Name of the dataset in messages.
        images: uint8, (N, C, H, H).
        labels: int64, (N,), or None if there are no classes.
        class_names: Name of each class, in the order of the labels.

    Raises:
        ValueError: If the images are not square 8-bit images, or labels or class names do not fit.
    """

    def __init__(
        self, name: str, images: Tensor, labels: Tensor | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(f"{name}: expected uint8 (N, C, H, H), got {images.dtype} {tuple(images.shape)}")
        if labels is not None and labels.shape != (len(images),):
            raise ValueError(f"{name}: {len(images)} images, but labels of shape {tuple(labels.shape)}")
        if class_names is not None and labels is not None and len(labels) and int(labels.max()) >= len(class_names):
            raise ValueError(f"{name}: label {int(labels.max())}, but only {len(class_names)} class names")
        super().__init__(name, images.shape[2], images.shape[1], class_names)
        self.images = images.contiguous()
        self.labels = labels if labels is None else labels.long()
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Example:
        example: Example = {"image": self.images[index]}
        if self.labels is not None:
            example["label"] = int(self.labels[index])
        return example

    def batch(self, indices: Sequence[int]) -> Batch:
        chosen = torch.tensor(indices, dtype=torch.int64)
        batch: Batch = {"image": self.images.index_select(0, chosen)}
        if self.labels is not None:
            batch["label"] = self.labels.index_select(0, chosen)
        return batch

    def fingerprint(self) -> str:
        """SHA-256 of the shape and all pixels, and of the captions if there are any."""
        if self._fingerprint is None:
            digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
            digest.update(self.images.numpy().data)
            if self.captions is not None:
                digest.update(self.captions.fingerprint().encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint
