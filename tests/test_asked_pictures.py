"""What `predict` is asked for by pictures: images, masks and maps, and the images of an earlier stage."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from diffusion_lit.conditioner import Labels
from diffusion_lit.conditioners import Joint, LowResolution, MaskedImage, NoiseAugmentation, SemanticMap
from diffusion_lit.diffusion import DDIM
from diffusion_lit.diffusion.projection import PatchMeans
from diffusion_lit.edit import Edit, Edited
from diffusion_lit.methods.image_guidance import ImageGuidance
from diffusion_lit.methods.projected import Projected
from diffusion_lit.methods.repaint import Replacement
from diffusion_lit.methods.sdedit import SDEdit
from diffusion_lit.prediction import asked_conditions, check_size
from tests import tiny
from tests.systems import autoencoder
from tests.test_conditioners import model


def save(path: Path, array: Any, **texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path, pnginfo=info)
    return path


def levels(count: int, size: int = 8) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (size, size)) for _ in range(count)]


def hole(size: int = 8) -> np.ndarray:
    """White on the right."""
    mask = np.zeros((size, size))
    mask[:, size // 2 :] = 255
    return mask


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def predict(place: Path, made: Any, **options: Any) -> list[np.ndarray]:
    tiny.trainer(place).predict(made, out=str(place / "out"), npz=False, **options)
    return [read(path) for path in sorted((place / "out").glob("*.png"))]


@pytest.mark.parametrize("way", ["trained for it", "replacement"])
def test_known_pixels_of_files_are_equal_in_the_png_files(tmp_path: Path, way: str) -> None:
    pictures = levels(3)
    for number, picture in enumerate(pictures):
        save(tmp_path / "images" / f"{number}.png", picture)
    mask = save(tmp_path / "mask.png", hole())
    options = {"image": str(tmp_path / "images"), "mask": str(mask)}
    found = (
        predict(tmp_path, model(MaskedImage(), 2), **options)
        if way == "trained for it"
        else predict(tmp_path, tiny.module(), edit=Replacement(), **options)
    )
    assert len(found) == 3
    for made, picture in zip(found, pictures, strict=True):
        assert np.array_equal(made[:, :4], picture[:, :4])
        assert not np.array_equal(made[:, 4:], picture[:, 4:])


def test_one_image_with_several_masks_and_the_other_way_round(tmp_path: Path) -> None:
    image = save(tmp_path / "image.png", levels(1)[0])
    for number in range(2):
        save(tmp_path / "masks" / f"{number}.png", np.rot90(hole(), number))
    given = asked_conditions(model(MaskedImage(), 2), image=str(image), mask=str(tmp_path / "masks"))
    assert given is not None
    assert len(given) == 2
    found = given(torch.arange(3))
    assert torch.equal(found["image"][0], found["image"][1])
    assert not torch.equal(found["mask"][0], found["mask"][1])
    assert torch.equal(found["mask"][0], found["mask"][2])
    assert found["mask"][0, 0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_cascade_goes_on_from_the_folder_of_the_stage_before_by_number_and_class(tmp_path: Path) -> None:
    """The next stage's image i is made from image i of the folder, of the class that is written into it."""
    base = model(Labels(), 0, 4, num_classes=10)
    predict(tmp_path / "base", base, labels="3,7,1")
    stage = model(Joint([Labels(), LowResolution(2, 1)]), 1, num_classes=10)
    options: dict[str, Any] = {"image": str(tmp_path / "base" / "out"), "seed": 4}
    found = predict(tmp_path / "next", stage, **options)
    assert len(found) == 3
    with Image.open(tmp_path / "next" / "out" / "000001.png") as image:
        assert image.info["label"] == "7"
    given = asked_conditions(stage, image=options["image"])
    assert given is not None
    condition = given(torch.tensor([1]))
    assert condition["label"].tolist() == [7]
    stored = torch.from_numpy(read(tmp_path / "base" / "out" / "000001.png").astype(np.float32)) / 127.5 - 1
    torch.testing.assert_close(condition["low_res"][0, 0], stored)
    alone = stage.sample([1], seed=4, condition=condition)
    expected = ((alone[0, 0] + 1) * 127.5).round().clamp(0, 255)
    assert float((expected - torch.from_numpy(found[1].astype(np.float32))).abs().max()) <= 1


def test_other_classes_than_those_of_the_stage_before_can_be_asked_for(tmp_path: Path) -> None:
    save(tmp_path / "a.png", levels(1, 4)[0], label="3")
    stage = model(Joint([Labels(), LowResolution(2, 1)]), 1, num_classes=10)
    for labels, expected in ((None, [3, 3]), ("5,6", [5, 6])):
        given = asked_conditions(stage, labels=labels, image=str(tmp_path / "a.png"))
        assert given is not None
        assert given(torch.arange(2))["label"].tolist() == expected


