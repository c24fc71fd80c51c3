"""Makes a checkpoint from published weights.

    python -m diffusion_lit import ddpm-cifar10-32/ --out runs/x/checkpoints/imported.ckpt
    python -m diffusion_lit import ema_diffusion_cifar10.ckpt -c cifar10 --out ...

SOURCE is a folder of diffusers or a model.safetensors of `export`, which carry their configuration, or a file in the
layout of DDIM's, OpenAI's or latent diffusion's code, for which a recipe gives it; these name their tensors as our
networks do.
"""

import argparse
import copy
import glob
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from diffusion_lit.checkpoint import AVERAGED, PART, RAW, WholeFiles
from diffusion_lit.codecs import FirstStage
from diffusion_lit.codecs.files import fingerprint_of
from diffusion_lit.command import known_elsewhere, without
from diffusion_lit.conditioners import Text
from diffusion_lit.configuration import Merge, build
from diffusion_lit.data import Folder, ImageData
from diffusion_lit.locks import locked
from diffusion_lit.module import DiffusionModule
from diffusion_lit.parts import MISSING
from diffusion_lit.recipes import layers
from diffusion_lit.sections import CARRIED, SEED
from diffusion_lit.system import System
from diffusion_lit.terminal import printable
from diffusion_lit.tools import compvis
from diffusion_lit.tools.diffusers_config import with_null_label
from diffusion_lit.tools.diffusers_folder import AUTOENCODER, DIFFUSION, PLACES, read_folder, read_scheduler
from diffusion_lit.tools.files import (
    SAFETENSORS,
    announce,
    check_tensors,
    choose_state,
    listed,
    parse_json,
    read,
    read_metadata,
)
from diffusion_lit.tools.scheduler import part

DIFFUSERS_TENSORS = {"time_embedding.linear_1.weight", "encoder.conv_norm_out.weight"}
ADVERSARIAL = "adversarial"
"""The part of a model with its discriminator."""
OPTIONAL = (f"{ADVERSARIAL}.", "codec.")
"""With which the names of tensors begin that may be missing. The codec's say how latents are scaled, which is
configured."""


class Imported(NamedTuple):
    """A model with published weights.

    Attributes:
        model: Holds the weights.
        config: What its checkpoint carries.
        source: The file that the weights are from.
        weights: Which of two sets of weights in the source they are; None: there is one.
        scale: Factor from an autoencoder's latents to those that are diffused, where its source says it.
        ignored: What the source holds besides and has no equal here.
    """

    model: System
    config: dict[str, Any]
    source: Path
    weights: str | None
    scale: float | None = None
    ignored: tuple[str, ...] = ()


