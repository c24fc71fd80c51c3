"""One class of a folder of classes is good, and the others are anomalies without masks."""

from pathlib import Path

import pytest
from PIL import Image

from diffusion_lit.data import ImageData, OneClass
from diffusion_lit.data.mvtec import DefectImages


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("test", 4)):
        for number, name in enumerate(("cat", "dog", "eel")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 12), (60 * number, 0, i)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def judged(root: Path, **kwargs: int) -> DefectImages:
    images = OneClass(str(root), "dog", 8, **kwargs).load("test")
    assert isinstance(images, DefectImages)
    return images


def test_training_sees_the_good_class_alone(classes: Path) -> None:
    data = ImageData(OneClass(str(classes), "dog", 8), batch_size=1)
    assert data.parts() == ["train", "test"]
    assert len(data.dataset("train")) == 3
    assert {data.some([i])["image"][0, 0, 0, 0].item() for i in range(3)} == {60}


def test_every_other_class_is_an_anomaly_without_masks(classes: Path) -> None:
    images = judged(classes)
    assert images.defects == ["cat"] * 4 + ["good"] * 4 + ["eel"] * 4
    assert images.names[4] == "dog/0.png"
    assert images.masked.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert [images.read(i)["gt_label"].item() for i in (0, 4, 8)] == [1, 0, 1]  # type: ignore[typeddict-item]


def test_of_each_class_the_first_images_are_judged(classes: Path) -> None:
    images = judged(classes, per_class=2)
    assert images.names == [f"{name}/{i}.png" for name in ("cat", "dog", "eel") for i in (0, 1)]
    assert images.fingerprint() != judged(classes).fingerprint()


def test_what_there_is_no_folder_of_is_refused(classes: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train has no class 'horse', but cat, dog, eel; set --data.source"):
        OneClass(str(classes), "horse", 8).load("train")
    with pytest.raises(FileNotFoundError, match=r"test is not a folder; set --data.source.root"):
        OneClass(str(classes / "train"), "dog", 8).load("test")
    (classes / "test" / "eel").rename(classes / "test" / "good")
    with pytest.raises(ValueError, match="test/good: a class of anomalies cannot be called good; rename it"):
        judged(classes)
    for path in (classes / "train" / "dog").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no good images: .*dog holds none"):
        OneClass(str(classes), "dog", 8).load("train")


@pytest.mark.parametrize("settings", [{"image_size": 0}, {"channels": 2}, {"per_class": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}={next(iter(settings.values()))}"):
        OneClass(**{"root": "x", "good": "dog", "image_size": 8, **settings})  # type: ignore[arg-type]
