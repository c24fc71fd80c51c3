"""Autoencoders from checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_lit.checkpoint import choose_weights, read_checkpoint
from diffusion_lit.configuration import Merge, instantiate
from diffusion_lit.networks import Autoencoder
from diffusion_lit.parts import MISSING, Slot
from diffusion_lit.records import digest

OPTION = "codec.checkpoint"


class Trained(NamedTuple):
    """An autoencoder from a checkpoint.

    Attributes:
        network: With its weights.
        config: Its class and arguments, as plain data.
    """

    network: Autoencoder
    config: dict[str, Any]


def read_autoencoder(path: str | Path) -> Trained:
    """The autoencoder in the checkpoint of any system whose `network` is one; its averaged weights, if there are any.

    Args:
        path: The checkpoint, from `fit` or `import`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, is of something else, or names what is not of this package.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{OPTION}={path}: there is no such file; train an autoencoder, and give its checkpoint by --model.{OPTION}"
        )
    checkpoint = read_checkpoint(file)
    model: Mapping[str, Any] = (checkpoint.get("config") or {}).get("model") or {}
    given = (model.get("init_args") or {}).get("network")
    weights = choose_weights(checkpoint)
    prefix = "network."
    state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if given is None or not any(name.startswith("encoder.") for name in state):
        kind = str(model.get("class_path", "something unknown")).rpartition(".")[2]
        raise ValueError(
            f"{OPTION}={path} is a checkpoint of {kind}, not of an autoencoder; give that of a first stage by "
            f"--model.{OPTION}"
        )
    config = Merge(source=str(file)).value(Slot(Autoencoder), MISSING, given, "model.network")
    with torch.random.fork_rng(devices=[]):  # What is initialized here is overwritten.
        network = instantiate(config, Autoencoder, source=str(file))
    fill(network, state, f"{OPTION}={path}")
    return Trained(network, config)


def fill(network: Autoencoder, state: Mapping[str, Tensor], source: str) -> None:
    """Gives an autoencoder its weights.

    Raises:
        ValueError: If they are another network's, or not finite.
    """
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{source}: {len(wrong)} tensors are not those of codec.network, first {name}: "
            f"{shapes.get(name, 'missing')} there and {own.get(name, 'missing')} in it; set --model.codec.network null "
            "to take the network from the checkpoint"
        )
    broken = [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise ValueError(f"{source}: {len(broken)} weights are not finite, first {broken[0]}; take another checkpoint")
    network.load_state_dict(dict(state))


def fingerprint_of(network: Autoencoder) -> str:
    """16 hex digits that identify the architecture and the weights of an autoencoder."""
    return digest(network.state_dict().items(), repr(network))
