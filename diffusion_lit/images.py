"""Between 8-bit images and the model's range, and images on disk."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
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


def tile(images: Tensor, columns: int | None = None, tile_size: int = 64, gap: int = 4) -> Tensor:
    """Lays images out in a grid, row by row.

    Args:
        images: 8-bit images, (B, C, H, W).
        columns: Tiles per row; by default as square a grid as B allows.
        tile_size: Images smaller than this are enlarged bicubically to it, so that a person can see them.
        gap: White pixels between tiles.

    Returns:
        One 8-bit image, (C, rows, columns).
    """
    count, channels, height, width = images.shape
    if height < tile_size:
        scale = tile_size / height
        images = F.interpolate(images.float(), scale_factor=scale, mode="bicubic", align_corners=False)
        images = images.round().clamp(0, 255).to(torch.uint8)
        height, width = images.shape[-2:]
    columns = columns or math.ceil(math.sqrt(count))
    missing = -count % columns
    white = torch.full((missing, channels, height, width), 255, dtype=torch.uint8)
    tiles = F.pad(torch.cat([images.cpu(), white]), (0, gap, 0, gap), value=255)
    canvas = rearrange(tiles, "(row column) c h w -> c (row h) (column w)", column=columns)
    return canvas[:, : canvas.shape[1] - gap, : canvas.shape[2] - gap]


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
