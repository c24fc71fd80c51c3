"""From the bytes of an image file to an 8-bit tensor: orientation, colour mode, size and crop."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

PREPROCESSING = "upright; alpha over white; box halves, bicubic to the short side, centre crop; v1"
"""What `decode` does to an image, for fingerprints: change it whenever the pixels change."""

_ORIENTATION = 0x0112
_DECODING_ERRORS = (
    OSError,
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


def decode(data: bytes, image_size: int, channels: int = 3) -> Tensor:
    """Decodes an image file and brings it to one size and colour mode.

    Args:
        data: The bytes of a PNG, JPEG, WebP, BMP, GIF, TIFF or PNM file; of several frames the first is read.
        image_size: Height and width of the result, pixels.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma).

    Returns:
        uint8, (channels, image_size, image_size).

    Raises:
        ValueError: If the bytes are not a whole image; the message is the reason, without a file's name.
    """
    try:
        source = Image.open(io.BytesIO(data))
        source.load()
        image = square(in_colour(upright(source), channels), image_size)
    except _DECODING_ERRORS as error:
        reason = "not an image of a known format" if "cannot identify" in str(error) else str(error)
        raise ValueError(reason or type(error).__name__) from error
    array = np.array(image)
    return torch.from_numpy(array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def upright(image: Image.Image) -> Image.Image:
    """Turns a photograph the way its EXIF orientation says it was held."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except _DECODING_ERRORS:
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def in_colour(image: Image.Image, channels: int) -> Image.Image:
    """Converts any of Pillow's modes to RGB (channels = 3) or to grey (channels = 1).

    Transparent pixels are laid over white, as a browser shows them. Sixteen bits are rounded to eight, not
    cut off.

    Raises:
        ValueError: If the pixels are floating point, or integers beyond 16 bits: their range is unknown.
    """
    if image.mode == "F":
        raise ValueError("pixels are floating point, of unknown range")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"pixels from {levels.min()} to {levels.max()} do not fit 16 bits")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def square(image: Image.Image, image_size: int) -> Image.Image:
    """Scales the short side to `image_size` and cuts out the centre.

    While the short side is at least twice too long the image is halved by averaging 2 x 2 boxes, then
    it is resized bicubically. Averaging first is what keeps fine texture from aliasing at no cost in
    sharpness, and it is the preparation behind ADM's published LSUN and ImageNet models, so that reference
    statistics of ours describe the same pixels. An image that is smaller than `image_size` is enlarged.

    Args:
        image: An 8-bit image.
        image_size: Side of the result, pixels.

    Source: Dhariwal & Nichol 2021, `center_crop_arr` in guided_diffusion/image_datasets.py.
    """
    if image.size == (image_size, image_size):
        return image
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))
