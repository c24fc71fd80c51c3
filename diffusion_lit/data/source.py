"""Where images come from."""

from abc import abstractmethod

from diffusion_lit.data.dataset import ImageDataset, Split
from diffusion_lit.types import Part


class Source(Part):
    """A kind of image collection: finds it on the disk and opens its splits.

    A subclass takes the arguments that only this collection needs. What is the same for all collections (batches,
    order, mirroring, worker processes, unreadable images) belongs to `ImageData`.

    Attributes:
        flips: Default of `ImageData.flip`: whether a mirrored image is still an image of this collection.
        eval_batch_size: Default of `ImageData.eval_batch_size`.
        gives_pixels: Whether batches of training, validation and testing have `image`; false: they have `moments`
            instead.
        moments_of: Fingerprint of the first stage whose `moments` batches have; None: they have none.
    """

    flips: bool = True
    eval_batch_size: int = 256
    gives_pixels: bool = True
    moments_of: str | None = None

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), known without reading the disk."""

    def prepare(self) -> None:
        """Downloads or indexes what is missing; called on one process per machine, before `load`."""

    @abstractmethod
    def load(self, split: Split) -> ImageDataset | None:
        """Opens one split; called once per split and process.

        Returns:
            The images, or None if there is no such split.

        Raises:
            FileNotFoundError: If the images are missing.
            ValueError: If the images cannot be used.
        """

    def remedy(self, split: Split) -> str:
        """What to do about a missing split, appended to the error message: "; set ..."."""
        return ""


class Resized(Source):
    """Files that are cropped and resized, as by `decode.square`.

    Args:
        image_size: Height and width in pixels.
        channels: 3 for RGB, 1 for grey.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, image_size: int, channels: int = 3) -> None:
        at_least("source.image_size", image_size, 1)
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} is neither 1 (grey) nor 3 (RGB); set --data.source.channels")
        self.image_size = image_size
        self.channels = channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size


def at_least(name: str, value: int, bound: int) -> None:
    """Checks the lower bound of an option.

    Args:
        name: Name of the option below `--data`: "source.image_size".
        value: Value of the option.
        bound: Least value that is allowed.

    Raises:
        ValueError: If `value` is below `bound`.
    """
    if value < bound:
        raise ValueError(f"{name.split('.')[-1]}={value} is below {bound}; raise --data.{name}")
