"""Low resolution, holes and maps as functions of (seed, position), and mirrored with their images."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from diffusion_lit.data import (
    Area,
    Bicubic,
    BSRLight,
    CentreHole,
    CorruptImage,
    Degradation,
    Digits,
    Folder,
    Holes,
    ImageData,
    LaMaMasks,
    LowResolution,
    MaskFiles,
    WithMaps,
)
from diffusion_lit.data.decode import DECODING_ERRORS, decode
from diffusion_lit.data.degradation import blurred, decimated, gaussian_kernel, noisy, random_covariance, resized
from diffusion_lit.data.derived import generator_of, read_map
from diffusion_lit.data.masks import read_mask
from diffusion_lit.data.pictures import Size, read_images, read_maps, read_masks


def picture(channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    """A smooth picture with detail."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)[0]
    return (255 * smooth).round().to(torch.uint8)


def training_batches(data: ImageData, count: int) -> list[dict[str, Tensor]]:
    return [cast(dict[str, Tensor], batch) for batch in islice(iter(data.train_dataloader()), count)]


# Degradations


@pytest.mark.parametrize("degradation", [Area(), Bicubic(), BSRLight()])
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_low_resolution_images_have_the_size_and_about_the_colours(
    degradation: Degradation, factor: int, channels: int
) -> None:
    image = picture(channels)
    low = degradation(image, factor, generator_of(0, 0))
    assert low.dtype == torch.uint8
    assert low.shape == (channels, 32 // factor, 32 // factor)
    assert low.double().mean() == pytest.approx(image.double().mean(), abs=6)


def test_area_is_the_mean_of_squares() -> None:
    image = torch.tensor([[[0, 100, 9, 9], [100, 200, 9, 10]]], dtype=torch.uint8)
    assert Area()(image, 2, generator_of(0, 0)).tolist() == [[[100, 9]]]


def test_bicubic_is_pillow_s_on_a_colour_image() -> None:
    image = picture()
    whole = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.BICUBIC)
    assert torch.equal(Bicubic()(image, 4, generator_of(0, 0)), torch.from_numpy(np.array(whole)).permute(2, 0, 1))


def test_the_light_degradation_is_one_of_its_image_and_draw_alone() -> None:
    image = picture()
    first = BSRLight()(image, 4, generator_of(3, 7))
    assert torch.equal(first, BSRLight()(image, 4, generator_of(3, 7)))
    assert not torch.equal(first, BSRLight()(image, 4, generator_of(3, 8)))
    assert not torch.equal(first, BSRLight()(image, 4, generator_of(4, 7)))


def test_the_light_degradation_differs_from_a_clean_reduction_by_a_few_levels() -> None:
    """Noise of 1 to 2 levels and JPEG of quality 80 to 95 leave smooth pictures recognisable; other than none."""
    image, errors = picture(size=256), []
    clean = Area()(image, 4, generator_of(0, 0)).double()
    for draw in range(40):
        errors.append(float((BSRLight()(image, 4, generator_of(0, draw)).double() - clean).abs().mean()))
    assert 0.5 < np.median(errors) < 8
    assert max(errors) < 16


def test_a_gaussian_kernel_has_the_covariance_asked_for() -> None:
    covariance = np.array([[3.0, 1.0], [1.0, 2.0]])
    kernel = gaussian_kernel(31, covariance)
    offset = np.arange(31) - 15
    x, y = np.meshgrid(offset, offset)
    assert kernel.sum() == pytest.approx(1)
    assert (kernel * x * x).sum() == pytest.approx(3, rel=1e-4)
    assert (kernel * x * y).sum() == pytest.approx(1, rel=1e-4)
    assert (kernel * y * y).sum() == pytest.approx(2, rel=1e-4)
    shifted = gaussian_kernel(31, covariance, 1.5)
    assert (shifted * x).sum() == pytest.approx(1.5, rel=1e-4)


