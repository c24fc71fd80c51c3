"""The `reference` tool: statistics of a recipe's images, which scores here and other programs read."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from diffusion_lit import cli
from diffusion_lit.metrics import Pixels, Reference
from diffusion_lit.tools import reference

PIXELS = ["--extractor", "Pixels", "--extractor.size", "2"]


@pytest.fixture
def images(tmp_path: Path) -> np.ndarray:
    digits: np.ndarray = np.rint(load_digits().images[:9] * (255 / 16)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    for number, digit in enumerate(digits):
        Image.fromarray(digit).save(tmp_path / "images" / f"{number}.png")
    return digits


def test_statistics_are_mean_and_covariance_of_all_images_once(images: np.ndarray, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "trainer: {max_steps: 3}\ndata: {class_path: ImageData, init_args: {flip: true, num_workers: 0, source: "
        f"{{class_path: Folder, init_args: {{root: {tmp_path / 'images'}, image_size: 8, channels: 1}}}}}}}}\n"
    )
    out = tmp_path / "out" / "statistics.npz"
    cli.main(["reference", "-c", str(recipe), "--out", str(out), "--batch_size", "4", *PIXELS])
    # As other programs read it: nothing but numpy.
    with np.load(out) as file:
        mu, sigma = file["mu"], file["sigma"]
        assert int(file["count"]) == 9
    means = images.reshape(9, 2, 4, 2, 4).mean((2, 4)).reshape(9, 4) / 255
    features = np.tile(means, 3)
    np.testing.assert_allclose(mu, features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(sigma, np.cov(features, rowvar=False), rtol=1e-5, atol=1e-9)
    assert Reference.load(out, Pixels(2)).count == 9
    with pytest.raises(ValueError, match="describes 12 features, but pixels has 48"):
        Reference.load(out, Pixels(4))


def test_what_cannot_be_computed_is_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.npz"
    there.touch()
    new = str(tmp_path / "new.npz")
    for args, message in (
        (["--out", str(there), "--data.source", "Digits"], "there.npz exists already"),
        (["--out", new], "there are no data; give a recipe by -c"),
        (
            ["--out", new, "--data.source", "Folder", "--data.source.root", "nowhere", "--data.source.image_size", "8"],
            "nowhere is not a folder",
        ),
        (
            ["--out", new, "--data.source", "Digits", "--extractor", "Pixels", "--extractor.size", "0"],
            "size=0 must be at least 1",
        ),
        (
            ["--out", new, "--data.source", "Digits", "--extractor.weights", "nowhere.pth"],
            "nowhere.pth: no such file; pass torch-fidelity's weights-inception-2015-12-05-6726825d.pth by "
            "--extractor.weights PATH, or do without by --extractor Pixels",
        ),
    ):
        with pytest.raises(SystemExit):
            cli.main(["reference", *args])
        error = capfd.readouterr().err
        assert "Traceback" not in error
        assert message in error.splitlines()[-1]
    assert not Path(new).exists()


def test_what_a_killed_run_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    part = tmp_path / ".digits.npz.0.part"
    part.touch()
    cli.main(["reference", "--data.source", "Digits", "--out", str(tmp_path / "digits.npz"), *PIXELS])
    assert [path.name for path in tmp_path.iterdir()] == ["digits.npz"]


def test_an_evaluation_takes_the_file(tmp_path: Path) -> None:
    out = tmp_path / "digits.npz"
    cli.main(["reference", "--data.source", "Digits", "--out", str(out), *PIXELS])
    reference = Reference.load(out, Pixels(2))
    assert reference.name == "Digits train"
    assert reference.mu.dtype == torch.float64


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-c", "broken.yaml"], "broken.yaml is not YAML"),
        (["-c", "text.yaml"], "text.yaml is no configuration; give a recipe"),
        (["-c", "text.yaml", "--batch_size", "0"], "--batch_size=0 must be at least 1"),
        (["-c", "text.yaml", "--device", "cuda:7"], "--device cuda:7: this machine has"),
    ],
)
def test_plain_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("a: [")
    Path("text.yaml").write_text("just words")
    with pytest.raises(ValueError, match=re.escape(said)):
        reference.main([*args, "--out", "statistics.npz"])
