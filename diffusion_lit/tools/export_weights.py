"""Writes a checkpoint's weights in a form that other programs read.

python -m diffusion_lit export runs/x/checkpoints/last.ckpt --to diffusers --out pipeline/
python -m diffusion_lit export runs/x/checkpoints/last.ckpt --to safetensors --out weights/ --weights raw
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file

from diffusion_lit.checkpoint import AVERAGED, load_model, read_checkpoint
from diffusion_lit.codec import Pixels
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet, UNet
from diffusion_lit.tools import scheduler, unet2d
from diffusion_lit.tools.files import announce
from diffusion_lit.tools.tensor_names import to_diffusers

DIFFUSERS_VERSION = "0.42.1"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a configuration as diffusers does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_diffusers(model: DiffusionModule, folder: Path) -> None:
    """Writes a `DDPMPipeline`, which `DDPMPipeline.from_pretrained` and `DDIMPipeline.from_pretrained` read.

    For a network with classes it is network and scheduler alone: these pipelines pass no labels.

    Raises:
        ValueError: If diffusers has no such network or process.
    """
    network = cast(UNet | ADMUNet, model.denoiser.network)
    if type(network) not in (UNet, ADMUNet):
        raise ValueError(
            f"diffusers has no {type(network).__name__}: its UNet2DModel can be a UNet or an ADMUNet; "
            "use --to safetensors"
        )
    if type(model.codec) is not Pixels:
        raise ValueError(f"diffusers has no pipeline of a {unet2d.CLASS} with a {type(model.codec).__name__}")
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    unet = unet2d.configuration(network)
    schedule = scheduler.configuration(model.process, model.denoiser.parameterization, model.sampler, network)
    index = {
        "_class_name": "DDPMPipeline",
        **version,
        "scheduler": ["diffusers", scheduler.DDPM_CLASS],
        "unet": ["diffusers", unet2d.CLASS],
    }
    if not has_classes(model):
        write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", {**schedule, **version})
    write_json(folder / "unet" / "config.json", {**unet, **version})
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(to_diffusers(network), file, metadata={"format": "pt"})


def has_classes(model: DiffusionModule) -> bool:
    """Whether the network of a model takes labels."""
    return getattr(model.denoiser.network, "num_classes", None) is not None


def write_safetensors(model: DiffusionModule, folder: Path, checkpoint: dict[str, Any], weights: str) -> None:
    """Writes model.safetensors: the network's tensors by its own names, and as metadata what they are."""
    network = model.denoiser.network
    metadata = {
        "format": "pt",
        "network": type(network).__qualname__,
        "weights": checkpoint.get("weights", AVERAGED) if weights == AVERAGED else weights,
        "step": str(checkpoint.get("global_step", 0)),
        "model": json.dumps(checkpoint["config"]["model"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder beside its place and renames it once it is complete.

    Raises:
        ValueError: If the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already; choose another folder with --out")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(args: Sequence[str]) -> None:
    """Writes a checkpoint's weights in another form.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the model has no such form, the checkpoint lacks the weights, or the folder is not empty.
    """
    parser = argparse.ArgumentParser(prog="diffusion_lit export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="of a diffusion model")
    parser.add_argument("--to", required=True, choices=("diffusers", "safetensors"), help="the form")
    parser.add_argument("--out", required=True, help="the folder to write, new or empty")
    parser.add_argument("--weights", default=AVERAGED, help="averaged, raw, or the decay of a further average")
    parser.add_argument("--trust", action="append", default=[], help="a module or class that the checkpoint may name")
    given = parser.parse_args(args)
    announce(Path(given.checkpoint))
    model = load_model(given.checkpoint, DiffusionModule, given.weights, given.trust)
    out = Path(os.path.abspath(given.out))
    if given.to == "diffusers":
        write_whole(out, lambda folder: write_diffusers(model, folder))
    else:
        checkpoint = read_checkpoint(given.checkpoint)
        write_whole(out, lambda folder: write_safetensors(model, folder, checkpoint, given.weights))
    labels = "; its network takes class_labels, which diffusers' pipelines do not pass: call it in a loop of your own"
    print(f"{given.out}{labels if given.to == 'diffusers' and has_classes(model) else ''}")
