"""Files from elsewhere, read without executing anything in them, and what they hold checked before it is used."""

import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusion_lit.module import RAW

LISTED = 20


def read(path: Path) -> object:
    """What a file of weights holds, on the CPU: tensors by name of a .safetensors file, of any other what was pickled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds more than tensors and plain data.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            # A pickle protocol that torch does not write itself; what it cannot read is an error anyway.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise ValueError(f"{path} is damaged, or no file of tensors: torch.load cannot read it safely") from error
        raise ValueError(
            f"{path} asks for {asked[1]}, and only tensors and plain data are read, because a pickle can run any "
            "program; have its author save the tensors alone, as safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no file of tensors ({' '.join(str(error).split())[:200]})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; a configuration of diffusers is one")
    return value


def is_state(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether a value is tensors by name, one at least."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def choose_state(held: object, weights: str | None, source: Path) -> dict[str, Tensor]:
    """The tensors by name in what a published PyTorch checkpoint holds.

    That is tensors by name, or a list, such as DDIM's code writes, in which raw weights come first and averaged ones,
    if there are any, later. Names lose the "module." that DataParallel gave them.

    Args:
        held: From `read`.
        weights: "averaged" or "raw"; None: averaged ones where there are two sets.
        source: For messages.

    Raises:
        ValueError: If there are none, or not those asked for.
    """
    states = [part for part in (held if isinstance(held, Sequence) else [held]) if is_state(part)]
    if not 1 <= len(states) <= 2:
        found = f"keys {[str(k) for k in held][:LISTED]}" if isinstance(held, Mapping) else type(held).__name__
        raise ValueError(
            f"{source} holds {len(states)} sets of tensors by name where 1 or 2 are known what to do with ({found}); "
            "save the network's state_dict alone"
        )
    if len(states) == 1 and weights is not None:
        raise ValueError(f"{source} holds one set of weights; leave out --weights {weights}")
    state = dict(states[0 if weights == RAW else -1])
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def check_tensors(expected: Mapping[str, Sequence[int]], given: Mapping[str, Tensor], source: Path) -> None:
    """Refuses tensors that are not exactly those of the network.

    Args:
        expected: Shapes by name.
        given: The tensors.
        source: For messages.

    Raises:
        ValueError: If a tensor is missing, unknown, of another shape or not of floating-point numbers. The message
            names them, of each sort the first 20 and how many more there are.
    """
    both = [name for name in expected if name in given]
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name])}"
        for name in both
        if tuple(given[name].shape) != tuple(expected[name])
    ]
    wrong = {
        "missing": [name for name in expected if name not in given],
        "unknown": [name for name in given if name not in expected],
        "misshapen": misshapen,
        "not floating point": [f"{n} {given[n].dtype}" for n in both if not given[n].is_floating_point()],
    }
    parts = [f"{sort}: {listed(names)}" for sort, names in wrong.items() if names]
    if parts:
        raise ValueError(
            f"{source} does not fit the network, so nothing was loaded; {'; '.join(parts)}; "
            "the configuration must be that of these weights"
        )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
