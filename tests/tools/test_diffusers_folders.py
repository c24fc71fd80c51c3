"""Folders of diffusers as they are found: variants, prefixes, averaged weights beside raw ones, old layouts, damage."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_lit.diffusion import Cosine
from tests.tools.diffusers_models import T, assert_close, images, imported, pipeline, theirs


@torch.no_grad()
def test_a_pickled_file_serves_too(tmp_path: Path) -> None:
    unet = theirs()
    folder = pipeline(tmp_path, unet, safe_serialization=False)
    assert [path.suffix for path in (folder / "unet").glob("*model*")] == [".bin"]
    x, times = images(unet), torch.tensor([1.0, 7.0])
    assert_close(imported(folder).denoiser.network(x, times), unet(x, times).sample)


@pytest.mark.parametrize("safe", [True, False])
@torch.no_grad()
def test_weights_of_variant_fp16_serve_where_there_are_no_others(safe: bool, tmp_path: Path) -> None:
    unet = theirs().half()
    folder = pipeline(tmp_path, unet, variant="fp16", safe_serialization=safe)
    assert [path.name[:29] for path in (folder / "unet").glob("*model*")] == ["diffusion_pytorch_model.fp16."]
    network = imported(folder).denoiser.network
    assert network.conv_in.weight.dtype == torch.float32
    x, times = images(unet), torch.tensor([1.0, 7.0])
    assert_close(network(x, times), unet.float()(x, times).sample)


def test_weights_in_full_precision_are_preferred(tmp_path: Path) -> None:
    unet = theirs()
    folder = pipeline(tmp_path, unet)
    unet.half().save_pretrained(folder / "unet", variant="fp16")
    exact = imported(folder).denoiser.network.conv_in.weight
    assert torch.equal(exact, theirs().conv_in.weight)
    assert not torch.equal(exact, unet.conv_in.weight.float())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrapped_networks_are_removed(prefix: str, tmp_path: Path) -> None:
    unet = theirs()
    folder = pipeline(tmp_path, unet)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    assert torch.equal(imported(folder).denoiser.network.conv_in.weight, unet.conv_in.weight)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    unet = theirs()
    with torch.no_grad():
        unet.mid_block.resnets[0].norm1.bias[3] = value
    with pytest.raises(ValueError, match=r"infinite or not a number.*: mid_block\.resnets\.0\.norm1\.bias;"):
        imported(pipeline(tmp_path, unet))
    assert not list(tmp_path.glob("*.ckpt"))


def training_checkpoint(folder: Path) -> tuple[Any, Path]:
    """A folder as diffusers' training scripts write it, with averaged weights one below the raw ones."""
    unet = theirs()
    average = EMAModel(
        unet.parameters(), decay=0.999, use_ema_warmup=True, model_cls=UNet2DModel, model_config=unet.config
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1.0)
    unet.save_pretrained(folder / "run" / "unet")
    average.save_pretrained(str(folder / "run" / "unet_ema"))
    DDPMScheduler(num_train_timesteps=T).save_pretrained(folder / "run" / "scheduler")
    return unet.conv_in.weight, folder / "run"


@pytest.mark.parametrize(
    ("options", "added", "said"),
    [
        ([], -1, "averaged weights of {}/unet_ema/diffusion_pytorch_model.safetensors; --weights raw chooses"),
        (["--weights", "averaged"], -1, "averaged weights of {}/unet_ema/"),
        (["--weights", "raw"], 0, "raw weights of {}/unet/diffusion_pytorch_model.safetensors; --weights averaged"),
    ],
)
def test_averaged_weights_that_lie_beside_raw_ones_are_taken_and_named(
    options: list[str], added: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, folder = training_checkpoint(tmp_path)
    torch.testing.assert_close(imported(folder, *options).denoiser.network.conv_in.weight, raw + added)
    assert said.format(folder) in capsys.readouterr().out


def test_the_folder_of_averaged_weights_serves_alone(tmp_path: Path) -> None:
    raw, folder = training_checkpoint(tmp_path)
    model = imported(folder / "unet_ema", "-c", "digits")
    torch.testing.assert_close(model.denoiser.network.conv_in.weight, raw - 1)
    assert isinstance(model.process.schedule, Cosine)
    with pytest.raises(ValueError, match=f"unet has no scheduler.*, or import {folder}, which has one"):
        imported(folder / "unet")
    with pytest.raises(ValueError, match="holds one set of weights; leave out --weights raw"):
        imported(folder / "unet_ema", "-c", "digits", "--out", str(tmp_path / "raw.ckpt"), "--weights", "raw")


def test_of_a_folder_of_raw_weights_the_averaged_ones_beside_it_are_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, folder = training_checkpoint(tmp_path)
    torch.testing.assert_close(imported(folder / "unet", "-c", "digits").denoiser.network.conv_in.weight, raw)
    assert f"averaged weights lie beside it, in {folder / 'unet_ema'}" in capsys.readouterr().out


def former(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names that attention had before diffusers 0.15, in which much of what is published is stored."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile("|".join(map(re.escape, old)))
    return {pattern.sub(lambda new: old[new[0]], name): tensor for name, tensor in tensors.items()}


@torch.no_grad()
def test_an_old_repository_with_former_names_and_all_files_at_its_top_serves_too(tmp_path: Path) -> None:
    unet = theirs()
    folder, old = pipeline(tmp_path, unet), tmp_path / "old"
    old.mkdir()
    (folder / "model_index.json").rename(old / "model_index.json")
    (folder / "unet" / "config.json").rename(old / "config.json")
    (folder / "scheduler" / "scheduler_config.json").rename(old / "scheduler_config.json")
    tensors = former(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    assert "mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, old / "diffusion_pytorch_model.safetensors")
    x, times = images(unet), torch.tensor([1.0, 7.0])
    assert_close(imported(old).denoiser.network(x, times), unet(x, times).sample)


def test_missing_unknown_and_misshapen_tensors_have_diffusers_names(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["up_blocks.0.attentions.1.to_v.bias"]
    tensors["mid_block.attentions.0.to_q.weight"] = torch.zeros(16, 8)
    # Under both its names: which is meant cannot be known.
    tensors["mid_block.attentions.0.query.bias"] = torch.zeros(16)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        imported(folder)
    message = str(error.value)
    assert "missing: up_blocks.0.attentions.1.to_v.bias;" in message
    assert "unknown: mid_block.attentions.0.query.bias;" in message
    assert "misshapen: mid_block.attentions.0.to_q.weight (16, 8) instead of (16, 16);" in message


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("unet/config.json", "config.json: there is no such file"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(gone: str, words: str, tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=words):
        imported(folder)
