"""Batches of (image, label) tuples, as torchvision's data sets make them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.images import from_uint8
from diffusion_lit.types import Batch

TOLERANCE = 1e-3
RANGES = "images must be uint8 in 0 .. 255, or float in [0, 1] or in [-1, 1]"


class Tuples:
    """Makes batches of a plain Lightning data module into those that systems take.

    Float images are taken to lie in [0, 1] if no value of the first batch is negative, and in [-1, 1] otherwise. This
    is decided once, so that a negative value later on is an error and not a change of brightness.
    """

    def __init__(self) -> None:
        self._from_zero: bool | None = None

    def __call__(self, batch: Any, image_shape: Sequence[int], num_classes: int | None) -> Batch:
        """Turns one batch into a dict.

        Args:
            batch: (image,), (image, label) or image alone; image (B, C, H, W), uint8 in 0 .. 255, or float in [0, 1] or
                in [-1, 1]. A label that is not int (B,) is left out.
            image_shape: (C, H, W) that the system takes.
            num_classes: That it knows; None: labels are not looked at.

        Returns:
            `image` float32 (B, C, H, W) in [-1, 1], and `label` int64 (B,) if there is one.

        Raises:
            ValueError: If the batch is something else, its shape is another, or a value is out of range.
        """
        entries = [batch] if isinstance(batch, Tensor) else batch
        if not isinstance(entries, list | tuple) or not 1 <= len(entries) <= 2 or not isinstance(entries[0], Tensor):
            raise ValueError(
                f"the data give batches of {kind_of(batch)}; they must be (image, label) tuples of tensors, or dicts "
                "with `image` float (B, C, H, W) in [-1, 1]"
            )
        image = entries[0]
        if image.ndim != 4 or list(image.shape[1:]) != list(image_shape):
            raise ValueError(
                f"the data's images are {tuple(image.shape[1:])} (channels, height, width) but the model takes "
                f"{tuple(image_shape)}; change the data's transform, or the network's image_size and in_channels"
            )
        ready: Batch = {"image": self._scaled(image)}
        if len(entries) == 2 and is_label(entries[1], len(image)):
            label = ready["label"] = entries[1].long()
            if num_classes is not None and len(label) and not 0 <= int(label.min()) <= int(label.max()) < num_classes:
                raise ValueError(
                    f"the data have labels from {int(label.min())} to {int(label.max())}, but the model has "
                    f"num_classes={num_classes}; labels count from 0"
                )
        return ready

    def _scaled(self, image: Tensor) -> Tensor:
        if image.dtype == torch.uint8:
            return from_uint8(image)
        if not image.is_floating_point():
            raise ValueError(f"the data's images are {image.dtype}; {RANGES}")
        if not image.numel():
            return image.float()
        low, high = (float(bound) for bound in image.aminmax())
        if not (low >= -1 - TOLERANCE and high <= 1 + TOLERANCE):
            raise ValueError(
                f"the data's images lie in {low:.4g} .. {high:.4g}; {RANGES}: divide by 255, or normalise with mean "
                "0.5 and standard deviation 0.5"
            )
        if self._from_zero is None:
            self._from_zero = low >= 0
        if not self._from_zero:
            return image.float()
        if low < -TOLERANCE:
            raise ValueError(
                f"the data's images lie in {low:.4g} .. {high:.4g}, those of the first batch in [0, 1]; give all of "
                "them in one range"
            )
        return image.float() * 2 - 1


def is_label(value: Any, count: int) -> bool:
    """Whether an entry of a batch of `count` images gives their classes: whole numbers, (B,)."""
    return (
        isinstance(value, Tensor)
        and value.shape == (count,)
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype != torch.bool
    )


def kind_of(batch: Any) -> str:
    """What a batch is, for messages: "list (Tensor, Tensor, dict)", "dict (pixels, label)"."""
    inner: list[str] = []
    if isinstance(batch, list | tuple):
        inner = [type(entry).__name__ for entry in batch]
    elif isinstance(batch, Mapping):
        inner = [str(name) for name in batch]
    return type(batch).__name__ + (f" ({', '.join(inner)})" if inner else "")
