import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lit.data.decode import decode
from tests.data.adm import adm_center_crop


def file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def ramp(height: int = 16, width: int = 16) -> np.ndarray:
    return np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3).astype(np.uint8)


@pytest.mark.parametrize("image_size", [32, 64, 100, 256, 300, 400])
def test_crop_and_size_are_those_of_the_published_adm_loader(photographs: list[Image.Image], image_size: int) -> None:
    upright = photographs[0].resize((310, 412))
    for image in (photographs[0], upright):
        expected = adm_center_crop(image, image_size)
        np.testing.assert_array_equal(decode(file(image), image_size).permute(1, 2, 0).numpy(), expected)


def test_an_image_of_the_right_size_is_not_touched() -> None:
    pixels = ramp()
    decoded = decode(file(Image.fromarray(pixels)), 16)
    assert decoded.dtype == torch.uint8
    np.testing.assert_array_equal(decoded.numpy(), pixels.transpose(2, 0, 1))


def test_halving_averages_boxes_of_two_by_two() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    means = pixels.reshape(16, 2, 16, 2).astype(float).mean(axis=(1, 3))
    decoded = decode(file(Image.fromarray(pixels)), 16, channels=1)[0].numpy()
    # Pillow rounds after the rows and again after the columns.
    assert np.abs(decoded - means).max() <= 1


def test_the_crop_is_the_centre_of_the_long_side() -> None:
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 200
    assert bool((decode(file(Image.fromarray(pixels)), 8) == 200).all())


@pytest.mark.parametrize(
    ("image", "grey"),
    [
        (Image.new("1", (8, 8), 1), 255),
        (Image.new("L", (8, 8), 77), 77),
        (Image.new("LA", (8, 8), (77, 255)), 77),
        (Image.new("I;16", (8, 8), 77 * 257 + 128), 77),
        (Image.new("I;16", (8, 8), 77 * 257 + 129), 78),
        (Image.new("I;16", (8, 8), 65535), 255),
        (Image.new("RGB", (8, 8), (77, 77, 77)), 77),
    ],
    ids=lambda value: str(value.mode) if isinstance(value, Image.Image) else str(value),
)
def test_grey_of_every_mode_becomes_that_grey_in_one_channel_and_in_three(image: Image.Image, grey: int) -> None:
    for channels in (1, 3):
        decoded = decode(file(image), 8, channels)
        assert decoded.shape == (channels, 8, 8)
        assert bool((decoded == grey).all())


def test_sixteen_bits_in_a_pgm_are_rounded_to_eight() -> None:
    data = b"P5 2 2 65535\n" + np.array([0, 257, 65535, 30000], dtype=">u2").tobytes()
    # 30000 / 257 = 116.73
    assert decode(data, 2, channels=1).flatten().tolist() == [0, 1, 255, 117]


def test_transparent_pixels_are_laid_over_white() -> None:
    image = Image.new("RGBA", (2, 2))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 255, 51), (10, 20, 30, 255)])
    red, clear, bluish, solid = decode(file(image), 2).permute(1, 2, 0).reshape(4, 3).tolist()
    assert red == [255, 0, 0]
    assert clear == [255, 255, 255]
    assert bluish == [204, 204, 255]  # a fifth of blue over white
    assert solid == [10, 20, 30]


def test_a_palette_gives_its_colours_and_its_transparent_entry_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 30, 0, 90, 0])
    image.putdata([0, 1])
    image = image.resize((2, 2), Image.Resampling.NEAREST)
    assert decode(file(image), 2)[:, 0].T.tolist() == [[200, 10, 30], [0, 90, 0]]
    assert decode(file(image, "GIF", transparency=1), 2)[:, 0].T.tolist() == [[200, 10, 30], [255, 255, 255]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(file(image, transparency=b"\xff\x00"), 2)[:, 0, 1].tolist() == [255, 255, 255]


def test_cmyk_becomes_rgb() -> None:
    decoded = decode(file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), 8)
    assert decoded[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: x[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda x: np.rot90(x, 1)),
    ],
)
def test_a_photograph_is_turned_the_way_exif_says(orientation: int, turn: object) -> None:
    assert callable(turn)
    pixels = ramp()
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(file(Image.fromarray(pixels), exif=exif), 16)
    np.testing.assert_array_equal(decoded.permute(1, 2, 0).numpy(), turn(pixels))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "PNG"])
def test_every_format_is_read(photographs: list[Image.Image], kind: str) -> None:
    image = photographs[3].resize((64, 64))
    expected = np.asarray(image).astype(float)
    difference = decode(file(image, kind), 64).permute(1, 2, 0).numpy() - expected
    assert np.abs(difference).mean() < 12
    if kind in ("BMP", "TIFF", "PPM", "PNG"):
        assert np.abs(difference).max() == 0


def test_bytes_that_are_no_image_are_refused_with_a_reason(encoded: list[bytes]) -> None:
    with pytest.raises(ValueError, match="not an image of a known format"):
        decode(b"hello", 8)
    with pytest.raises(ValueError, match="not an image of a known format"):
        decode(b"", 8)
    with pytest.raises(ValueError, match="truncated"):
        decode(encoded[0][:3000], 8)
    with pytest.raises(ValueError, match="floating point"):
        decode(file(Image.new("F", (8, 8), 0.5), "TIFF"), 8)
    with pytest.raises(ValueError, match="do not fit 16 bits"):
        decode(file(Image.new("I", (8, 8), 70000), "TIFF"), 8)


def test_a_png_damaged_anywhere_is_read_or_refused_as_a_value_error() -> None:
    good = file(Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)))
    refused = 0
    for position in range(8, len(good), 7):
        damaged = bytearray(good)
        damaged[position] ^= 0xFF
        try:
            decode(bytes(damaged), 16)
        except ValueError:
            refused += 1
    assert refused > 20
