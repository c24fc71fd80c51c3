"""Types that the whole package shares."""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NotRequired, TypeAlias, TypedDict, cast

from torch import Tensor, nn


class Part(ABC):  # noqa: B024
    """The base class of what a configuration can choose: an object that knows what it was constructed with.

    So a module that was put together in Python can write its configuration into its checkpoints: see
    `recorded.configuration_of`. A subclass needs no more than an ordinary `__init__`.

    Attributes:
        only_at_start: Arguments that a run reads when it begins and never again; one that continues keeps them.
    """

    only_at_start: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(vars(cls)["__init__"])  # type: ignore[method-assign]


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that keeps its arguments, by name, in `_given`; those of a base class are not kept."""

    @functools.wraps(init)
    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_given" not in vars(self):
            # Not an assignment, which modules and frozen data classes treat in their own ways.
            vars(self)["_given"] = _arguments(init, self, *args, **kwargs)
        init(self, *args, **kwargs)

    return record


def _arguments(init: Callable[..., None], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of a constructor by name, defaults too; none if it does not take them."""
    signature = inspect.signature(init)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        # The constructor says what is wrong.
        return {}
    bound.apply_defaults()
    given: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        further = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given |= value if further else {name: value}
    return given


class Batch(TypedDict):
    """A batch of examples.

    Attributes:
        image: Images, (B, C, H, W); uint8 from the data set, float in [-1, 1] on the device. Batches of training,
            validation and testing may lack it where they have `moments`.
        label: Class indices, int64, (B,).
        caption: Texts as UTF-8 bytes, uint8 (B, L): see `diffusion_lit.text`.
        map: Spatial condition such as a segmentation map, (B, ..., H, W).
        low_res: Low-resolution images, (B, C, h, w); scaled as `image` is.
        mask: 1 where pixels are known and 0 in holes, (B, 1, H, W).
        moments: What a first stage's encoder says of each image, (B, M, h, w), see `codecs.FirstStage`; as they leave
            the loader, of the image and of its mirror image, (B, 2, M, h, w).
        flip: Images to mirror, bool, (B,); in training batches only.
    """

    image: Tensor
    label: NotRequired[Tensor]
    caption: NotRequired[Tensor]
    map: NotRequired[Tensor]
    low_res: NotRequired[Tensor]
    mask: NotRequired[Tensor]
    moments: NotRequired[Tensor]
    flip: NotRequired[Tensor]


def batch_size(batch: Mapping[str, object]) -> int:
    """Number of examples, B, in a batch."""
    return min(len(cast(Tensor, entry)) for entry in batch.values())


Condition: TypeAlias = Mapping[str, Tensor]
"""Further inputs of a network, by name: {"label": int64 (B,)}. Empty: unconditional."""


@dataclass(frozen=True)
class Prediction:
    """Output of a denoiser: x0 and eps with x_t = alpha x0 + sigma eps.

    Attributes:
        x0: Predicted clean data, (B, ...), in [-1, 1] up to the error of the network.
        eps: Predicted noise, in the shape of x0.
        extra: Channels of the network's output beyond those of x_t, (B, C', ...), unprocessed; None: there are none.
    """

    x0: Tensor
    eps: Tensor
    extra: Tensor | None = None


DenoiseFn: TypeAlias = Callable[[Tensor, Tensor], Prediction]
"""(x_t, t) -> Prediction: a denoiser to which the condition, and the guidance if any, are bound."""

StepFn: TypeAlias = Callable[[int, int], None]
"""Called as on_step(done, total) after every step of a sampler, for progress bars."""


class Network(nn.Module, Part):
    """A network that predicts from noisy images and their time: the base class of what a model can have as `network`.

    Attributes:
        image_size: Height and width of the images.
        in_channels: Channels of the images.
        size_multiple: Whose multiples other heights and widths are that it takes too; None: it takes no others.
    """

    image_size: int
    in_channels: int
    size_multiple: int | None = None

    @abstractmethod
    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        """Maps noisy images to the network's output.

        Args:
            x: (B, in_channels, image_size, image_size).
            time: (B,), float32, as the parameterization gives it; for a chain in steps, from 0.
            condition: Entries such as `label`, by name; None: unconditional.

        Returns:
            (B, C, image_size, image_size); the first in_channels channels are the prediction.
        """


class TimeDependentClassifier(nn.Module, Part):
    """A classifier of noisy images: the base class of what classifier guidance can use.

    Attributes:
        image_size: Height and width of the images.
        in_channels: Channels of the images.
        num_classes: Number of classes.
    """

    image_size: int
    in_channels: int
    num_classes: int

    @abstractmethod
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Maps noisy images, (B, in_channels, image_size, image_size), and times, (B,), to logits, (B, num_classes)."""
