import io
import resource
import struct
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lit.data.decode import CUT_FROM, decode, in_colour, square
from tests.data.adm import adm_center_crop
from tests.data.files import GREY, GREY_ALPHA, RGB, RGB_ALPHA, png, tiff


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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", sorted(Image.MODES))
def test_every_mode_of_pillow_is_converted_or_refused(mode: str, channels: int) -> None:
    white = {"1": 1, "L": 255, "P": 255, "I": 65535, "F": 1.0, "LA": (255, 255), "La": (255, 255), "PA": (255, 255)}
    colours = {
        "RGB": (255, 255, 255),
        "RGBX": (255, 255, 255, 255),
        "RGBA": (255, 255, 255, 255),
        "RGBa": (255, 255, 255, 255),
        "CMYK": (0, 0, 0, 0),
        "YCbCr": (255, 128, 128),
        "HSV": (0, 0, 255),
        "LAB": (255, 128, 128),
    }
    image = Image.new(mode, (4, 4), {**white, **colours}.get(mode, 65535))  # type: ignore[arg-type]
    if mode in ("P", "PA"):
        image.putpalette([255] * 768)
    if mode == "F":
        with pytest.raises(ValueError, match="floating point"):
            in_colour(image, channels)
        return
    result = in_colour(image, channels)
    assert result.mode == {1: "L", 3: "RGB"}[channels]
    assert np.asarray(result).min() >= 254


VALUES = np.array([0, 1, 128, 129, 255, 256, 257, 385, 386, 32767, 32768, 65406, 65407, 65534, 65535])


