"""What docs/howto.md prints works as printed, with fewer steps and smaller networks."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lit.checkpoint import load_model, read_checkpoint
from diffusion_lit.loggers import METRICS, read_curves
from tests.test_extending import QUIET, blocks, commands, finish, in_place, save_files
from tests.tiny import last

REPOSITORY = Path(__file__).parent.parent
SECTIONS = {text.partition("\n")[0]: text for text in (REPOSITORY / "docs" / "howto.md").read_text().split("\n## ")[1:]}
SHORT = {
    "max_steps=300": "max_steps=3",
    "max_steps: 300": "max_steps: 6",
    "max_epochs=30": "max_epochs=1",
    "interval: 100": "interval: 2",
    "steps: 100": "steps: 2",
    "num_images: 512": "num_images: 8, at_start: false",
    "width=64, multipliers=[1, 2, 2]": "width=32, multipliers=[1]",
    "attention=[16]": "attention=[]",
    "max_steps 300": "max_steps 2 --evaluation null --sample_grid null --trainer.logger Curves "
    "--trainer.log_every_n_steps 1 --trainer.accelerator cpu",
}
SMALL = [
    *("--model.network.width", "32", "--model.network.multipliers", "[1]", "--model.network.num_blocks", "1"),
    *("--model.network.attention", "[]", "--data.batch_size", "4", "--data.num_workers", "0"),
    *("--evaluation", "null", "--sample_grid", "null", "--trainer.max_steps", "4", "--trainer.logger", "Curves"),
]
DRAWN = ["--model.sampler.steps", "3"]


def short(text: str) -> str:
    for long, brief in SHORT.items():
        text = text.replace(long, brief)
    return text


def run_python(
    section: str, place: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[dict[str, object]], None]
) -> None:
    """Runs the Python of a section, then looks at its names."""
    [code] = [content for language, content in blocks(short(SECTIONS[section])) if language == "python"]
    (place / "example.py").write_text(code)
    finish(lambda: check(runpy.run_path("example.py")), place, monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with pictures of two classes, and the model of the first section."""
    place = tmp_path_factory.mktemp("howto")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for i in range(6):
            path = place / "pictures" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (80, 72, 3), dtype=np.uint8)).save(path)

    def check(names: dict[str, object]) -> None:
        images, same = names["images"], names["same"]
        assert isinstance(images, torch.Tensor)
        assert isinstance(same, torch.Tensor)
        assert images.shape == (16, 1, 8, 8)
        torch.testing.assert_close(images.cpu(), same)

    with pytest.MonkeyPatch.context() as monkeypatch:
        run_python("Train, sample and load in Python", place, monkeypatch, check)
    return place


def test_every_section_is_run() -> None:
    assert list(SECTIONS) == [
        "Train, sample and load in Python",
        "Train on a LightningDataModule of your own",
        "Train by class on a folder of pictures",
        "Keep a share of a folder for validation",
        "See images come about",
        "Change a picture: SDEdit",
        "Stop early, and keep what scores best",
        "Try several settings",
        "See how far a run is",
    ]


def test_the_command_line_takes_the_model_that_python_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [words] = commands(SECTIONS["Train, sample and load in Python"])
    finish(in_place([*words, *QUIET, *DRAWN]), place, monkeypatch)
    assert len(list((place / "runs" / "mine" / "predictions" / "last_seed_0").iterdir())) == 4


@pytest.mark.further
def test_a_plain_data_module_crops_at_random(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(names: dict[str, object]) -> None:
        assert load_model("pictures.ckpt").image_shape == (3, 64, 64)

    run_python("Train on a LightningDataModule of your own", place, monkeypatch, check)
    [words] = commands(SECTIONS["Train on a LightningDataModule of your own"])
    finish(in_place([*words, *QUIET, *DRAWN]), place, monkeypatch)
    assert len(list((place / "drawn").iterdir())) == 2


@pytest.mark.further
def test_a_folder_is_trained_on_by_class(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, labels, by_class = commands(SECTIONS["Train by class on a folder of pictures"])
    finish(in_place([*fit, *QUIET, *SMALL]), place, monkeypatch)
    for words in (labels, by_class):
        finish(in_place([*words, *QUIET, *DRAWN]), place, monkeypatch)
    run = place / "runs" / "folder_classes"
    assert read_checkpoint(last(run))["class_names"] == ["cat", "dog"]
    for folder, expected in ((run / "predictions" / "last_seed_0", "010"), (place / "by_class", "0011")):
        shown = ""
        for path in sorted(folder.iterdir()):
            with Image.open(path) as image:
                shown += image.info["label"]
        assert shown == expected


@pytest.mark.further
def test_a_share_of_a_folder_is_validated_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [words] = commands(SECTIONS["Keep a share of a folder for validation"])
    finish(in_place([*words, *QUIET, *SMALL]), place, monkeypatch)
    assert len(read_curves(place / "runs" / "folder")["val/loss"]) == 2
    output = (place / "output.txt").read_text()
    assert "(train): 9 images" in output
    assert "(val): 3 images" in output


def test_images_are_seen_as_they_come_about(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [words] = commands(SECTIONS["See images come about"])
    finish(in_place([*words, *QUIET, *DRAWN]), place, monkeypatch)
    with Image.open(place / "animated_animation.png") as picture, Image.open(place / "animated_grid.png") as grid:
        assert picture.format == "PNG"
        assert picture.n_frames > 1  # type: ignore[attr-defined]
        picture.seek(picture.n_frames - 1)  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(picture.convert("L")), np.asarray(grid))


def test_a_picture_is_changed_from_part_way(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(names: dict[str, object]) -> None:
        edited, strokes = names["edited"], names["strokes"]
        assert isinstance(edited, torch.Tensor)
        assert isinstance(strokes, torch.Tensor)
        assert edited.shape == strokes.shape
        assert not torch.equal(edited, strokes)

    run_python("Change a picture: SDEdit", place, monkeypatch, check)
    assert (place / "edited.png").is_file()


@pytest.mark.further
def test_lightning_s_callbacks_see_the_scores(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = SECTIONS["Stop early, and keep what scores best"]
    save_files(short(section), place)
    [words] = commands(section)
    finish(in_place([*words, *QUIET, "--trainer.logger", "Curves"]), place, monkeypatch)
    assert len(list((place / "runs" / "early" / "top").glob("*.ckpt"))) == 2
    assert len(read_curves(place / "runs" / "early")["frechet/pixels"]) >= 3


@pytest.mark.slow
def test_a_loop_tries_several_settings(place: Path) -> None:
    [loop] = [content for language, content in blocks(short(SECTIONS["Try several settings"])) if language == "bash"]
    (place / "bin").mkdir()
    (place / "bin" / "python").symlink_to(sys.executable)
    paths = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]),
    }
    done = subprocess.run(
        ["bash", "-e", "-c", loop], cwd=place, env={**os.environ, **paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rates = [read_curves(place / "runs" / name)["train/learning_rate"][0][1] for name in ("lr_1e-3", "lr_2e-3")]
    assert rates[1] == pytest.approx(2 * rates[0])
    assert (place / "runs" / "lr_2e-3" / "loss.png").is_file()
    assert (place / "runs" / "lr_1e-3" / METRICS).is_file()


def test_a_run_without_a_bar_says_how_far_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [words] = commands(short(SECTIONS["See how far a run is"]))
    finish(in_place([*words, "--trainer.devices", "1"]), place, monkeypatch)
    assert "step 2 of 2: loss" in (place / "output.txt").read_text()