def test_maps_of_files_are_what_images_show(tmp_path: Path) -> None:
    array = np.arange(64).reshape(8, 8) % 5
    image = Image.fromarray(array.astype(np.uint8), "L").convert("P")
    image.save(tmp_path / "map.png")
    given = asked_conditions(model(SemanticMap(5, 0), 3), map=str(tmp_path / "map.png"))
    assert given is not None
    assert given(torch.tensor([7]))["map"][0, 0].tolist() == array.tolist()


def test_colours_are_converted_to_those_of_the_model(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.full((8, 8, 3), [10, 20, 30]))
    given = asked_conditions(Edited(tiny.module(), SDEdit()), image=str(tmp_path / "a.png"))
    assert given is not None
    assert given(torch.tensor([0]))["image"].shape == (1, 1, 8, 8)


def wrong(tmp_path: Path) -> dict[str, str]:
    """Files that can be read, and what is wrong with each for one model or another."""
    save(tmp_path / "four.png", np.zeros((4, 4)))
    save(tmp_path / "eight.png", np.zeros((8, 8)))
    save(tmp_path / "wide.png", np.zeros((8, 9)))
    save(tmp_path / "hole.png", hole())
    save(tmp_path / "small.png", hole(4))
    save(tmp_path / "label.png", np.zeros((4, 4)), label="12")
    save(tmp_path / "map.png", np.full((8, 8), 7))
    save(tmp_path / "huge.png", np.zeros((4096, 4097)))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "both" / "a.png", np.zeros((4, 4)))
    save(tmp_path / "both" / "eight.png", np.zeros((8, 8)))
    return {path.stem: str(path) for path in tmp_path.iterdir()}