def sixteen(channels: int, opaque: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Values of 16 bits, (16, 16, C), and the nearest of 8 bits."""
    values = np.random.default_rng(channels).integers(0, 65536, (16, 16, channels))
    values.reshape(-1)[: len(VALUES)] = VALUES
    if opaque:
        values[..., -1] = 65535
    return values, np.rint(values / 257).astype(np.uint8)


def decoded(data: bytes, channels: int = 3) -> np.ndarray:
    return decode(data, 16, channels).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("colour", [GREY, RGB, GREY_ALPHA, RGB_ALPHA])
def test_sixteen_bits_in_a_png_are_rounded(colour: int) -> None:
    channels = {GREY: 1, RGB: 3, GREY_ALPHA: 2, RGB_ALPHA: 4}[colour]
    values, expected = sixteen(channels, opaque=channels in (2, 4))
    colours = expected[..., : 3 if channels > 2 else 1]
    np.testing.assert_array_equal(decoded(png(values, colour)), np.broadcast_to(colours, (16, 16, 3)))


@pytest.mark.parametrize("transparent", [(257,), (258,)])
def test_one_transparent_grey_of_sixteen_bits_is_white(transparent: tuple[int, ...]) -> None:
    values = np.full((16, 16, 1), 257)
    values[0] = 258
    shown = decoded(png(values, GREY, transparent), 1)
    assert (shown[0] == 255).all() == (transparent == (258,))
    assert (shown[1:] == 255).all() == (transparent == (257,))
    rows = decoded(png(np.broadcast_to(values, (16, 16, 3)), RGB, transparent * 3))
    np.testing.assert_array_equal(rows, np.broadcast_to(shown, (16, 16, 3)))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("extra", [None, 0, 1, 2])
def test_sixteen_bits_in_a_colour_tiff_are_rounded(order: str, compressed: bool, extra: int | None) -> None:
    values, expected = sixteen(3 if extra is None else 4, opaque=extra is not None)
    data = tiff(values, 2, order, extra_samples=extra, compressed=compressed)
    np.testing.assert_array_equal(decoded(data), expected[..., :3])


def test_sixteen_bits_multiplied_by_alpha_are_laid_over_white() -> None:
    alpha = np.full((16, 16, 1), 65535 // 5)
    colours = np.concatenate([alpha, 0 * alpha, alpha // 2], axis=-1)
    expected = np.rint((colours + 65535 - alpha) / 257)
    data = tiff(np.concatenate([colours, alpha], axis=-1), 2, extra_samples=1)
    np.testing.assert_array_equal(decoded(data), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_of_sixteen_bits_in_a_tiff_is_rounded_and_inverted_where_white_is_zero(
    order: str, compressed: bool, white_is_zero: bool
) -> None:
    values, expected = sixteen(1)
    data = tiff(values, 0 if white_is_zero else 1, order, compressed=compressed)
    np.testing.assert_array_equal(decoded(data, 1), 255 - expected if white_is_zero else expected)


def test_grey_of_twelve_bits_reaches_white() -> None:
    # Two pixels in three bytes.
    values = np.tile([[0, 4095]], (16, 8))[..., None]
    data = tiff(values, 1, bits=12, packed=b"\x00\x0f\xff" * 128)
    assert decoded(data, 1)[0, :2, 0].tolist() == [0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_of_sixteen_bits_is_turned_once(orientation: int) -> None:
    values, expected = sixteen(3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    eight = file(Image.fromarray(expected), exif=exif)
    np.testing.assert_array_equal(decoded(tiff(values, 2, orientation=orientation)), decoded(eight))


def test_sixteen_bits_in_a_ppm_are_rounded() -> None:
    values, expected = sixteen(3)
    np.testing.assert_array_equal(decoded(b"P6 16 16 65535\n" + values.astype(">u2").tobytes()), expected)


def test_sixteen_bits_take_little_more_memory_than_their_file_says() -> None:
    """By numpy: 3 bytes a pixel for either half, 6 for values, 3 for the result and for its copy; no 12 anywhere."""
    data = png(np.full((2000, 1000, 3), 257), RGB)
    tracemalloc.start()
    try:
        assert decode(data, 4).tolist() == torch.ones(3, 4, 4).tolist()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2_000_000


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (20_000, 3)])
def test_a_long_image_takes_memory_for_its_result_only(size: tuple[int, int]) -> None:
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 0] = 200
    data = file(Image.fromarray(pixels))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = decode(data, 256)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    assert result.shape == (3, 256, 256)
    assert bool((result[0] == 200).all())


@pytest.mark.parametrize("image_size", [5, 8, 16, 40])
@pytest.mark.parametrize("turned", [False, True])
def test_cutting_a_long_image_first_makes_no_difference_but_rounding(image_size: int, turned: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 9 * CUT_FROM + 5, 3), dtype=np.uint8)
    image = Image.fromarray(noise.swapaxes(0, 1) if turned else noise)
    expected = adm_center_crop(image, image_size).astype(int)
    assert np.abs(np.asarray(square(image, image_size)).astype(int) - expected).max() <= 1


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


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_counts_although_another_exif_tag_has_the_wrong_type(order: str) -> None:
    pixels = ramp(16, 16)
    # Resolution unit as text, and an offset to nowhere.
    tags = [
        (0x0112, 3, 1, struct.pack(f"{order}HH", 6, 0)),
        (0x0128, 2, 4, b"abc\0"),
        (0x011A, 4, 1, b"\xff\xff\xff\xff"),
    ]
    body = b"".join(struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in sorted(tags))
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    exif = b"Exif\0\0" + header + body + b"\0\0\0\0"
    turned = decode(file(Image.fromarray(pixels), "PNG", exif=exif), 16).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(turned, np.rot90(pixels, -1))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(file(Image.fromarray(ramp()), exif=exif), 16)
    np.testing.assert_array_equal(decoded.permute(1, 2, 0).numpy(), ramp())


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "PNG", "AVIF", "JPEG2000", "TGA"])
def test_every_format_is_read(photographs: list[Image.Image], kind: str) -> None:
    image = photographs[3].resize((64, 64))
    expected = np.asarray(image).astype(float)
    difference = decode(file(image, kind), 64).permute(1, 2, 0).numpy() - expected
    assert np.abs(difference).mean() < 12
    if kind in ("BMP", "TIFF", "PPM", "PNG", "JPEG2000", "TGA"):
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
