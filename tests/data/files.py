"""Image files that Pillow does not write, made of their parts."""

import struct
import zlib

import numpy as np

GREY, RGB, GREY_ALPHA, RGB_ALPHA = 0, 2, 4, 6
"""Colour types of PNG."""


def png(values: np.ndarray, colour: int, transparent: tuple[int, ...] | None = None) -> bytes:
    """A PNG file with 16 bits per channel; values: (H, W, C)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    extra = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(
    values: np.ndarray,
    photometric: int,
    order: str = "<",
    bits: int = 16,
    extra_samples: int | None = None,
    compressed: bool = False,
    packed: bytes | None = None,
    orientation: int = 1,
) -> bytes:
    """A TIFF file of one strip; values: (H, W, C), of 16 bits unless they are given `packed`."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes() if packed is None else packed
    if compressed:
        pixels = zlib.compress(pixels)
    tags: list[tuple[int, list[int]]] = [
        (256, [width]),
        (257, [height]),
        (258, [bits] * channels),
        (259, [8 if compressed else 1]),
        (262, [photometric]),
        (273, [8]),
        (274, [orientation]),
        (277, [channels]),
        (278, [height]),
        (279, [len(pixels)]),
        *([(338, [extra_samples])] if extra_samples is not None else []),
    ]
    first = 8 + len(pixels) + len(pixels) % 2
    after = first + 2 + 12 * len(tags) + 4
    entries, overflow = b"", b""
    for tag, numbers in tags:
        kind = 3 if max(numbers) < 65536 else 4
        content = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(content) > 4:
            place = struct.pack(f"{order}I", after + len(overflow))
            overflow += content
        else:
            place = content.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + place
    mark = b"II*\0" if order == "<" else b"MM\0*"
    body = mark + struct.pack(f"{order}I", first) + pixels.ljust(first - 8, b"\0")
    return body + struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0" + overflow
