"""Reads a folder of diffusers: a pipeline, a network alone, or a checkpoint of diffusers' training scripts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_lit import codecs
from diffusion_lit.checkpoint import AVERAGED, RAW
from diffusion_lit.networks import ADMUNet, Autoencoder
from diffusion_lit.tools import autoencoders, scheduler, unet2d, unet2d_condition
from diffusion_lit.tools.files import is_state, naming, plain_names, read, read_json
from diffusion_lit.tools.ldm_bert import Conditioned
from diffusion_lit.tools.pipelines import Index, read_index
from diffusion_lit.tools.tensor_names import Exchanged, from_diffusers

PLACES = {AVERAGED: "unet_ema", RAW: "unet"}
"""Subfolders with averaged and raw weights, as diffusers' training scripts write them."""
WEIGHTS_FILES = tuple(
    f"diffusion_pytorch_model{variant}.{suffix}"
    for variant in ("", ".fp16", ".bf16")
    for suffix in ("safetensors", "bin")
)
"""Names of weights files, the preferred first: in full precision before the variants in half precision."""
DIFFUSION, AUTOENCODER = "DiffusionModule", "AutoencoderModule"


class Stored(NamedTuple):
    """A network in a folder of its own.

    Attributes:
        network: The class, and arguments of which parts are configurations.
        state: Its tensors, by our names.
        scale: Factor from latents to what is diffused, of an autoencoder; else 1.
        source: The file that the tensors are from.
    """

    network: dict[str, Any]
    state: dict[str, Tensor]
    scale: float
    source: Path


class Folder(NamedTuple):
    """What a folder of diffusers holds.

    Attributes:
        model: Class of the system.
        parts: Its arguments: `network`, and of a diffusion model `process`, `parameterization` and `sampler` where
            there is a scheduler, `codec` where there is an autoencoder, and what else a pipeline says.
        state: Tensors of the network, by our names.
        weights: Which of two sets of weights they are, "averaged" or "raw"; None: there is one.
        source: The file that they are from.
        first_stage: Tensors of the codec's autoencoder; None: there is none.
        scale: Of the latents of an autoencoder alone, which its model here does not keep; None: it is no autoencoder.
        conditioner: Tensors of the conditioner, by our names; empty: it has none.
        ignored: What the folder holds besides.
    """

    model: str
    parts: dict[str, Any]
    state: dict[str, Tensor]
    weights: str | None
    source: Path
    first_stage: dict[str, Tensor] | None = None
    scale: float | None = None
    conditioner: Mapping[str, Tensor] = {}
    ignored: tuple[str, ...] = ()


def read_folder(folder: Path, weights: str | None = None) -> Folder:
    """Reads a folder of diffusers.

    Args:
        folder: Of a pipeline or training checkpoint, or of a network alone.
        weights: "averaged" or "raw", where the folder holds both; None: averaged.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the pipeline has no equal here, or the weights asked for are not there.
    """
    index = read_index(folder)
    place, chosen = choose_place(folder, weights)
    stored = read_network(place)
    if index is not None:
        return read_pipeline(folder, index, stored, chosen)
    if stored.network["class_path"] == Autoencoder.__name__:
        loss = autoencoders.loss_of(stored.network["init_args"])
        parts = {"network": stored.network, "loss": loss}
        return Folder(AUTOENCODER, parts, stored.state, chosen, stored.source, scale=stored.scale)
    return Folder(DIFFUSION, {"network": stored.network, **read_scheduler(folder)}, stored.state, chosen, stored.source)


def read_pipeline(folder: Path, index: Index, network: Stored, weights: str | None) -> Folder:
    """Reads what a pipeline has besides its network; see `read_folder` for errors."""
    pipeline = index.pipeline
    parts = {"network": network.network, **read_scheduler(folder, pipeline.scheduler), **pipeline.parts()}
    conditioned, first_stage = Conditioned({}, {}), None
    if pipeline.first_stage is not None:
        stage = read_network(folder / pipeline.first_stage)
        scale = stage.scale if pipeline.is_scaled else 1.0
        parts["codec"] = scheduler.part(codecs.FirstStage, network=stage.network, scale=scale)
        first_stage = stage.state
    if pipeline.conditioner is not None:
        conditioned = pipeline.conditioner(folder, network.network["init_args"])
        parts["conditioner"] = conditioned.part
    return Folder(
        DIFFUSION,
        parts,
        network.state,
        weights,
        network.source,
        first_stage,
        conditioner=conditioned.state,
        ignored=index.ignored,
    )


def read_network(place: Path) -> Stored:
    """Reads a network from its folder; see `read_folder` for errors."""
    files = [place / name for name in WEIGHTS_FILES if (place / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{place} has no {WEIGHTS_FILES[0]} or {WEIGHTS_FILES[1]}, nor their variant fp16 or bf16; "
            "sharded weights are not read"
        )
    config = read_json(place / "config.json")
    with naming(place / "config.json"), torch.device("meta"):
        # Sizes come from the file: they are compared with its tensors before memory is taken.
        part, scale, shapes = equal_network(config)
    tensors = read(files[0])
    if not is_state(tensors):
        raise ValueError(f"{files[0]} does not hold tensors by name")
    return Stored(part, from_diffusers(plain_names(tensors), shapes, files[0]), scale, files[0])


def equal_network(config: Mapping[str, Any]) -> tuple[dict[str, Any], float, Exchanged]:
    """The network that a config.json describes, as configuration, its scale, and as an object.

    Raises:
        ValueError: If it has no equal here.
    """
    kind = config.get("_class_name")
    if kind in autoencoders.CLASSES:
        stage = autoencoders.arguments(config)
        return scheduler.part(Autoencoder, **stage.network), stage.scale, autoencoders.build(stage.network)
    if kind == unet2d_condition.CLASS:
        arguments = unet2d_condition.arguments(config)
        return scheduler.part(ADMUNet, **arguments), 1.0, ADMUNet(**arguments)
    network, arguments = unet2d.arguments(config)
    return scheduler.part(network, **arguments), 1.0, network(**arguments)


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


def read_scheduler(folder: Path, changes: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """Process, parameterization and sampler of a folder's scheduler; empty if it has none.

    Args:
        folder: Holds it.
        changes: Laid over its configuration.
    """
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            return scheduler.arguments({**read_json(path), **(changes or {})})
    return {}
