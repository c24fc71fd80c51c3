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
from torch import nn

from diffusion_lit.checkpoint import AVERAGED, load_model, read_checkpoint
from diffusion_lit.codecs import FirstStage
from diffusion_lit.locks import locked
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import Autoencoder
from diffusion_lit.system import System
from diffusion_lit.tools import compvis
from diffusion_lit.tools.diffusers_writer import inputs, write_autoencoder, write_diffusers
from diffusion_lit.tools.files import SAFETENSORS, announce
from diffusion_lit.tools.import_weights import network_of


def write_safetensors(model: System, folder: Path, checkpoint: dict[str, Any], weights: str) -> None:
    """Writes model.safetensors: the network's tensors by its own names, and as metadata what they are.

    A diffusion model with a first stage, or with a conditioner that has weights, is written whole, in the layout of the
    code of latent diffusion.
    """
    network = network_of(model)
    metadata = {
        "format": "pt",
        "network": type(network).__qualname__,
        "weights": checkpoint.get("weights", AVERAGED) if weights == AVERAGED else weights,
        "step": str(checkpoint.get("global_step", 0)),
        "model": json.dumps(checkpoint["config"]["model"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    whole = isinstance(model, DiffusionModule) and (
        isinstance(model.codec, FirstStage) or any(True for _ in model.conditioner.parameters())
    )
    tensors = compvis.tensors(cast(DiffusionModule, model)) if whole else network.state_dict()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / SAFETENSORS, metadata=metadata)


def write_whole(folder: Path, write: Callable[[Path], object]) -> None:
    """Writes a folder beside its place and renames it once it is complete; removes what a killed process left there.

    Raises:
        ValueError: If the folder holds something.
    """
    part = folder.with_name(f".{folder.name}.part")
    with locked(folder.with_name(f".{folder.name}.lock"), "exports", remove=True):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} holds something already; choose another folder with --out")
        shutil.rmtree(part, ignore_errors=True)
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
    parser.add_argument("checkpoint", help="of a diffusion model or an autoencoder")
    parser.add_argument("--to", required=True, choices=("diffusers", "safetensors"), help="the form")
    parser.add_argument("--out", required=True, help="the folder to write, new or empty")
    parser.add_argument("--weights", default=AVERAGED, help="averaged, raw, or the decay of a further average")
    parser.add_argument("--trust", action="append", default=[], help="a module or class that the checkpoint may name")
    given = parser.parse_args(args)
    announce(Path(given.checkpoint))
    base: type[System] = System  # type: ignore[type-abstract]
    model = load_model(given.checkpoint, base, given.weights, given.trust)
    network = network_of(model) if isinstance(model, DiffusionModule) else getattr(model, "network", None)
    if not isinstance(model, DiffusionModule) and not isinstance(network, Autoencoder):
        raise ValueError(
            f"{given.checkpoint} is of a {type(model).__name__}; diffusion models and autoencoders are exported"
        )
    out = Path(os.path.abspath(given.out))
    notes: list[str | None] = []
    if given.to == "diffusers" and isinstance(model, DiffusionModule):
        write_whole(out, lambda folder: notes.append(write_diffusers(model, folder)))
    elif given.to == "diffusers":
        write_whole(out, lambda folder: write_autoencoder(cast(Autoencoder, network), folder))
    else:
        checkpoint = read_checkpoint(given.checkpoint)
        write_whole(out, lambda folder: write_safetensors(model, folder, checkpoint, given.weights))
    more = inputs(cast(nn.Module, network)) if given.to == "diffusers" else []
    if more and not (out / "model_index.json").exists():
        notes.append(f"its network takes {' and '.join(more)}, which no pipeline passes: call it in a loop of your own")
    print("; ".join([given.out, *filter(None, notes)]))
