"""Between 8-bit images and the model's range, and images on disk."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion_lit.files import whole_file


def from_uint8(image: Tensor) -> Tensor:
    """Maps 8-bit images, (B, C, H, W), linearly to float32 in [-1, 1]: 0 to -1 and 255 to 1."""
    return image.float() / 127.5 - 1.0


def scaled(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a batch as a model takes them: 8-bit `image` and `low_res` in [-1, 1], `mask` float, others as is."""
    ready = dict(batch)
    for name in ("image", "low_res"):
        if name in ready and ready[name].dtype == torch.uint8:
            ready[name] = from_uint8(ready[name])
    if "mask" in ready:
        ready["mask"] = ready["mask"].float()
    return ready


def to_uint8(image: Tensor) -> Tensor:
    """Maps images in [-1, 1] to 8 bits: rounds to the nearest level, clamps what lies outside."""
    return ((image.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """An 8-bit (C, H, W) tensor with one or three channels as a Pillow image."""
    array = image.cpu().numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def tile(
    images: Tensor,
    columns: int | None = None,
    tile_size: int = 64,
    gap: int = 4,
    rows: Sequence[str] = (),
) -> Tensor:
    """Lays images out in a grid, row by row.

    Args:
        images: 8-bit images, (B, C, H, W).
        columns: Tiles per row; by default as square a grid as B allows.
        tile_size: Lower images are enlarged by a whole number to at least this height, so that a person sees their
            pixels.
        gap: White pixels between tiles.
        rows: What is written to the left of each row; nothing beyond those that are given.

    Returns:
        One 8-bit image, (C, rows, columns).
    """
    count, channels, height, width = images.shape
    factor = math.ceil(tile_size / height)
    images = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    height, width = images.shape[-2:]
    columns = columns or math.ceil(math.sqrt(count))
    missing = -count % columns
    white = torch.full((missing, channels, height, width), 255, dtype=torch.uint8)
    tiles = F.pad(torch.cat([images.cpu(), white]), (0, gap, 0, gap), value=255)
    canvas = rearrange(tiles, "(row column) c h w -> c (row h) (column w)", column=columns)
    canvas = canvas[:, : canvas.shape[1] - gap, : canvas.shape[2] - gap]
    return torch.cat([_margin(rows, canvas.shape, height + gap), canvas], 2) if rows else canvas


def _margin(texts: Sequence[str], shape: Sequence[int], pitch: int) -> Tensor:
    """Texts one below the other, black on white, (C, rows, columns), as high as the grid to their right.

    Args:
        texts: One for each row of the grid.
        shape: Of the grid, (C, rows, columns).
        pitch: Pixels from one row of the grid to the next.
    """
    font = ImageFont.load_default()
    _, top, right, bottom = zip(*map(font.getbbox, texts), strict=True)
    margin = Image.new("L", (math.ceil(max(right)) + 8, shape[1]), 255)
    draw = ImageDraw.Draw(margin)
    for row, text in enumerate(texts):
        draw.text((4, row * pitch + (pitch - max(bottom) - min(top)) // 2), text, fill=0, font=font)
    return torch.from_numpy(np.array(margin)).expand(shape[0], -1, -1)


def save_animation(frames: Sequence[Tensor], path: Path | str, seconds: float = 4.0) -> None:
    """Writes 8-bit (C, H, W) images as an animated PNG that repeats, the last shown for longer.

    Args:
        frames: One after the other, at least one.
        path: The file.
        seconds: Of all frames but the last, which stays for half as long.
    """
    pictures = [to_pil(frame) for frame in frames]
    durations = [int(1000 * seconds / len(frames))] * (len(frames) - 1) + [int(500 * seconds)]
    pictures[0].save(path, format="PNG", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_png(image: Tensor, path: Path | str) -> None:
    """Writes an 8-bit (C, H, W) image as PNG, making the directory where needed; whole or not at all.

    Raises:
        OSError: If that is not possible; a picture that was there is as before.
    """
    with whole_file(Path(path)) as file:
        to_pil(image).save(file, format="PNG")
