"""A checkpoint's weights in a form that others read.

python -m diffusion_lit export runs/x/checkpoints/last.ckpt --to diffusers --out pipeline/
python -m diffusion_lit export runs/x/checkpoints/last.ckpt --to safetensors --out weights/ --weights raw
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from diffusion_lit.callbacks.checkpoints import read_checkpoint, restore
from diffusion_lit.module import AVERAGED, DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.tools import scheduler, unet2d

DIFFUSERS_VERSION = "0.42.1"


def restored(path: str, weights: str) -> DiffusionModule:
    """A checkpoint's model with one of its sets of weights.

    Args:
        path: The checkpoint.
        weights: "averaged", "raw", or the decay of a further average.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of a diffusion model, or has no such weights.
    """
    model = restore(path, DiffusionModule).eval()
    checkpoint = dict(read_checkpoint(path))
    model.load_weights = weights
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a configuration as diffusers keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_diffusers(model: DiffusionModule, folder: Path) -> None:
    """Writes a `DDPMPipeline`, which `DDPMPipeline.from_pretrained` and `DDIMPipeline.from_pretrained` read.

    Raises:
        ValueError: If diffusers has no such network or process.
    """
    network = model.denoiser.network
    if type(network) is not UNet:
        raise ValueError(
            f"diffusers has no {type(network).__name__}: only a UNet becomes a pipeline; use --to safetensors"
        )
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    unet = unet2d.configuration(network)
    schedule = scheduler.configuration(model.process, model.denoiser.parameterization, model.sampler, network)
    index = {
        "_class_name": "DDPMPipeline",
        **version,
        "scheduler": ["diffusers", scheduler.DDPM_CLASS],
        "unet": ["diffusers", unet2d.CLASS],
    }
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", {**schedule, **version})
    write_json(folder / "unet" / "config.json", {**unet, **version})
    save_file(
        unet2d.to_diffusers(network), folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"}
    )


def write_safetensors(model: DiffusionModule, folder: Path, checkpoint: dict[str, Any], weights: str) -> None:
    """Writes model.safetensors: the network's tensors by its own names, and what they are as metadata."""
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
    """Has a folder written beside its place and puts it there once it is complete.

    Raises:
        ValueError: If there is something in its place.
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
        ValueError: If they have no such form, the checkpoint lacks them, or the folder is not empty.
    """
    parser = argparse.ArgumentParser(prog="diffusion_lit export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="of a diffusion model")
    parser.add_argument("--to", required=True, choices=("diffusers", "safetensors"), help="the form")
    parser.add_argument("--out", required=True, help="the folder to write, new or empty")
    parser.add_argument("--weights", default=AVERAGED, help="averaged, raw, or the decay of a further average")
    given = parser.parse_args(args)
    model = restored(given.checkpoint, given.weights)
    out = Path(os.path.abspath(given.out))
    if given.to == "diffusers":
        write_whole(out, lambda folder: write_diffusers(model, folder))
    else:
        checkpoint = read_checkpoint(given.checkpoint)
        write_whole(out, lambda folder: write_safetensors(model, folder, checkpoint, given.weights))
    print(given.out)