EDITED = lambda: Edited(tiny.module(), Replacement())  # noqa: E731
MASKED = lambda: model(MaskedImage(), 2)  # noqa: E731
LARGE = lambda: model(LowResolution(1, 1), 1)  # noqa: E731
LOW = lambda: model(Joint([Labels(), LowResolution(2, 1)]), 1, num_classes=10)  # noqa: E731


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (MASKED, {"image": "eight", "mask": "small"}, "mask=.* has 4 x 4 pixels, and the image 8 x 8; resize it"),
        (MASKED, {"image": "eight", "mask": "eight"}, "mask .* has no hole"),
        (MASKED, {"image": "eight"}, "makes images from image and mask; give --mask too"),
        (MASKED, {"mask": "hole"}, "makes images from image and mask; give --image too"),
        (MASKED, {"image": "wide", "mask": "hole"}, "image .* has 9 x 8 pixels, and the model takes 8 x 8; resize it"),
        (MASKED, {"image": "text", "mask": "hole"}, "cannot be read as an image"),
        (MASKED, {"image": "empty", "mask": "hole"}, "has no images in it"),
        (MASKED, {"image": "nowhere", "mask": "hole"}, "image=nowhere: there is no such file or folder"),
        (LARGE, {"image": "wide"}, "image .* has 9 x 8 pixels, and the model takes 8 x 8; resize it"),
        (LOW, {"image": "both"}, "image .*eight.png has 8 x 8 pixels, and the first 4 x 4; make them in several"),
        (EDITED, {"image": "wide", "mask": "hole"}, "image .* has 9 x 8 pixels, and the model takes 8 x 8; resize it"),
        (EDITED, {"image": "four", "mask": "hole"}, "mask=.* has 8 x 8 pixels, and the image 4 x 4; resize it"),
        (LOW, {"image": "label"}, r"labels: 12 must lie in 0 \.\. 9"),
        (LOW, {"labels": "3"}, "makes images from low_res; give --image too"),
        (
            LOW,
            {"image": "four", "mask": "hole"},
            "mask=.*: the model makes images from low_res; leave it out, or choose",
        ),
        (
            LOW,
            {"image": "huge"},
            "image=.* has 4097 x 4096 pixels, of which an image of 8194 x 8192 would be made, and 67,108,864 pixels "
            "are the most; reduce it, or cut it into pieces, such as of 4096 x 4096",
        ),
        (tiny.module, {"image": "eight"}, "image=.*: the model makes images from noise alone; leave it out"),
        (lambda: model(SemanticMap(5, 0), 3), {"map": "wide"}, "map .* has 9 x 8 pixels, and the model takes 8 x 8"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_one_line(
    tmp_path: Path, make: Any, options: dict[str, str], message: str
) -> None:
    files = wrong(tmp_path)
    asked: dict[str, Any] = {name: files.get(value, value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message) as refusal:
        asked_conditions(make(), **asked)
    assert "\n" not in str(refusal.value)


def test_the_largest_image_is_taken() -> None:
    """Of 8192 x 8192 pixels, whatever its sides."""
    stage = model(LowResolution(2, 1), 1)
    for size in ((4096, 4096), (2048, 8192)):
        check_size(stage, "low_res", torch.empty(1, 1, 1, 1).expand(1, 1, *size), "image=a.png")
    with pytest.raises(ValueError, match=r"image=a\.png has 4096 x 4097 pixels"):
        check_size(stage, "low_res", torch.empty(1, 1, 1, 1).expand(1, 1, 4097, 4096), "image=a.png")


def test_a_map_with_other_classes_than_the_model_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="map: class 7, and the model has 5, from 0 to 4"):
        predict(tmp_path, model(SemanticMap(5, 0), 3), map=wrong(tmp_path)["map"])


def test_a_convolutional_network_makes_images_of_other_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the size of the condition; pixels that are known stay so, and each image is that of its number."""
    picture, mask = levels(1, 16)[0][:12], hole(16)[:12]
    image, holes = save(tmp_path / "image.png", picture), save(tmp_path / "mask.png", mask)
    [found] = predict(tmp_path / "holes", model(MaskedImage(), 2), image=str(image), mask=str(holes))
    assert found.shape == (12, 16)
    assert np.array_equal(found[:, :8], picture[:, :8])
    stage = model(LowResolution(2, 1), 1)
    assert predict(tmp_path / "low", stage, image=str(image))[0].shape == (24, 32)
    assert "16 x 12 pixels, where the model was trained with 4 x 4" in caplog.text
    condition = {"low_res": torch.rand(3, 1, 6, 4) - 0.5}
    three = stage.sample(range(3), seed=1, condition=condition)
    one = stage.sample([2], seed=1, condition={"low_res": condition["low_res"][2:]})
    torch.testing.assert_close(one, three[2:], atol=1e-5, rtol=0)


def test_masks_whose_white_is_known_are_those_whose_white_is_a_hole_inverted(tmp_path: Path) -> None:
    image = str(save(tmp_path / "image.png", levels(1)[0]))
    white, black = (save(tmp_path / f"{n}.png", m) for n, m in (("white", hole()), ("black", 255 - hole())))
    made = model(MaskedImage(), 2)
    [found] = predict(tmp_path / "hole", made, image=image, mask=str(white))
    [same] = predict(tmp_path / "known", made, image=image, mask=str(black), mask_white="known")
    assert np.array_equal(found, same)
    with pytest.raises(ValueError, match="mask_white='black' must be 'hole' or 'known'"):
        predict(tmp_path / "none", made, image=image, mask=str(white), mask_white="black")


@pytest.mark.parametrize("edit", [Replacement(2), SDEdit(0.5), Projected(PatchMeans(4)), ImageGuidance(PatchMeans(4))])
def test_editing_makes_images_of_other_sizes_too(tmp_path: Path, edit: Edit) -> None:
    """Of the size of the image that is edited, and each is that of its number at every batch size."""
    pictures = [levels(3, 16)[n][:12] for n in range(3)]
    for number, picture in enumerate(pictures):
        save(tmp_path / "images" / f"{number}.png", picture)
    holes = save(tmp_path / "mask.png", hole(16)[:12])
    options: dict[str, Any] = {
        "image": str(tmp_path / "images"),
        **({"mask": str(holes)} if "mask" in edit.entries else {}),
    }
    made = tiny.module(sampler=DDIM(4, eta=1.0))
    tiny.trainer(tmp_path).predict(made, out=str(tmp_path / "at_once"), edit=edit, **options)
    tiny.trainer(tmp_path).predict(made, out=str(tmp_path / "single"), edit=edit, batch_size=1, **options)
    for number, picture in enumerate(pictures):
        found, single = (read(tmp_path / way / f"00000{number}.png") for way in ("at_once", "single"))
        assert found.shape == (12, 16)
        assert np.abs(found.astype(int) - single).max() <= 1
        if isinstance(edit, Replacement):
            assert np.array_equal(found[:, :8], picture[:, :8])


def test_an_image_whose_patches_do_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    image = save(tmp_path / "image.png", levels(1, 12)[0][:10])
    with pytest.raises(ValueError, match="patches of 4 pixels do not divide images of 12 x 10 pixels") as refusal:
        tiny.trainer(tmp_path).predict(tiny.module(), edit=Projected(PatchMeans(4)), image=str(image))
    assert "\n" not in str(refusal.value)


def test_an_autoencoder_reconstructs_images_of_any_size_that_its_factor_divides(tmp_path: Path) -> None:
    made = autoencoder()
    image = save(tmp_path / "image.png", levels(1, 16)[0][:12])
    assert predict(tmp_path, made, image=str(image))[0].shape == (12, 16)
    odd = save(tmp_path / "odd.png", levels(1, 16)[0][:11])
    with pytest.raises(ValueError, match="has 16 x 11 pixels, and the model takes"):
        asked_conditions(made, image=str(odd))


def test_frames_of_a_cascade_end_in_the_images_that_predict_makes() -> None:
    """The noise of the low-resolution images is that of `sample`; of another size than in training, too."""
    stage = model(Joint([Labels(), LowResolution(2, 1, NoiseAugmentation(level=0.3))]), 2)
    for size in (4, 6):
        condition = {"low_res": torch.rand(2, 1, size, 4) - 0.5}
        frames = stage.trajectory([3, 5], seed=1, condition=condition)
        assert torch.equal(frames[-1], stage.sample([3, 5], seed=1, condition=condition))