def read_recipes(
    names: Sequence[str], trust: Collection[str] = (), below: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The sections of recipes that a checkpoint carries, later recipes laid over earlier ones.

    Args:
        names: Paths, or names of recipes.
        trust: Modules and classes outside of this package that they may name.
        below: Sections that the recipes are laid over.

    Raises:
        FileNotFoundError: If there is no such recipe.
        ValueError: If a file is no configuration, or has a section that there is not.
    """
    tree, others = dict(below or {}), known_elsewhere() - CARRIED.keys()
    for name in names:
        for layer in layers(name):
            content = without(layer.tree, others)
            tree = Merge(trust, layer.source).sections(tree, content, CARRIED)
    return tree


def make(config: Mapping[str, Any], trust: Collection[str] = (), source: str = "") -> tuple[System, dict[str, Any]]:
    """Makes a model from its configuration.

    Args:
        config: Class and arguments.
        trust: Modules and classes outside of this package that it may name.
        source: The file that it is from, for messages.

    Returns:
        The model, and its configuration with all that was left out filled in.

    Raises:
        ValueError: If the configuration makes no model.
    """
    filled = Merge(trust, source).value(CARRIED["model"], MISSING, config, "model")
    # The command line sets it from seed_everything.
    filled["init_args"].pop("seed", None)
    base: type[System] = System  # type: ignore[type-abstract]
    return build(filled, base, trust, source, "model"), filled


def network_of(model: System) -> nn.Module:
    """The network of a model."""
    return cast(nn.Module, model.denoiser.network if isinstance(model, DiffusionModule) else model.network)


def check_scaled(codec: object, source: Path) -> None:
    """Raises ValueError if a codec does not know how latents were scaled."""
    if isinstance(codec, FirstStage) and not codec.scale.isfinite().all():
        raise ValueError(
            f"{source} does not say by which factor latents were scaled; set model.codec.scale in a recipe of your own"
        )


def load(model: System, parts: Mapping[nn.Module, Mapping[str, Tensor]], source: Path) -> None:
    """Gives parts of a model their tensors, in the precision that they have.

    A discriminator may be missing, because a model is complete without; then it starts at random.

    Args:
        model: The model.
        parts: Parts of the model, and the tensors of each.
        source: For messages.

    Raises:
        ValueError: If they are not exactly the parts' tensors, or not finite, or others of the model are missing, or it
            is not known how its latents were scaled.
    """
    check_scaled(getattr(model, "codec", None), source)
    given = {id(tensor) for module in parts for tensor in module.state_dict(keep_vars=True).values()}
    others = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in given
        and not name.startswith(OPTIONAL)
        # Of a vocabulary, which is made anew at every call and has no shape of its own.
        and not name.endswith(_EXTRA_STATE_KEY_SUFFIX)
    ]
    if others:
        raise ValueError(f"{type(model).__name__} has tensors that {source} has not: {listed(others)}")
    for module, state in parts.items():
        own = module.state_dict()
        # Counters, as batch normalization has them.
        counts = {name: tensor for name, tensor in own.items() if not tensor.is_floating_point()}
        real = {name: tensor for name, tensor in state.items() if name not in counts}
        check_tensors({name: tensor.shape for name, tensor in own.items() if name not in counts}, real, source)
        module.load_state_dict({**counts, **state})


def fill_first_stage(model: System, state: Mapping[str, Tensor], source: Path) -> None:
    """Gives the codec of a diffusion model the tensors of its autoencoder.

    Raises:
        ValueError: If they are not exactly the autoencoder's, or the scale of its latents is not known.
    """
    codec = model.codec
    if not isinstance(codec, FirstStage):
        raise ValueError(
            f"{source} holds an autoencoder and the model has a {type(codec).__name__} for a codec; give a recipe of "
            "latent diffusion by -c"
        )
    check_scaled(codec, source)
    network = copy.deepcopy(codec.network)
    check_tensors({name: tensor.shape for name, tensor in network.state_dict().items()}, state, source)
    network.load_state_dict(state)
    codec.restore({"fingerprint": fingerprint_of(network), "weights": network.state_dict()})


def published_parts(
    model: System, state: Mapping[str, Tensor], weights: str | None, source: Path
) -> tuple[dict[nn.Module, Mapping[str, Tensor]], str | None]:
    """The parts of a model and their tensors in a checkpoint of latent diffusion's code.

    Returns:
        As for `load`; and which of two sets of weights they are, None where there is one.

    Raises:
        ValueError: If the checkpoint has no such parts, or was trained with another process.
    """
    network = network_of(model)
    own = network.state_dict()
    if not isinstance(model, DiffusionModule):
        tensors, chosen = compvis.first_stage(state, own, weights, source)
        parts: dict[nn.Module, Mapping[str, Tensor]] = {network: tensors}
        discriminator = getattr(getattr(model, ADVERSARIAL, None), "discriminator", None)
        tensors = compvis.part(state, compvis.DISCRIMINATOR)
        return {**parts, **({discriminator: tensors} if discriminator is not None and tensors else {})}, chosen
    compvis.check_process(state, model.process, source)
    stage = compvis.part(state, compvis.FIRST_STAGE)
    if stage:
        fill_first_stage(model, compvis.without_loss(stage), source)
    tensors, chosen = compvis.network(state, own, weights, source)
    parts = {network: tensors}
    weights_of_conditioner = dict(model.conditioner.named_parameters())
    if weights_of_conditioner:
        vocabularies = compvis.part(state, compvis.VOCABULARY)
        if not vocabularies:
            read_vocabularies(model.conditioner, source)
        parts[model.conditioner] = {**compvis.conditioner(state, weights_of_conditioner), **vocabularies}
    return parts, chosen


def read_vocabularies(conditioner: nn.Module, source: Path) -> None:
    """Has tokenizers read the files that a recipe gives; ValueError if it gives none for one without a vocabulary."""
    for text in (module for module in conditioner.modules() if isinstance(module, Text)):
        tokenizer = text.tokenizer
        if not tokenizer.ready and tokenizer.learns:
            raise ValueError(
                f"{source} does not hold the vocabulary of its texts; set model.conditioner.tokenizer.file to BERT's "
                "vocab.txt in a recipe of your own"
            )
        text.start(None, torch.device("cpu"))


def default_data(channels: int, size: int) -> dict[str, Any]:
    """A folder of images, for a checkpoint of which no recipe gives the data."""
    more = {"channels": channels} if channels in (1, 3) else {}
    return part(ImageData, source=part(Folder, root="data/images", image_size=size, **more))


def import_folder(
    folder: Path, recipes: Sequence[str], weights: str | None = None, trust: Collection[str] = ()
) -> Imported:
    """Imports a folder of diffusers; what it says wins over the recipes, which may add data, scores and optimiser."""
    found = read_folder(folder, weights)
    recipe = read_recipes(recipes, trust)
    given = recipe.get("model", {})
    arguments = {**(found.parts if found.model == AUTOENCODER else {}), **given.get("init_args", {})}
    of_recipe = given.get("init_args", {}).get("network") or {}
    arguments |= {name: value for name, value in found.parts.items() if name != "loss"}
    arguments["network"] = with_null_label(arguments["network"], of_recipe)
    if found.model == DIFFUSION and "process" not in found.parts and not given:
        above = folder.absolute().parent
        hint = f", or import {above}, which has one" if read_scheduler(above) else ""
        raise ValueError(
            f"{folder} has no scheduler: give by -c the recipe with the process that its network was trained with{hint}"
        )
    taken = arguments["network"]["init_args"]
    if "conditioner" not in arguments and (taken.get("context_width") or taken.get("concat_channels")):
        made = "attends to a context" if taken.get("context_width") else "takes further channels"
        raise ValueError(
            f"the network of {folder} {made}: give by -c the recipe with the conditioner that makes it, or import a "
            "whole pipeline"
        )
    model, filled = make({"class_path": found.model, **given, "init_args": arguments}, trust, str(folder))
    if found.first_stage is not None:
        fill_first_stage(model, found.first_stage, found.source)
    states: dict[nn.Module, Mapping[str, Tensor]] = {network_of(model): found.state}
    if found.conditioner:
        states[cast(DiffusionModule, model).conditioner] = found.conditioner
    load(model, states, found.source)
    result = imported(model, filled, recipe, found.source, found.weights)
    return result._replace(scale=found.scale, ignored=found.ignored)


def imported(
    model: System, filled: dict[str, Any], config: Mapping[str, Any], source: Path, weights: str | None
) -> Imported:
    """A model that has its weights, with the sections that its checkpoint carries.

    Args:
        model: The model.
        filled: Its configuration.
        config: Sections of recipes.
        source: The file that the weights are from.
        weights: Which of two sets they are.
    """
    channels, size, _ = model.image_shape
    sections = {SEED: 0, "data": default_data(channels, size), **config, "model": filled}
    return Imported(model, sections, source, weights)


def import_file(
    path: Path, recipes: Sequence[str], weights: str | None = None, trust: Collection[str] = ()
) -> Imported:
    """Imports a file whose tensors have the names of ours.

    Its configuration is that of its metadata, if it has any, with the recipes laid over it.

    Raises:
        ValueError: If there is no configuration, or the tensors are not exactly its network's.
    """
    held = read(path)
    published = compvis.published(held, path)
    state, chosen = ({}, None) if published is not None else choose_state(held, weights, path)
    if DIFFUSERS_TENSORS & state.keys():
        raise ValueError(f"{path} has diffusers' layout; give its folder, in which config.json says what it is")
    carried = read_metadata(path).get("model")
    below: dict[str, Any] = {}
    if carried is not None:
        below = Merge(trust, str(path)).sections({}, {"model": parse_json(carried, f"the metadata of {path}")}, CARRIED)
    config = read_recipes(recipes, trust, below)
    if "model" not in config:
        raise ValueError(f"{path} does not say which network it is of: give a recipe by -c, such as -c cifar10")
    described = config["model"] if published is None else compvis.described(config["model"], published)
    model, filled = make(described, trust, str(path) if carried else " ".join(recipes))
    parts: dict[nn.Module, Mapping[str, Tensor]] = {network_of(model): state}
    if published is not None:
        parts, chosen = published_parts(model, published, weights, path)
    load(model, parts, path)
    return imported(model, filled, config, path, chosen)


def save(model: System, config: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint as `fit` does before its first step, so that `fit --ckpt_path` can start from it too."""
    model.config = config
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


def report(imported: Imported, source: Path, out: Path) -> str:
    """What was imported, for the user."""
    line = f"{out}: {sum(p.numel() for p in imported.model.parameters()):,} parameters"
    if imported.weights is not None:
        other = RAW if imported.weights == AVERAGED else AVERAGED
        line += f", {imported.weights} weights of {imported.source}; --weights {other} chooses the others"
    if imported.scale is not None:
        line += f"; for diffusion in its latents set codec.scale to {imported.scale}"
    if imported.ignored:
        line += f"; not imported: {', '.join(imported.ignored)}"
    beside = source.parent / PLACES[AVERAGED]
    if source.name == PLACES[RAW] and beside.is_dir():
        line += f"; averaged weights lie beside it, in {beside}"
    return line


def require_absent(out: Path) -> None:
    """Raises ValueError if there is a file where the checkpoint is to be written."""
    if out.exists():
        raise ValueError(f"{out} exists already; choose another file with --out")


def main(args: Sequence[str]) -> None:
    """Makes a checkpoint from published weights.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the weights do not fit, a file is not safe to read, or the checkpoint exists already.
    """
    parser = argparse.ArgumentParser(prog="diffusion_lit import", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="a folder of diffusers or of export, or a file of published code")
    parser.add_argument("--out", required=True, help="the checkpoint to write")
    parser.add_argument("-c", "--config", action="append", default=[], help="a recipe; later ones win")
    parser.add_argument("--weights", choices=(AVERAGED, RAW), help="where the source holds both; averaged by default")
    parser.add_argument(
        "--trust", action="append", default=[], help="a module or class that the configuration may name"
    )
    given = parser.parse_args(args)
    source, out = Path(given.source), Path(given.out)
    if (source / SAFETENSORS).is_file() and not any(source.glob("*.json")):
        # A folder as `export` writes it. One of another program has its configuration beside the weights.
        source = source / SAFETENSORS
    require_absent(out)
    announce(source)
    run = import_folder if source.is_dir() else import_file
    imported = run(source, given.config, given.weights, given.trust)
    with locked(out.with_name(f".{out.name}.lock"), "imports", remove=True):
        for part in out.parent.glob(f"{glob.escape(out.name)}.*{PART}"):
            part.unlink(missing_ok=True)  # of a process that was killed
        require_absent(out)
        save(imported.model, imported.config, out)
    print(printable(report(imported, source, out)))
