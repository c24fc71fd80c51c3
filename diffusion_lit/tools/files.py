"""Reads files of weights without executing anything in them, and checks what they hold before it is used."""

import json
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffusion_lit.checkpoint import AVERAGED, RAW

LISTED = 20
SAFETENSORS = "model.safetensors"
"""The file in a folder that `export` writes, other than one of diffusers."""
LARGE = 500_000_000
"""Bytes from which on a tool takes long enough to say what it does."""


def announce(source: Path) -> None:
    """Says on standard error that a large file or folder is being read, which is all that takes long."""
    files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
    size = sum(path.stat().st_size for path in files if path.is_file())
    if size >= LARGE:
        sys.stderr.write(f"reading {source}, {size / 1e9:.1f} GB\n")


def read(path: Path) -> object:
    """Reads a file of weights on the CPU.

    Returns:
        Tensors by name for a .safetensors file; for any other file the object that was pickled.

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


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata of a .safetensors file that `read` has read; empty for any other file."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    return parse_json(path.read_bytes(), path)


def parse_json(text: str | bytes, source: Path | str) -> dict[str, Any]:
    """Reads an object in JSON.

    Raises:
        ValueError: If it is anything else; names the source.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} holds no JSON object, which a configuration is")
    return value


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context in which what a configuration says is used: errors name its file, and are of values, in one line.

    Raises:
        ValueError: Instead of any other error that sizes, types or numbers that cannot be lead to.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error


def is_state(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether a value is a mapping from names to tensors, with one at least."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def choose_state(held: object, weights: str | None, source: Path) -> tuple[dict[str, Tensor], str | None]:
    """Chooses one set of weights from the content of a published PyTorch checkpoint.

    That is tensors by name, or a list, as DDIM's code writes it, in which averaged weights, if there are any, come
    after the raw ones.

    Args:
        held: From `read`.
        weights: "averaged" or "raw"; None: averaged where there are two sets.
        source: For messages.

    Returns:
        Tensors by their plain names, see `plain_names`; and which of two sets they are, None where there is one.

    Raises:
        ValueError: If there are none, or not those asked for.
    """
    states = [part for part in (held if isinstance(held, Sequence) else [held]) if is_state(part)]
    if not 1 <= len(states) <= 2:
        found = f"keys {[str(k) for k in held][:LISTED]}" if isinstance(held, Mapping) else type(held).__name__
        raise ValueError(
            f"{source} holds {len(states)} sets of tensors by name ({found}) instead of 1 or 2; "
            "save the network's state_dict alone"
        )
    if len(states) == 1 and weights is not None:
        raise ValueError(f"{source} holds one set of weights; leave out --weights {weights}")
    chosen = (weights or AVERAGED) if len(states) == 2 else None
    return plain_names(states[0 if chosen == RAW else -1]), chosen


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes what wrappers add to the names of tensors.

    These are "_orig_mod.", by torch.compile, wherever it stands, and "module.", by DataParallel, where all names begin
    with it. Names that would become equal are left alone.
    """
    new = {name: re.sub(r"(^|(?<=\.))_orig_mod\.", "", name) for name in state}
    while all(name.startswith("module.") for name in new.values()):
        new = {old: name.removeprefix("module.") for old, name in new.items()}
    if len(set(new.values())) < len(new):
        return dict(state)
    return {new[name]: tensor for name, tensor in state.items()}


def check_tensors(expected: Mapping[str, Sequence[int]], given: Mapping[str, Tensor], source: Path) -> None:
    """Checks that tensors are exactly those of a network, and finite.

    Args:
        expected: Shapes by name.
        given: The tensors.
        source: For messages.

    Raises:
        ValueError: If a tensor is missing, unknown, of another shape, not of floating-point numbers, or has an element
            that is infinite or not a number. The message names them: of each kind the first 20 and how many more.
    """
    both = [name for name in expected if name in given]
    shaped = [name for name in both if tuple(given[name].shape) == tuple(expected[name])]
    wrong = {
        "missing": [name for name in expected if name not in given],
        "unknown": [name for name in given if name not in expected],
        "misshapen": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name])}"
            for name in both
            if name not in shaped
        ],
        "not floating point": [f"{n} {given[n].dtype}" for n in both if not given[n].is_floating_point()],
    }
    parts = [f"{kind}: {listed(names)}" for kind, names in wrong.items() if names]
    if parts:
        raise ValueError(
            f"{source} does not fit the network, so nothing was loaded; {'; '.join(parts)}; "
            "the configuration must be that of these weights"
        )
    broken = [name for name in shaped if not bool(given[name].isfinite().all())]
    if broken:
        raise ValueError(
            f"{source} has weights that are infinite or not a number, so nothing was loaded: {listed(broken)}; "
            "use weights from before training diverged"
        )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
