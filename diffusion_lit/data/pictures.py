"""Images, masks and maps from files, of exactly the size that a model takes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_lit.data import sixteen_bits
from diffusion_lit.data.decode import EXTENSIONS, in_colour, upright
from diffusion_lit.data.derived import read_map
from diffusion_lit.data.folder import find
from diffusion_lit.data.masks import read_mask

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


def read_images(files: Sequence[Path], shape: Shape) -> Tensor:
    """Reads images of one size.

    Args:
        files: At least one.
        shape: (C, H, W) that they must have; colours are converted, sizes are not.

    Returns:
        uint8, (N, C, H, W).

    Raises:
        ValueError: If one cannot be read or has another size.
    """
    return torch.stack([_read_image(path, shape) for path in files])


def _read_image(path: Path, shape: Shape) -> Tensor:
    channels, height, width = shape
    try:
        source = sixteen_bits.load(path.read_bytes())
        image = in_colour(upright(source, source), channels)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if image.size != (width, height):
        raise ValueError(
            f"image {path} has {image.width} x {image.height} pixels, and the model takes {width} x {height}; resize it"
        )
    return torch.from_numpy(np.array(image).reshape(height, width, channels).transpose(2, 0, 1).copy())


def read_masks(files: Sequence[Path], shape: Shape) -> Tensor:
    """Reads masks, white where holes are: uint8, (N, 1, H, W), 1 where pixels are known; see `read_mask`."""
    return torch.stack([read_mask(path, *shape[1:]) for path in files])


def read_maps(files: Sequence[Path], shape: Shape) -> Tensor:
    """Reads maps of classes: uint8, (N, 1, H, W).

    Raises:
        ValueError: If one cannot be read, is no map or has another size.
    """
    maps = []
    for path in files:
        found = read_map(path)
        if found.shape[1:] != shape[1:]:
            raise ValueError(
                f"map {path} has {found.shape[2]} x {found.shape[1]} pixels, and the model takes {shape[2]} x "
                f"{shape[1]}; resize it by nearest neighbours"
            )
        maps.append(found)
    return torch.stack(maps)


def kept_texts(files: Sequence[Path], name: str) -> list[str] | None:
    """What `predict` has written into its PNG files under a name; None unless all files have it."""
    texts = []
    for path in files:
        with Image.open(path) as image:
            texts.append(image.info.get(name))
    return None if None in texts else [str(text) for text in texts]
