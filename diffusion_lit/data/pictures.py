"""Images, masks and maps from files, of a size that a model takes; sizes are not changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_lit.data import sixteen_bits
from diffusion_lit.data.decode import DECODING_ERRORS, EXTENSIONS, in_colour, reason_of, upright
from diffusion_lit.data.derived import read_map
from diffusion_lit.data.folder import find
from diffusion_lit.data.masks import White, read_mask

Shape = tuple[int, int, int]


def picture_files(path: str, option: str) -> list[Path]:
    """A file, or all image files in a folder and below, in the order of their paths.

    Raises:
        ValueError: If there is none.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = [place / name for name in find(place).images]
        if not files:
            raise ValueError(f"{option}={path} has no images in it; images are {' '.join(EXTENSIONS)}")
        return files
    if not place.is_file():
        raise ValueError(f"{option}={path}: there is no such file or folder")
    return [place]


@dataclass(frozen=True)
class Size:
    """What size pictures must have.

    Attributes:
        usual: (C, H, W), for messages and for the colours, which are converted.
        fits: Whether a model takes a shape.
    """

    usual: Shape
    fits: Callable[[Shape], bool]


def read_images(files: Sequence[Path], size: Size) -> Tensor:
    """Reads images, at least one, all of one size: uint8, (N, C, H, W).

    Raises:
        ValueError: If one cannot be read or has another size.
    """
    return _stack([(path, _read_image(path, size.usual[0])) for path in files], size, "image", "resize it")


def _read_image(path: Path, channels: int) -> Tensor:
    try:
        source = sixteen_bits.load(path.read_bytes())
        image = in_colour(upright(source, source), channels)
    except DECODING_ERRORS as error:
        raise ValueError(f"{path} cannot be read as an image: {reason_of(error)}") from error
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, channels).transpose(2, 0, 1).copy())


def read_masks(files: Sequence[Path], size: Size, white: White = "hole") -> Tensor:
    """Reads masks: uint8, (N, 1, H, W), 1 where pixels are known; see `read_mask`."""
    return _stack([(path, read_mask(path, white)) for path in files], size, "mask", "resize it")


def read_maps(files: Sequence[Path], size: Size) -> Tensor:
    """Reads maps of classes: uint8, (N, 1, H, W).

    Raises:
        ValueError: If one cannot be read, is no map or has another size.
    """
    return _stack([(path, read_map(path)) for path in files], size, "map", "resize it by nearest neighbours")


def _stack(pictures: Sequence[tuple[Path, Tensor]], size: Size, what: str, remedy: str) -> Tensor:
    first = pictures[0][1].shape
    for path, picture in pictures:
        found = f"{what} {path} has {picture.shape[2]} x {picture.shape[1]} pixels"
        channels, height, width = picture.shape
        if not size.fits((channels, height, width)):
            raise ValueError(f"{found}, and the model takes {size.usual[2]} x {size.usual[1]}; {remedy}")
        if picture.shape != first:
            raise ValueError(f"{found}, and the first {first[2]} x {first[1]}; make them in several predictions")
    return torch.stack([picture for _, picture in pictures])


def kept_texts(files: Sequence[Path], name: str) -> list[str] | None:
    """What `predict` has written into its PNG files under a name; None unless all files have it."""
    texts = []
    for path in files:
        with Image.open(path) as image:
            texts.append(image.info.get(name))
    return None if None in texts else [str(text) for text in texts]
