"""Runs of latent diffusion: what their checkpoints carry, how they continue, and which first stage they accept."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffusion_lit import cli
from diffusion_lit.callbacks import EMA, Checkpoints
from diffusion_lit.checkpoint import last_checkpoint, load_model
from diffusion_lit.codecs import FirstStage
from diffusion_lit.diffusion import DDIM
from diffusion_lit.methods.autoencoder.losses import ReconstructionLoss
from diffusion_lit.methods.autoencoder.module import AutoencoderModule
from diffusion_lit.module import DiffusionModule
from tests import forked, tiny
from tests.codecs.first_stages import CODES, SHAPE, autoencoder, digits, latent_model, write
from tests.test_cli import CPU, QUIET


@pytest.fixture(params=[None, CODES], ids=["kl", "vq"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "stage.ckpt", request.param)


@pytest.fixture
def kl(tmp_path: Path) -> Path:
    return write(tmp_path / "stage.ckpt")


def fit(run_dir: Path, model: DiffusionModule, max_steps: int = 2, **options: Any) -> DiffusionModule:
    callbacks = [EMA([0.9]), Checkpoints()]
    tiny.trainer(run_dir, max_steps, callbacks=callbacks).fit(model, tiny.data(), **options)
    return model


def codec(path: Path | None, **options: Any) -> FirstStage:
    return FirstStage(None if path is None else str(path), num_images=64, **options)


def refusal(make: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


# What training touches


def test_training_leaves_the_first_stage_as_it_is(stage: Path, tmp_path: Path) -> None:
    model = latent_model(codec(stage))
    before = {name: value.clone() for name, value in codec(stage).network.state_dict().items()}
    weights = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    trainer = tiny.trainer(tmp_path / "run", 2)
    trainer.fit(model, tiny.data())
    first_stage: Any = model.codec
    assert tiny.identical(dict(first_stage.network.state_dict()), before)
    assert not any(m.training for m in first_stage.network.modules())
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in model.denoiser.parameters()}
    assert not tiny.identical(dict(model.denoiser.state_dict()), weights)


def test_a_checkpoint_holds_the_first_stage_exactly_once(stage: Path, tmp_path: Path) -> None:
    model = fit(tmp_path / "run", latent_model(codec(stage)))
    checkpoint = tiny.load(tiny.last(tmp_path / "run"))
    network = checkpoint["codec"]["weights"]
    assert tiny.identical(dict(network), dict(codec(stage).network.state_dict()))
    rest = {name: value for name, value in checkpoint.items() if name != "codec"}

    def tensors(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from tensors(inner)

    big = [value for value in network.values() if value.numel() > 30]
    assert len(big) > 10
    assert not [t for t in tensors(rest) for value in big if t.shape == value.shape and torch.equal(t, value)]
    names = [name for name in checkpoint["state_dict"] if not name.startswith("denoiser.network.")]
    assert names == ["codec.scale", "codec.shift"]
    # The only one is stored as the weights themselves.
    averaged = {*checkpoint["current_model_state"], *checkpoint["averages"]["averages"].get("0.9", {})}
    assert averaged == {name for name, _ in model.named_parameters()}
    assert all(name.startswith("denoiser.") for name in averaged)
    assert torch.equal(checkpoint["state_dict"]["codec.scale"], model.codec.scale)  # type: ignore[attr-defined]


# One checkpoint is enough


def test_the_model_s_checkpoint_alone_makes_the_same_images(stage: Path, tmp_path: Path) -> None:
    model = fit(tmp_path / "run", latent_model(codec(stage)))
    stage.unlink()
    kind: Any = model.codec
    network = autoencoder(kind.network.regularizer.num_codes, seed=5)
    alone = latent_model(FirstStage(network=network))
    alone.load(tiny.load(tiny.last(tmp_path / "run")))
    with model.averaged_weights():
        expected = model.sample([0, 5])
    assert expected.shape == (2, 1, 8, 8)
    assert torch.equal(alone.sample([0, 5]), expected)
    # It carries the configuration of parts that were put together in Python, too.
    assert torch.equal(load_model(tiny.last(tmp_path / "run"), DiffusionModule).sample([0, 5]), expected)


@pytest.mark.few(1)
def test_a_run_that_was_stopped_continues_bit_for_bit_without_the_file(stage: Path, tmp_path: Path) -> None:
    def model(path: Path | None) -> DiffusionModule:
        return latent_model(codec(path, **({} if path else {"network": autoencoder(kind)})))

    kind = None if codec(stage).network.regularizer.num_codes is None else CODES
    fit(tmp_path / "whole", model(stage), 4)
    fit(tmp_path / "parts", model(stage), 2)
    stage.unlink()
    fit(tmp_path / "parts", model(None), 4, ckpt_path="last")
    whole, parts = (tiny.load(tiny.last(tmp_path / name)) for name in ("whole", "parts"))
    for name in ("state_dict", "current_model_state", "optimizer_states", "codec"):
        assert tiny.identical(whole[name], parts[name]), name


def test_a_fine_tuned_run_keeps_the_scale(kl: Path, tmp_path: Path) -> None:
    first = fit(tmp_path / "first", latent_model(codec(kl)))
    tuned = latent_model(FirstStage(str(kl), num_images=2))
    fit(tmp_path / "second", tuned, init_from=str(tiny.last(tmp_path / "first")))
    assert torch.equal(tuned.codec.scale, first.codec.scale)  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["continued", "tuned", "loaded"])
def test_another_first_stage_is_refused(how: str, kl: Path, tmp_path: Path) -> None:
    fit(tmp_path / "run", latent_model(codec(kl)))
    other = latent_model(codec(write(tmp_path / "other.ckpt", seed=1)))
    last = str(tiny.last(tmp_path / "run"))
    ways: dict[str, Callable[[], Any]] = {
        "continued": lambda: fit(tmp_path / "run", other, 4, ckpt_path="last"),
        "tuned": lambda: fit(tmp_path / "new", other, init_from=last),
        "loaded": lambda: other.load(tiny.load(Path(last))),
    }
    found = refusal(ways[how])
    assert f"is not the one that the model was trained with ({codec(kl).fingerprint})" in found
    assert "set --model.codec.checkpoint null to take it from the model's checkpoint" in found


def test_another_scale_than_that_of_the_checkpoint_is_refused(kl: Path, tmp_path: Path) -> None:
    fit(tmp_path / "run", latent_model(codec(kl)))
    other = latent_model(codec(kl, scale=0.18215))
    found = refusal(lambda: other.load(tiny.load(tiny.last(tmp_path / "run"))))
    assert "codec.scale=0.18215: the model was trained with [" in found


@pytest.mark.further
def test_two_processes_find_the_same_scale_and_learn_what_one_learns(kl: Path, tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> Callable[[], None]:
        def fit() -> None:
            model = latent_model(codec(kl), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
            callbacks = [Checkpoints()]
            tiny.trainer(tmp_path / name, 2, callbacks=callbacks, **options).fit(model, tiny.data(flip=False))

        return fit

    run("one")()
    two = run("two", devices=2, strategy="ddp")
    assert forked.wait(forked.fork(lambda: forked.in_two(two), tmp_path / "output.txt")) == 0
    one, both = (tiny.load(tiny.last(tmp_path / name)) for name in ("one", "two"))
    for name in ("codec.scale", "codec.shift"):
        assert torch.equal(one["state_dict"][name], both["state_dict"][name])
    assert tiny.identical(one["codec"], both["codec"])


# By the command line


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder, and a diffusion model in its latents, made by the command line."""
    place = tmp_path_factory.mktemp("latent")
    common = ["--data.source", "Digits", "--data.batch_size", "16", "--trainer.max_steps", "2", *CPU, *QUIET]
    stage = "--model AutoencoderModule --model.loss.perceptual null --model.loss.reduction mean --evaluation null"
    stage += " --sample_grid null --model.network Autoencoder"
    shape = [f"--model.network.{name}={value}" for name, value in SHAPE.items()]
    where = ["--trainer.default_root_dir", str(place / "stage")]
    cli.main(["fit", *stage.split(), *shape, *where, *common])
    with warnings.catch_warnings():
        # Two steps teach an autoencoder nothing, and its averages less.
        warnings.filterwarnings("ignore", message=".*noise of the posterior")
        cli.main(["fit", *run_options(place), "--trainer.default_root_dir", str(place / "run"), *common])
    return place