@pytest.mark.parametrize("factor", [2, 4])
def test_decimation_keeps_the_middle_of_each_square(factor: int) -> None:
    """A Gaussian leaves a plane as it is, and a square's mean is the plane's value in its middle."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    plane = (0.3 * rows + 0.7 * columns)[None].double()
    inner = slice(8, -8)
    found, expected = decimated(plane, factor, 1.1), torch.nn.functional.avg_pool2d(plane, factor)
    torch.testing.assert_close(found[:, inner, inner], expected[:, inner, inner], atol=1e-5, rtol=0)


def test_noise_that_channels_share_is_correlated_positively() -> None:
    """The published code takes the absolute values of U' D U, which stay positive semidefinite for 3 channels."""
    for seed in range(50):
        covariance = random_covariance(3, np.random.default_rng(seed))
        assert (covariance >= 0).all()
        assert np.linalg.eigvalsh(covariance).min() > -1e-12
        assert np.linalg.eigvalsh(covariance).max() <= 1.8
    found = []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        noise = noisy(torch.full((3, 40, 40), 0.5, dtype=torch.float64), generator).flatten(1) - 0.5
        found.append(np.corrcoef(noise.numpy()))
    shared = [c for c in found if 0.1 < c[0, 1] < 0.999]
    assert len(shared) > 20
    assert np.min(found) > -0.12


def test_blurring_keeps_a_flat_image_and_resizing_to_the_same_size_changes_nothing() -> None:
    flat = torch.full((3, 9, 9), 0.25, dtype=torch.float64)
    torch.testing.assert_close(blurred(flat, gaussian_kernel(7, np.eye(2))), flat)
    x = torch.rand(1, 6, 6)
    assert resized(x, (6, 6), "bicubic") is x


# Masks


def test_masks_of_strokes_and_boxes_have_holes_of_every_size() -> None:
    for size in (8, 64, 256):
        shares = []
        for index in range(200):
            mask = LaMaMasks()(index, size, generator_of(index, 0))
            assert mask.shape == (1, size, size)
            assert int(mask.max()) <= 1
            shares.append(1 - float(mask.double().mean()))
        assert min(shares) > 0
        assert 0.1 < np.mean(shares) < 0.5
        assert np.std(shares) > 0.05


def test_boxes_keep_their_distance_from_the_border_at_the_published_size() -> None:
    """About half of the masks are boxes, which never touch the border."""
    masks = [LaMaMasks()(0, 256, generator_of(i, 0)) for i in range(100)]
    inside = [mask for mask in masks if bool(mask[:, :10].all() & mask[:, :, :10].all())]
    assert 30 < len(inside) < 75


def test_a_centre_hole_is_in_the_centre() -> None:
    mask = CentreHole(0.5)(0, 8, generator_of(0, 0))
    assert mask.sum() == 64 - 16
    assert torch.equal(mask, mask.flip(1))
    assert torch.equal(mask, mask.flip(2))
    with pytest.raises(ValueError, match=r"masks\.share=0 must lie in \(0, 1\]"):
        CentreHole(0)


def save(path: Path, array: Any, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, dtype=np.uint8))
    (image if mode is None else image.convert(mode)).save(path)
    return path


def test_white_is_a_hole_in_files_and_image_i_has_file_i_modulo_their_number(tmp_path: Path) -> None:
    for number in range(2):
        array = np.zeros((4, 4))
        array[number] = 255
        save(tmp_path / f"{number}.png", array)
    masks = MaskFiles(str(tmp_path))
    for index in range(5):
        mask = masks(index, 4, generator_of(index, 9))
        assert mask[0, :, 0].tolist() == [int(row != index % 2) for row in range(4)]


