"""Files with 16 bits per channel, rounded to 8 bits. Pillow alone truncates colours, and inverts no 16-bit grey."""

import io
import sys

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

BLOCK = 2**18
"""Values that are rounded at a time, which takes more memory than their results."""
_BITS_PER_SAMPLE, _PHOTOMETRIC_INTERPRETATION = 258, 262
_NATIVE = "L" if sys.byteorder == "little" else "B"
_OTHER = {"L": "B", "B": "L"}
_BANDS = {"RGB": "RGB", "RGBX": "RGB", "RGBA": "RGBA", "RGBa": "RGBA", "CMYK": "CMYK"}

# Pillow knows this mode in one byte order only.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))


def load(data: bytes) -> Image.Image:
    """Opens an image file and decodes its pixels.

    Returns:
        The image in any of Pillow's modes; colours of 16 bits are rounded to 8.
    """
    image = Image.open(io.BytesIO(data))
    raw_mode = _raw_mode(image)
    image.load()
    if raw_mode is None:
        return image
    bands, order = raw_mode
    if bands == "LA":
        # Four bytes a pixel, like RGBA of 8 bits: high and low byte of grey, then of alpha.
        pairs = _channels(data, "RGBA")
        rounded = _image("LA", _joined(pairs[..., ::2], pairs[..., 1::2]))
    else:
        # Pillow takes the high byte of every channel; in the other byte order that is the low one.
        straight = "RGBA" if bands == "RGBa" else bands
        values = _joined(*(_channels(data, f"{straight};16{o}") for o in (order, _OTHER[order])))
        if bands == "RGBa":
            # Premultiplied by alpha. Over white, white is added where alpha is missing.
            missing = 65535 - values[..., 3:]
            rounded = _image("RGB", np.minimum(values[..., :3], 65535 - missing) + missing)
        else:
            rounded = _image(_BANDS[bands], values, image.info.get("transparency"))
    rounded.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return rounded


def grey(image: Image.Image) -> Image.Image:
    """Rounds grey of 9 to 16 bits, one of Pillow's integer modes, to 8 bits.

    Raises:
        ValueError: If the pixels are integers beyond 16 bits, of which the range is unknown.
    """
    tags = getattr(image, "tag_v2", {})
    bits = min(16, int(np.max(tags.get(_BITS_PER_SAMPLE, 16))))
    largest = 2**bits - 1
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > largest:
        raise ValueError(f"pixels from {levels.min()} to {levels.max()} do not fit {bits} bits")
    white_is_zero = tags.get(_PHOTOMETRIC_INTERPRETATION) == 0
    values = levels.astype(np.int32)[..., None]
    return _image("L", largest - values if white_is_zero else values, image.info.get("transparency"), largest)


def _raw_mode(image: ImageFile.ImageFile) -> tuple[str, str] | None:
    """Channels and byte order of a file with several channels of 16 bits, as in ("RGB", "B"); None for other files."""
    if not image.tile:
        return None
    args = image.tile[0].args
    name = args[0] if isinstance(args, tuple) else args
    bands, _, depth = str(name).partition(";16")
    order = _NATIVE if depth == "N" else depth
    known = bands in _BANDS or (bands == "LA" and image.mode == "RGBA")
    return (bands, order) if known and order in _OTHER else None


def _channels(data: bytes, raw_mode: str) -> np.ndarray:
    """Decodes a file anew, its pixels taken for those of another raw mode: uint8, (H, W, C)."""
    image = Image.open(io.BytesIO(data))
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)
        for tile in image.tile
    ]
    image.load()
    return np.asarray(image)


def _joined(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """16-bit values of their bytes: uint16."""
    values = high.astype(np.uint16)
    values <<= 8
    values |= low
    return values


def _image(mode: str, values: np.ndarray, transparent: object = None, largest: int = 65535) -> Image.Image:
    """An 8-bit image of integers from 0 to `largest`, (H, W, C), of which the value `transparent` is transparent."""
    levels = np.empty(values.shape, np.uint8)
    flat, rounded = values.reshape(-1), levels.reshape(-1)
    for start in range(0, len(flat), BLOCK):
        block = slice(start, start + BLOCK)
        rounded[block] = (flat[block].astype(np.int32) * 255 + largest // 2) // largest
    if isinstance(transparent, int | tuple) and mode in ("L", "RGB"):
        alpha = np.where((values == np.array(transparent)).all(-1, keepdims=True), 0, 255).astype(np.uint8)
        mode, levels = f"{mode}A", np.concatenate([levels, alpha], axis=-1)
    return Image.frombytes(mode, (values.shape[1], values.shape[0]), np.ascontiguousarray(levels).tobytes())
