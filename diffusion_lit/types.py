"""The few types that every floor shares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NotRequired, TypeAlias, TypedDict

from torch import Tensor


class Batch(TypedDict):
    """What a data module yields.

    Attributes:
        image: (B, C, H, W); uint8 as read, float in [-1, 1] once it is on the device.
        label: Class indices, int64, (B,).
        flip: Which images to mirror, bool, (B,); present in training batches only.
    """

    image: Tensor
    label: NotRequired[Tensor]
    flip: NotRequired[Tensor]


Condition: TypeAlias = Mapping[str, Tensor]
"""What a network is told beside x_t and the time, by name: {"label": int64 (B,)}. Empty: unconditional."""


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says of x_t, in the two canonical views: x_t = alpha x0 + sigma eps.

    Attributes:
        x0: Predicted clean data, (B, C, H, W), in [-1, 1] up to the network's error.
        eps: Predicted noise, (B, C, H, W).
        extra: The channels that the network put out beyond the first C, (B, ..., H, W), None for most; raw.
    """

    x0: Tensor
    eps: Tensor
    extra: Tensor | None = None


DenoiseFn: TypeAlias = Callable[[Tensor, Tensor], Prediction]
"""(x_t, t) -> Prediction: a denoiser with its condition, and its guidance if any, already bound."""

StepFn: TypeAlias = Callable[[int, int], None]
"""(steps done, steps in all): called after every step, which is one network evaluation or two, for progress bars."""
