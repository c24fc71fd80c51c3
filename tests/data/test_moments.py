"""Stored moments: what `prepare --first_stage` writes, how batches get it, and what makes it stale."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_lit import cli
from diffusion_lit.codecs import FirstStage
from diffusion_lit.data import Digits, Holes, ImageData, Prepared
from diffusion_lit.data.prepared import Stored
from diffusion_lit.images import from_uint8
from diffusion_lit.tools.prepare import main, prepare, prepare_moments
from tests import tiny
from tests.codecs.first_stages import CODES, latent_model, write


@pytest.fixture(params=[None, CODES], ids=["kl", "vq"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "stage.ckpt", request.param)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    prepare(ImageData(Digits()), tmp_path / "digits.images")
    return tmp_path / "digits.images"


def plain(images: Path) -> ImageData:
    return ImageData(Prepared(str(images), 8, 1))


def with_moments(images: Path, stage: Path, pixels: bool | None = None, **options: Any) -> ImageData:
    path = images.with_suffix(".moments")
    if not path.exists():
        prepare_moments(plain(images), FirstStage(str(stage)), path)
    return ImageData(Prepared(str(images), 8, 1, str(path), pixels), **{"batch_size": 32, **options})


def on_device(data: ImageData, batch: Any) -> Any:
    return data.on_after_batch_transfer(batch, 0)


def assert_close_to_half(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)


def test_what_is_stored_are_the_moments_of_each_image_and_of_its_mirror_image(images: Path, stage: Path) -> None:
    data, codec = with_moments(images, stage), FirstStage(str(stage))
    batch = data.some([3, 500, 1796])
    x = from_uint8(batch["image"])
    assert_close_to_half(batch["moments"][:, 0], codec.moments(x))
    assert_close_to_half(batch["moments"][:, 1], codec.moments(x.flip(-1)))
    # The reason for storing both.
    mirrored = codec.moments(x).flip(-1)
    assert (codec.moments(x.flip(-1)) - mirrored).norm() > 0.05 * mirrored.norm()
    assert torch.equal(data.dataset("train")[3]["moments"], batch["moments"][0])


def test_an_image_that_is_mirrored_gets_the_moments_of_its_mirror_image(images: Path, stage: Path) -> None:
    data, codec = with_moments(images, stage, pixels=True, flip=True), FirstStage(str(stage))
    batch = next(iter(data.train_dataloader()))
    assert 5 < int(batch["flip"].sum()) < 27
    ready = on_device(data, batch)
    assert "flip" not in ready
    assert_close_to_half(ready["moments"], codec.moments(ready["image"]))


def test_validation_batches_and_examples_have_those_of_the_image_itself(images: Path, stage: Path) -> None:
    data, codec = with_moments(images, stage, pixels=True), FirstStage(str(stage))
    found = [on_device(data, next(iter(data.val_dataloader()))), data.examples([1, 2], "val")]
    for batch in found:
        assert batch["moments"].ndim == 4
        assert_close_to_half(batch["moments"], codec.moments(batch["image"]))


@pytest.mark.few(1)
def test_training_from_moments_is_training_from_images_without_the_encoder(
    images: Path, stage: Path, tmp_path: Path
) -> None:
    def run(name: str, data: ImageData) -> tuple[dict[str, torch.Tensor], int]:
        codec = FirstStage(str(stage), num_images=64)
        codec.start(data, torch.device("cpu"))
        calls: list[int] = []
        codec.network.encoder.register_forward_hook(lambda *given: calls.append(1))
        model = latent_model(codec)
        tiny.trainer(tmp_path / name, 3).fit(model, data)
        return dict(model.denoiser.state_dict()), len(calls)

    cached, without = run("cached", with_moments(images, stage, flip=True))
    computed, with_encoder = run("computed", ImageData(Prepared(str(images), 8, 1), batch_size=32, flip=True))
    assert (without, with_encoder) == (0, 3)
    for name, value in computed.items():
        torch.testing.assert_close(cached[name], value, atol=2e-3, rtol=0)


def test_training_from_moments_reads_no_pixels_unless_something_needs_them(
    images: Path, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_moments(images, stage)
    codec = FirstStage(str(stage), num_images=64)
    codec.start(data, torch.device("cpu"))
    read: list[str] = []
    mapped = Stored.map

    def noted(self: Stored, path: Path) -> Any:
        read.append(self.dtype)
        return mapped(self, path)

    monkeypatch.setattr(Stored, "map", noted)
    trainer = tiny.trainer(tmp_path, 2, limit_val_batches=1, val_check_interval=1)
    trainer.fit(latent_model(codec), data)
    assert "|u1" not in read
    assert len(tiny.curves(tmp_path)["train/loss"]) == 2
    # Pictures and references have them, and conditions that are made from images.
    assert data.some([1])["image"].shape == (1, 1, 8, 8)
    assert next(data.stored_batches(0, 1, 4))["image"].shape[1:] == (1, 8, 8)
    holes = ImageData(Holes(data.source), batch_size=32)
    assert {"image", "mask", "moments"} <= next(iter(holes.train_dataloader())).keys()
    assert {"image", "moments"} <= next(iter(with_moments(images, stage, pixels=True).train_dataloader())).keys()


def test_a_model_of_pixels_is_not_trained_on_moments(images: Path, stage: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="moments of a first stage in place of images, which the DiffusionModule"):
        tiny.trainer(tmp_path).fit(tiny.module(), with_moments(images, stage))
    with pytest.raises(ValueError, match="pixels=False leaves nothing to train on"):
        Prepared(str(images), 8, 1, pixels=False)


def test_moments_below_other_sources_are_compared_with_the_first_stage(
    images: Path, stage: Path, tmp_path: Path
) -> None:
    data = ImageData(Holes(with_moments(images, stage).source), batch_size=32)
    other = FirstStage(str(write(tmp_path / "other.ckpt", seed=5)), scale=1.0)
    with pytest.raises(ValueError, match="carry moments of a first stage with the fingerprint"):
        other.check(data)


def test_workers_read_them_too(images: Path, stage: Path) -> None:
    here = next(iter(with_moments(images, stage).train_dataloader()))
    there = next(iter(with_moments(images, stage, num_workers=1).train_dataloader()))
    assert tiny.identical(dict(here), dict(there))


def test_the_images_keep_their_identity(images: Path, stage: Path) -> None:
    assert with_moments(images, stage).fingerprint() == plain(images).fingerprint()
    assert with_moments(images, stage).source.moments_of == FirstStage(str(stage)).fingerprint
    assert plain(images).source.moments_of is None


# What is refused


def test_moments_of_another_first_stage_are_refused_before_training(images: Path, stage: Path, tmp_path: Path) -> None:
    data = with_moments(images, stage)
    other = FirstStage(str(write(tmp_path / "other.ckpt", CODES if "vq" in str(stage) else None, seed=1)), scale=1.0)
    with pytest.raises(ValueError, match="the data carry moments of a first stage with the fingerprint") as error:
        tiny.trainer(tmp_path / "run", 1).fit(latent_model(other), data)
    assert other.fingerprint in str(error.value)
    assert FirstStage(str(stage)).fingerprint in str(error.value)
    assert "prepare them again, or set --data.source.moments null" in str(error.value)


def test_moments_of_other_images_are_refused(images: Path, stage: Path, tmp_path: Path) -> None:
    path = with_moments(images, stage).source.moments  # type: ignore[attr-defined]
    prepare(ImageData(Prepared(str(images), 8, 1)), tmp_path / "same.images")
    ImageData(Prepared(str(tmp_path / "same.images"), 8, 1, str(path))).dataset("train")
    prepare(ImageData(Prepared(str(images), 8, 1)), tmp_path / "changed.images")
    fingerprint = plain(images).fingerprint().encode()
    changed_file = tmp_path / "changed.images"
    changed_file.write_bytes(changed_file.read_bytes().replace(fingerprint, fingerprint[::-1]))
    changed = ImageData(Prepared(str(changed_file), 8, 1, str(path)))
    with pytest.raises(ValueError, match=r"holds moments of other images than .*; prepare"):
        changed.dataset("train")


def test_a_file_that_is_missing_cut_short_or_something_else_is_named(images: Path, stage: Path) -> None:
    path: Path = with_moments(images, stage).source.moments  # type: ignore[attr-defined]
    content = path.read_bytes()
    for wrong, words in ((content[:-100], "not a complete file of moments"), (b"", "not a complete"), (None, "no")):
        path.unlink(missing_ok=True)
        if wrong is not None:
            path.write_bytes(wrong)
        source = Prepared(str(images), 8, 1, str(path))
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            ImageData(source).dataset("train")
    images_as_moments = Prepared(str(images), 8, 1, str(images))
    with pytest.raises(ValueError, match="its format is 'diffusion_lit prepared images, 1'"):
        ImageData(images_as_moments).dataset("train")


def test_a_first_stage_of_other_images_is_refused(images: Path, tmp_path: Path) -> None:
    stage = FirstStage(str(write(tmp_path / "stage.ckpt")))
    data = plain(images)
    stage.network.in_channels = 3
    with pytest.raises(ValueError, match="the first stage takes 3 channels"):
        prepare_moments(data, stage, tmp_path / "x.moments")
    assert not (tmp_path / "x.moments").exists()


# The command


@pytest.mark.few(1)
def test_one_command_stores_images_and_moments_and_says_how_they_are_used(
    stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.images"
    args = ["--data.source", "Digits", "--out", str(out), "--first_stage", str(stage)]
    main(args)
    use = capsys.readouterr().out.splitlines()[-1]
    assert use.endswith(f"--data.source.moments {out}.moments")
    options = use.removeprefix("use them by ").split()
    run = ["fit", "-c", "digits", *options, "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    data = cli.CLI.parts(run).datamodule
    assert data.source.moments_of == FirstStage(str(stage)).fingerprint
    # The images are there; another first stage needs its moments only.
    main([*args, "--moments", str(tmp_path / "second.moments")])
    assert (tmp_path / "second.moments").read_bytes() == Path(f"{out}.moments").read_bytes()
    with pytest.raises(FileExistsError, match=r"all\.images\.moments exists already"):
        main(args)
    with pytest.raises(ValueError, match="give its checkpoint by --first_stage"):
        main(["--data.source", "Digits", "--out", str(tmp_path / "x"), "--moments", "y"])
