"""Published weights become a checkpoint.

    python -m diffusion_lit import ddpm-cifar10-32/ --out runs/x/checkpoints/imported.ckpt
    python -m diffusion_lit import ema_diffusion_cifar10.ckpt -c configs/cifar10.yaml --out ...

SOURCE is a folder of diffusers, which says itself what it is, or a file in the layout of DDIM's or of OpenAI's code,
for which a recipe says it. Both name their tensors as our networks do.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from diffusion_lit.callbacks.checkpoints import CARRIED, WholeFiles
from diffusion_lit.module import AVERAGED, RAW, DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.records import read_recipe
from diffusion_lit.tools import scheduler, unet2d
from diffusion_lit.tools.files import check_tensors, choose_state, is_state, read, read_json

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
WEIGHTS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
DIFFUSERS_TENSOR = "time_embedding.linear_1.weight"


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration over another, key by key; a part of another class replaces the one below it whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            another = {str(p.get("class_path", "")).rpartition(".")[2] for p in (old, value) if "class_path" in p}
            merged[key] = value if len(another) > 1 else overlay(old, value)
        else:
            merged[key] = value
    return merged


def read_recipes(paths: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint carries of recipes, later ones winning.

    Raises:
        ValueError: If a file is no configuration.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        merged = overlay(merged, read_recipe(path))
    return {key: value for key, value in merged.items() if key in CARRIED}


def make(config: Mapping[str, Any]) -> tuple[L.LightningModule, dict[str, Any]]:
    """A model, and its configuration with everything that was left out filled in.

    Raises:
        ValueError: If there is no such model.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=L.LightningModule)
    path = f"{DiffusionModule.__module__}.{DiffusionModule.__qualname__}"
    try:
        parsed = parser.parse_object({"model": {"class_path": path, **config}})
        made = parser.instantiate_classes(parsed)
    except ArgumentError as error:
        raise ValueError(f"the configuration makes no model: {error}") from error
    filled = yaml.safe_load(parser.dump(parsed, skip_none=False))["model"]
    # Linked to seed_everything by the command line, which takes it from there alone.
    filled["init_args"].pop("seed", None)
    return made.model, filled


def prefix_of(model: L.LightningModule) -> str:
    """What the names of the network's tensors begin with in the model's.

    Raises:
        ValueError: If the model is not its network alone.
    """
    prefix = "denoiser.network." if isinstance(model, DiffusionModule) else "network."
    others = [name for name in model.state_dict() if not name.startswith(prefix)]
    if others:
        raise ValueError(f"{type(model).__name__} has tensors besides those of its network: {', '.join(others)}")
    return prefix


