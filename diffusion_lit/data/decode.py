"""From the bytes of an image file to an 8-bit tensor: orientation, colour mode, size and crop."""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageCms
from torch import Tensor

from diffusion_lit.data import sixteen_bits

PREPROCESSING = "upright; alpha over white; box halves, bicubic to the short side, centre crop; v2"
"""What `decode` does to an image, for fingerprints: change it whenever the pixels change."""

KINDS = "png apng jpg jpeg jpe jfif webp avif jp2 j2k jpx gif bmp dib tif tiff tga ppm pgm pbm pnm"
EXTENSIONS = tuple(f".{kind}" for kind in KINDS.split())
"""Extensions of the image files that a folder is searched for, in lower case."""

CUT_FROM = 16
"""Images at least this many times as long as wide are cut before they are enlarged or reduced to the final size."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DECODING_ERRORS = (
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for a file that is damaged, or is no image."""


class SmallImageWarning(UserWarning):
    """Counts images that are enlarged."""


def decode(data: bytes, image_size: int, channels: int = 3) -> Tensor:
    """Decodes an image file and brings it to one size and colour mode.

    Args:
        data: The bytes of a file in a format that Pillow reads; of several frames the first is taken.
        image_size: Height and width of the result in pixels.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma).

    Returns:
        uint8, (channels, image_size, image_size).

    Raises:
        ValueError: If the bytes are not a complete image; the message is the reason, without a file's name.
    """
    try:
        source = sixteen_bits.load(data)
        image = square(upright(in_colour(source, channels), source), image_size)
    except DECODING_ERRORS as error:
        raise ValueError(reason_of(error)) from error
    array = np.array(image)
    return torch.from_numpy(array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def reason_of(error: Exception) -> str:
    """Why an image cannot be decoded, in a few words."""
    if "cannot identify" in str(error):
        return "not an image of a known format"
    return str(error) or type(error).__name__


def upright(image: Image.Image, source: Image.Image) -> Image.Image:
    """Turns an image as the EXIF orientation of its file says, and ignores whatever else EXIF says."""
    try:
        turn = _TURNS.get(source.getexif().get(_ORIENTATION, 1))
    except DECODING_ERRORS:
        return image
    return image if turn is None else image.transpose(turn)


def in_colour(image: Image.Image, channels: int) -> Image.Image:
    """Converts any of Pillow's modes to RGB (channels = 3) or to grey (channels = 1).

    Transparent pixels are laid over white, as a browser shows them. Sixteen bits are rounded to eight.

    Raises:
        ValueError: If the pixels are floating point, or integers beyond 16 bits, of which the range is unknown.
    """
    if image.mode == "F":
        raise ValueError("pixels are floating point, of unknown range")
    if image.mode.startswith("I"):
        image = sixteen_bits.grey(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    if image.mode in ("La", "HSV"):
        image = image.convert({"La": "LA", "HSV": "RGB"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def square(image: Image.Image, image_size: int) -> Image.Image:
    """Scales the short side to `image_size` and cuts out the centre.

    While the short side is at least twice too long, the image is halved by averaging 2 x 2 boxes; then it is resized
    bicubically. Averaging first prevents aliasing of fine texture without a loss of sharpness, and it is the
    preprocessing of ADM's published LSUN and ImageNet models, so that reference statistics describe the same pixels.
    A smaller image is enlarged. Very long images are cut first, so that memory follows the size of the result.

    Args:
        image: An 8-bit image.
        image_size: Side of the result in pixels.

    Source: Dhariwal & Nichol 2021, `center_crop_arr` in guided_diffusion/image_datasets.py.
    """
    if image.size == (image_size, image_size):
        return image
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if max(image.size) >= CUT_FROM * min(image.size):
        return _resized_centre(image, image_size)
    return centre(image, image_size, Image.Resampling.BICUBIC)


def centre(image: Image.Image, image_size: int, resampling: Image.Resampling) -> Image.Image:
    """Scales the short side to `image_size` in one step and cuts out the centre."""
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resampling)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def _resized_centre(image: Image.Image, image_size: int) -> Image.Image:
    """The same as resizing all of the image and cutting out the centre, but for rounding."""
    scale = image_size / min(image.size)
    spans, cuts = [], []
    for length in image.size:
        resized = round(length * scale)
        first = (resized - image_size) // 2
        start, end = (position * length / resized for position in (first, first + image_size))
        margin = 2 * max(1.0, length / resized)  # of the bicubic kernel
        cuts.append((max(0, math.floor(start - margin)), min(length, math.ceil(end + margin))))
        spans.append((start - cuts[-1][0], end - cuts[-1][0]))
    cut = image.crop((cuts[0][0], cuts[1][0], cuts[0][1], cuts[1][1]))
    box = (spans[0][0], spans[1][0], spans[0][1], spans[1][1])
    return cut.resize((image_size, image_size), Image.Resampling.BICUBIC, box)


def spread(num_images: int, count: int = 256) -> range:
    """At most `count` indices below `num_images`, evenly spread."""
    return range(0, num_images, max(1, math.ceil(num_images / count)))


@rank_zero_only
def warn_of_small_images(
    name: str, image_size: int, num_images: int, indices: Sequence[int], open_file: Callable[[int], Path | io.BytesIO]
) -> None:
    """Warns once, with their number, of images that are smaller than `image_size` and will be enlarged.

    Only the headers are read. What cannot be read is reported elsewhere.

    Args:
        name: Name of the dataset.
        image_size: Height and width of the results in pixels.
        num_images: Number of images.
        indices: Which of them to look at.
        open_file: Returns the file of an image.
    """
    small = []
    for index in indices:
        try:
            with Image.open(open_file(index)) as image:
                if min(image.size) < image_size:
                    small.append(image.size)
        except DECODING_ERRORS:
            continue
    if small:
        width, height = min(small, key=min)
        sampled = "" if len(indices) == num_images else "looked at "
        warnings.warn(
            f"{name}: {len(small):,} of {len(indices):,} images {sampled}are smaller than image_size={image_size} and "
            f"are enlarged, the smallest from {width} x {height}; remove them, or lower --data.source.image_size",
            SmallImageWarning,
            stacklevel=2,
        )
