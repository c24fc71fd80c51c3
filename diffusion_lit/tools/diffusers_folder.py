"""Reads a folder of diffusers: a pipeline, a network alone, or a checkpoint of diffusers' training scripts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_lit.checkpoint import AVERAGED, RAW
from diffusion_lit.tools import scheduler, unet2d
from diffusion_lit.tools.files import is_state, plain_names, read, read_json
from diffusion_lit.tools.tensor_names import from_diffusers

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
PLACES = {AVERAGED: "unet_ema", RAW: "unet"}
"""Subfolders with averaged and raw weights, as diffusers' training scripts write them."""
WEIGHTS_FILES = tuple(
    f"diffusion_pytorch_model{variant}.{suffix}"
    for variant in ("", ".fp16", ".bf16")
    for suffix in ("safetensors", "bin")
)
"""Names of weights files, the preferred first: in full precision before the variants in half precision."""


class Folder(NamedTuple):
    """What a folder of diffusers holds.

    Attributes:
        parts: Arguments of a `DiffusionModule`: `network`, and `process`, `parameterization` and `sampler` where there
            is a scheduler.
        state: Tensors of the network, by our names.
        weights: Which of two sets of weights they are, "averaged" or "raw"; None: there is one.
        source: The file that they are from.
    """

    parts: dict[str, Any]
    state: dict[str, Tensor]
    weights: str | None
    source: Path


def read_folder(folder: Path, weights: str | None = None) -> Folder:
    """Reads a folder of diffusers.

    Args:
        folder: Of a pipeline or training checkpoint, or of a `UNet2DModel` alone.
        weights: "averaged" or "raw", where the folder holds both; None: averaged.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the pipeline has no equal here, or the weights asked for are not there.
    """
    index = folder / "model_index.json"
    pipeline = read_json(index).get("_class_name") if index.is_file() else None
    if pipeline not in (None, *PIPELINES):
        raise ValueError(f"{folder} is a {pipeline}; only a {' or '.join(PIPELINES)} has an equal here")
    place, chosen = choose_place(folder, weights)
    files = [place / name for name in WEIGHTS_FILES if (place / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{place} has no {WEIGHTS_FILES[0]} or {WEIGHTS_FILES[1]}, nor their variant fp16 or bf16; "
            "sharded weights are not read"
        )
    network, arguments = unet2d.arguments(read_json(place / "config.json"))
    tensors = read(files[0])
    if not is_state(tensors):
        raise ValueError(f"{files[0]} does not hold tensors by name")
    with torch.device("meta"):
        # Sizes come from the file: they are compared with its tensors before memory is taken.
        shapes = network(**arguments)
    state = from_diffusers(plain_names(tensors), shapes, files[0])
    parts = {"network": scheduler.part(network, **arguments), **read_scheduler(folder)}
    return Folder(parts, state, chosen, files[0])


def choose_place(folder: Path, weights: str | None) -> tuple[Path, str | None]:
    """The subfolder to read the network from, and which of two sets of weights it has; None where there is one.

    Raises:
        ValueError: If one set of two is asked for and there is one only.
    """
    found = {kind: folder / name for kind, name in PLACES.items() if (folder / name).is_dir()}
    if len(found) == 2:
        chosen = weights or AVERAGED
        return found[chosen], chosen
    if weights is not None:
        raise ValueError(f"{folder} holds one set of weights; leave out --weights {weights}")
    return next(iter(found.values()), folder), None


def read_scheduler(folder: Path) -> Mapping[str, Any]:
    """Process, parameterization and sampler of a folder's scheduler; empty if it has none."""
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            return scheduler.arguments(read_json(path))
    return {}