def read_diffusers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of a `DiffusionModule`, and tensors of its `UNet`, from a folder of diffusers.

    Args:
        folder: Of a pipeline, or of a `UNet2DModel` alone; then there is a network among the arguments and no process.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the pipeline has no equal here.
    """
    index = folder / "model_index.json"
    pipeline = read_json(index).get("_class_name") if index.is_file() else None
    if pipeline not in (None, *PIPELINES):
        raise ValueError(f"{folder} is a {pipeline}; only a {' or '.join(PIPELINES)} has an equal here")
    place = folder / "unet" if (folder / "unet").is_dir() else folder
    files = [place / name for name in WEIGHTS_FILES if (place / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{place} has no {' or '.join(WEIGHTS_FILES)}; only whole, unsharded weights are read")
    network_args = unet2d.arguments(read_json(place / "config.json"))
    tensors = read(files[0])
    if not is_state(tensors):
        raise ValueError(f"{files[0]} does not hold tensors by name")
    with torch.device("meta"):
        # Sizes come from the file: they are compared with its tensors before memory is taken.
        shapes = UNet(**network_args)
    state = unet2d.from_diffusers(tensors, shapes, files[0])
    parts = {"network": scheduler.part(UNet, **network_args)}
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            parts |= scheduler.arguments(read_json(path))
            break
    return parts, state


def import_diffusers(folder: Path, recipe: dict[str, Any]) -> tuple[L.LightningModule, dict[str, Any]]:
    """A model with the weights of a folder of diffusers, and the configuration it carries.

    What the folder says wins over the recipe, which may add the rest: data, scores, optimiser.
    """
    parts, state = read_diffusers(folder)
    model_args = recipe.get("model", {}).get("init_args", {})
    if "process" not in {**model_args, **parts}:
        raise ValueError(f"{folder} has no scheduler: give by -c the recipe whose process its network was trained on")
    model, filled = make({"init_args": {**model_args, **parts}})
    size = parts["network"]["init_args"]["image_size"]
    channels = parts["network"]["init_args"]["in_channels"]
    images = {"root": "data/images", "image_size": size, **({"channels": channels} if channels in (1, 3) else {})}
    data = {"class_path": "diffusion_lit.data.Folder", "init_args": images}
    load(model, state)
    return model, {"seed_everything": 0, "data": data, **recipe, "model": filled}


def import_file(path: Path, recipe: dict[str, Any], weights: str | None) -> tuple[L.LightningModule, dict[str, Any]]:
    """A model that a recipe makes, with the weights of a file in which tensors are named as ours, and what it carries.

    Raises:
        ValueError: If there is no recipe, or the tensors are not exactly its network's.
    """
    state = choose_state(read(path), weights, path)
    if DIFFUSERS_TENSOR in state:
        raise ValueError(f"{path} has diffusers' layout; give its folder, in which config.json says what it is")
    if "model" not in recipe:
        raise ValueError(
            f"{path} does not say of what network it is: give a recipe by -c, such as configs/cifar10.yaml"
        )
    model, filled = make(recipe["model"])
    network = model.get_submodule(prefix_of(model)[:-1])
    check_tensors({name: tensor.shape for name, tensor in network.state_dict().items()}, state, path)
    load(model, state)
    return model, {"seed_everything": 0, **recipe, "model": filled}


def load(model: L.LightningModule, state: Mapping[str, Tensor]) -> None:
    """Gives a model the tensors of its network, in the precision that it has."""
    prefix = prefix_of(model)
    model.load_state_dict({prefix + name: tensor for name, tensor in state.items()})


def save(model: L.LightningModule, config: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint as `fit` does before its first step: `fit --ckpt_path` starts there too."""
    model.config = config  # type: ignore[assignment]
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[WholeFiles()],
        )
        trainer.strategy.connect(model)
        trainer.save_checkpoint(path, weights_only=False)
    finally:
        log.setLevel(level)


def main(args: Sequence[str]) -> None:
    """Makes a checkpoint from published weights.

    Raises:
        ValueError: If they do not fit, a file is not safe to read, or there is a checkpoint of that name already.
    """
    parser = argparse.ArgumentParser(prog="diffusion_lit import", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="a folder of diffusers, or a file of DDIM's or OpenAI's layout")
    parser.add_argument("--out", required=True, help="the checkpoint to write")
    parser.add_argument("-c", "--config", action="append", default=[], help="a recipe; later ones win")
    parser.add_argument(
        "--weights", choices=(AVERAGED, RAW), help="of a file that holds both; averaged unless said otherwise"
    )
    given = parser.parse_args(args)
    source, out = Path(given.source), Path(given.out)
    if out.exists():
        raise ValueError(f"{out} exists already; choose another file with --out")
    recipe = read_recipes(given.config)
    if source.is_dir() and given.weights is not None:
        raise ValueError(f"{source} holds one set of weights; leave out --weights {given.weights}")
    imported = import_diffusers(source, recipe) if source.is_dir() else import_file(source, recipe, given.weights)
    save(*imported, out)
    print(f"{out}: {sum(p.numel() for p in imported[0].parameters()):,} parameters")