def test_white_may_be_what_is_known_instead(tmp_path: Path) -> None:
    """The border of the two colours is between 127 and 128, as where values above or at 0.5 are white."""
    save(tmp_path / "m.png", [[0, 127], [128, 255]])
    assert MaskFiles(str(tmp_path))(0, 2, generator_of(0, 0)).tolist() == [[[1, 1], [0, 0]]]
    assert MaskFiles(str(tmp_path), "known")(0, 2, generator_of(0, 0)).tolist() == [[[0, 0], [1, 1]]]
    save(tmp_path / "m.png", np.full((2, 2), 255))
    with pytest.raises(ValueError, match="has no hole: nothing in it is black; black is what is to be filled"):
        MaskFiles(str(tmp_path), "known")(0, 2, generator_of(0, 0))
    with pytest.raises(ValueError, match=r"source\.masks\.white='black' must be 'hole' or 'known'"):
        MaskFiles(str(tmp_path), "black")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 5), 255), r"mask .* has 5 x 4 pixels, and the images 4 x 4; resize it"),
        (np.zeros((4, 4)), r"mask .* has no hole: nothing in it is white"),
    ],
)
def test_masks_of_another_size_or_without_holes_are_refused(tmp_path: Path, array: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskFiles(str(save(tmp_path / "m.png", array).parent))(0, 4, generator_of(0, 0))


def test_files_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read as a mask"):
        read_mask(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"no images there; set --data\.source\.masks\.folder"):
        MaskFiles(str(tmp_path / "none"))(0, 4, generator_of(0, 0))


# In batches


def test_entries_are_of_the_images_and_are_mirrored_with_them() -> None:
    data = ImageData(LowResolution(Holes(Digits(), LaMaMasks()), 2, Area()), batch_size=64, flip=True)
    for batch in training_batches(data, 2):
        stored, flip = dict(batch), batch["flip"]
        ready = cast(dict[str, Tensor], data.on_after_batch_transfer(cast(Any, batch), 0))
        low = torch.nn.functional.avg_pool2d(stored["image"].double(), 2).round()
        assert torch.equal(stored["low_res"].double(), low)
        assert 10 < int(flip.sum()) < 54
        for name in ("image", "low_res", "mask"):
            turned = torch.where(flip.view(-1, 1, 1, 1), stored[name].flip(-1), stored[name])
            expected = turned.float() if name == "mask" else turned.float() / 127.5 - 1
            torch.testing.assert_close(ready[name], expected)


def test_holes_are_fresh_in_every_epoch_and_the_same_in_every_evaluation() -> None:
    data = ImageData(Holes(Digits(held_out=100)), batch_size=1697)
    first, second = training_batches(data, 2)
    by_image = []
    for batch, step in ((first, 1), (second, 2)):
        by_image.append(dict(zip(data.images_of_step(step), batch["mask"], strict=True)))
    same = sum(torch.equal(by_image[0][i], by_image[1][i]) for i in by_image[0])
    assert same < 170
    [a] = list(data.val_dataloader())
    assert torch.equal(a["mask"], cast(dict[str, Tensor], data.some(range(100), "val"))["mask"])
    assert torch.equal(a["mask"][7], torch.as_tensor(data.dataset("val").read(7)["mask"]))


@pytest.mark.parametrize("start", [0, 3])
def test_two_processes_see_what_one_does_and_a_late_start_the_tail(start: int) -> None:
    from diffusion_lit.data.batches import Batches
    from diffusion_lit.data.stream import TrainingStream

    images = Holes(Digits()).load("train")
    assert images is not None
    batches = Batches(images, training=True)

    def masks(rank: int, world_size: int, first: int, count: int) -> list[Tensor]:
        stream = TrainingStream(len(images), 64 // world_size, rank, world_size, first, seed=5)
        return [batches.__getitems__(keys)["mask"] for keys in islice(iter(stream), count)]

    alone = masks(0, 1, 0, 5)[start:]
    halves = [masks(rank, 2, start, 5 - start) for rank in (0, 1)]
    assert all(torch.equal(whole, torch.cat(parts)) for whole, *parts in zip(alone, *halves, strict=True))


def test_workers_read_the_same_batches() -> None:
    source = LowResolution(Digits(), 2, BSRLight())
    here, there = (ImageData(source, batch_size=8, num_workers=n) for n in (0, 1))
    for a, b in zip(training_batches(here, 2), training_batches(there, 2), strict=True):
        assert torch.equal(a["low_res"], b["low_res"])


def test_a_factor_that_does_not_divide_and_another_degradation_are_noticed() -> None:
    with pytest.raises(ValueError, match=r"source\.factor=3 does not divide images of 8 pixels"):
        LowResolution(Digits(), 3)
    prints = [
        ImageData(source).fingerprint()
        for source in (
            Digits(),
            LowResolution(Digits(), 2),
            LowResolution(Digits(), 4),
            LowResolution(Digits(), 2, Area()),
        )
    ]
    assert len(set(prints)) == 4


def test_digits_held_out_are_not_trained_on() -> None:
    data = ImageData(Digits(held_out=300))
    whole = ImageData(Digits()).dataset("train")
    train, val, test = (data.dataset(split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (1497, 300, 300)
    pixels = torch.stack([torch.as_tensor(split.read(i)["image"]) for split in (train, val) for i in range(len(split))])
    assert torch.equal(pixels, torch.stack([whole.read(i)["image"] for i in range(1797)]))
    with pytest.raises(ValueError, match=r"held_out=1797 must lie in 0 \.\. 1796"):
        Digits(1797)


# Maps


def maps(root: Path, size: tuple[int, int] = (12, 8), classes: int = 3) -> WithMaps:
    """Pictures whose brightness says the class, and their maps; in two folders, which are classes."""
    generator = np.random.default_rng(0)
    for number in range(4):
        values = generator.integers(0, classes, (size[1] // 4, size[0] // 4)).repeat(4, 0).repeat(4, 1)
        save(root / "images" / "ab"[number % 2] / f"{number}.png", np.stack([values * 100] * 3, -1))
        save(root / "maps" / "ab"[number % 2] / f"{number}.png", values, "L" if number else "P")
    return WithMaps(Folder(str(root / "images"), 8), str(root / "maps"), classes)


def test_maps_are_cropped_as_their_images_and_follow_them(tmp_path: Path) -> None:
    data = ImageData(maps(tmp_path), batch_size=4, flip=True)
    [batch] = training_batches(data, 1)
    assert batch["map"].shape == (4, 1, 8, 8)
    assert torch.equal(batch["image"][:, :1], batch["map"] * 100)
    ready = cast(dict[str, Tensor], data.on_after_batch_transfer(cast(Any, batch), 0))
    torch.testing.assert_close(ready["image"][:, :1], ready["map"].float() * 100 / 127.5 - 1)
    assert "label" in batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "cannot be read as a map"),
        (lambda path: save(path, np.full((8, 12), 3)), "has class 3, and there are 3"),
        (lambda path: save(path, np.zeros((8, 8))), "has 8 x 8 pixels, and its image 12 x 8"),
        (lambda path: save(path, np.zeros((8, 12, 3))), "has mode RGB; save the classes as a palette or grey PNG"),
    ],
)
def test_bad_maps_are_named_and_left_out_where_asked(tmp_path: Path, change: Any, message: str) -> None:
    source = maps(tmp_path)
    change(tmp_path / "maps" / "b" / "3.png")
    with pytest.raises(CorruptImage, match=message):
        ImageData(source).some([3])
    data = ImageData(source, on_corrupt="skip")
    with pytest.warns(UserWarning, match=message):
        assert len(data.some(range(4))["image"]) == 3


def test_maps_need_a_folder_of_images_and_one_of_maps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder=.* is no folder of maps; set --data\.source\.folder"):
        ImageData(WithMaps(maps(tmp_path).source, str(tmp_path / "none"), 3)).dataset("train")
    with pytest.raises(ValueError, match="WithMaps needs a Folder of images, not InMemoryImages"):
        ImageData(WithMaps(Digits(), str(tmp_path), 3)).dataset("train")
    with pytest.raises(ValueError, match="num_classes=257 are more than the 256"):
        WithMaps(Digits(), "maps", 257)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_masks_are_read_as_images_are(tmp_path: Path) -> None:
    """A hole in the left half, in every form that it can have."""
    grey = np.full((4, 6), 40, np.uint8)
    grey[:, :3] = 200
    expected = (grey < 128).astype(np.uint8)
    plain = Image.fromarray(grey)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    colour = Image.merge("RGB", [plain] * 3)
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    turned = Image.Exif()
    turned[0x0112] = 6
    forms = {
        "grey.png": plain,
        "wide.png": wide,
        "wide.tif": wide,
        "colour.png": colour,
        "lab.tif": lab.apply(colour),
        "palette.png": plain.convert("P"),
        "bits.png": plain.convert("1", dither=Image.Dither.NONE),
        "clear.png": Image.merge("RGBA", [Image.new("L", (6, 4))] * 3 + [Image.fromarray(255 * expected)]),
    }
    for name, image in forms.items():
        assert read_mask(saved(tmp_path / name, image))[0].tolist() == expected.tolist(), name
    path = saved(tmp_path / "turned.png", plain.rotate(90, expand=True), exif=turned)
    assert read_mask(path)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("extension", ["jpg", "webp", "jp2"])
def test_maps_are_of_no_format_that_changes_values(extension: str, tmp_path: Path) -> None:
    path = saved(tmp_path / f"map.{extension}", Image.new("L", (4, 4), 3))
    with pytest.raises(ValueError, match="in which values change"):
        read_map(path)


def test_what_is_damaged_in_any_way_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.new("L", (4, 4), 255))
    size = Size((1, 4, 4), lambda shape: True)
    reads: dict[str, Callable[[], object]] = {
        "an image": lambda: read_images([path], size),
        "a mask": lambda: read_masks([path], size),
        "a map": lambda: read_maps([path], size),
        "": lambda: decode(path.read_bytes(), 4),
    }
    for error in DECODING_ERRORS:

        def fail(*_: Any, error: type[Exception] = error, **__: Any) -> Any:
            # As Pillow's decoders do: AVIF's raises RuntimeError.
            raise error("on purpose")

        monkeypatch.setattr(Image, "open", fail)
        for what, read in reads.items():
            with pytest.raises(ValueError, match=f"cannot be read as {what}: on purpose" if what else "^on purpose$"):
                read()