def run_options(place: Path) -> list[str]:
    """Of the diffusion model."""
    run = "--model.network UNet --model.network.image_size 4 --model.network.in_channels 2 --model.network.width 8"
    run += " --model.network.multipliers [1] --model.network.num_groups 4 --model.network.attention []"
    run += " --model.sampler.steps 3 --model.sampler.clip false --sample_grid.sampler null --sample_grid.num_images 4"
    run += " --evaluation.extractor Pixels --evaluation.num_images 64 --evaluation.batch_size 64"
    run += " --model.codec FirstStage --model.codec.num_images 64"
    return [*run.split(), "--model.codec.checkpoint", str(last_checkpoint(place / "stage"))]


@pytest.mark.further
def test_what_a_run_found_out_is_no_change_of_its_options(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(runs / "run", tmp_path / "run")
    more = ["--data.source", "Digits", "--data.batch_size", "16", "--trainer.max_steps", "3", *CPU, *QUIET]
    where = ["--trainer.default_root_dir", str(tmp_path / "run"), "--ckpt_path", "last"]
    cli.main(["fit", *run_options(runs), *where, *more])
    assert "continuing from" in caplog.text
    assert "model.codec" not in caplog.text
    before, after = (tiny.load(last_checkpoint(place / "run")) for place in (runs, tmp_path))
    assert after["global_step"] == 3
    assert after["config"]["model"]["init_args"]["codec"] == before["config"]["model"]["init_args"]["codec"]
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["model"]["init_args"]["codec"]["init_args"]["checkpoint"] == str(last_checkpoint(runs / "stage"))


def test_the_configuration_of_a_run_says_scale_fingerprint_and_network(runs: Path) -> None:
    written = yaml.safe_load((runs / "run" / "config.yaml").read_text())["model"]["init_args"]["codec"]["init_args"]
    carried = tiny.load(last_checkpoint(runs / "run"))["config"]["model"]["init_args"]["codec"]["init_args"]
    assert written["checkpoint"] == str(last_checkpoint(runs / "stage"))
    assert carried["checkpoint"] is None
    assert {**written, "checkpoint": None} == carried
    assert carried["fingerprint"] == FirstStage(written["checkpoint"]).fingerprint
    state = tiny.load(last_checkpoint(runs / "run"))["state_dict"]
    assert carried["scale"] == state["codec.scale"].tolist()
    assert carried["network"]["init_args"]["multipliers"] == [1, 2]


def test_the_configuration_of_a_run_makes_the_same_run_again(runs: Path, tmp_path: Path) -> None:
    cli.main(["fit", "-c", str(runs / "run" / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "again")])
    first = tiny.load(last_checkpoint(runs / "run"))
    again = tiny.load(last_checkpoint(tmp_path / "again"))
    assert tiny.identical(first["state_dict"], again["state_dict"])
    codecs = [run["config"]["model"]["init_args"]["codec"]["init_args"] for run in (first, again)]
    for name in ("scale", "shift", "fingerprint", "num_images"):
        assert codecs[0][name] == codecs[1][name]


def test_images_are_predicted_and_scored_from_the_checkpoint_without_the_autoencoder_s(
    runs: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(last_checkpoint(runs / "run").read_bytes())
    stage = last_checkpoint(runs / "stage")
    hidden = stage.rename(stage.with_name("hidden"))
    try:
        cli.main(
            ["predict", "--ckpt_path", str(moved), "--num_images", "2", "--out", str(tmp_path / "out"), *CPU, *QUIET]
        )
        cli.main(["test", "--ckpt_path", str(moved), *CPU, *QUIET])
        model = load_model(moved, DiffusionModule)
    finally:
        hidden.rename(stage)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert (tmp_path / "results.jsonl").is_file()
    assert model.sample([0], sampler=DDIM(2, clip=False)).shape == (1, 1, 8, 8)


@pytest.mark.further
def test_a_table_of_samplers_is_made_of_latents_without_clipping(runs: Path, tmp_path: Path) -> None:
    options = "--evaluation.table SamplerTable --evaluation.table.evaluations [2] --evaluation.table.clip false"
    where = ["--trainer.default_root_dir", str(tmp_path)]
    cli.main(["test", "--ckpt_path", str(last_checkpoint(runs / "run")), *options.split(), *where, *CPU, *QUIET])
    rows = [line for line in next(tmp_path.rglob("*.md")).read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 7


@pytest.mark.parametrize("command", ["predict", "test"])
def test_a_first_stage_given_for_sampling_must_be_the_model_s(
    command: str, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other.ckpt", seed=1)
    args = [command, "--ckpt_path", str(last_checkpoint(runs / "run")), "--model.codec.checkpoint", str(other)]
    with pytest.raises(SystemExit) as end:
        cli.main([*args, "--trainer.default_root_dir", str(tmp_path), *CPU, *QUIET])
    assert end.value.code == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert "codec" in error.splitlines()[-1]


def test_an_autoencoder_s_checkpoint_is_no_diffusion_model(runs: Path, tmp_path: Path) -> None:
    stage = str(last_checkpoint(runs / "stage"))
    assert "AutoencoderModule is no DiffusionModule" in refusal(lambda: load_model(stage, DiffusionModule))
    model = latent_model(FirstStage(stage, num_images=64))
    trainer = tiny.trainer(tmp_path / "run", 4)
    for use in (
        lambda: trainer.fit(model, tiny.data(), init_from=stage),
        lambda: trainer.fit(model, tiny.data(), ckpt_path=stage),
        lambda: trainer.predict(model, ckpt_path=stage),
        lambda: trainer.test(model, tiny.data(), ckpt_path=stage),
    ):
        assert "the checkpoint is of AutoencoderModule and not of DiffusionModule" in refusal(use)


def test_a_diffusion_model_s_checkpoint_is_no_autoencoder(runs: Path, tmp_path: Path) -> None:
    run = str(last_checkpoint(runs / "run"))
    assert "DiffusionModule is no AutoencoderModule" in refusal(lambda: load_model(run, AutoencoderModule))
    system = AutoencoderModule(autoencoder(), ReconstructionLoss(perceptual=None))
    trainer = tiny.trainer(tmp_path / "run", 1)
    found = refusal(lambda: trainer.fit(system, tiny.data(), init_from=run))
    assert "the checkpoint is of DiffusionModule and not of AutoencoderModule" in found
    assert "of DiffusionModule, not of an autoencoder" in refusal(lambda: FirstStage(run))


def test_what_an_autoencoder_learned_is_what_the_codec_uses(runs: Path) -> None:
    system = load_model(last_checkpoint(runs / "stage"), AutoencoderModule)
    used = FirstStage(str(last_checkpoint(runs / "stage")), scale=1.0)
    images = digits()
    torch.testing.assert_close(used.encode(images), system.network.regularizer.mode(system.network.moments(images)))
    assert not torch.equal(used.network.quant_conv.weight, autoencoder().quant_conv.weight)
