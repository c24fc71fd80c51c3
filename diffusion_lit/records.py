"""Results as JSON lines, and parts as plain data, so that a figure says how it came about."""

import errno
import hashlib
import inspect
import json
import math
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lit.frozen import Frozen

RESULTS = "results.jsonl"
CPU_INFO = Path("/proc/cpuinfo")
Plain = None | bool | int | float | str


class NonFinite(ValueError):
    """Images or scores are infinite or not a number; they do not go on record."""


def digest(tensors: Iterable[tuple[str, Tensor]], settings: str = "") -> str:
    """The first 16 hex digits of a SHA-256 over settings and the names, types, shapes and bytes of tensors."""
    sha = hashlib.sha256(settings.encode())
    for name, tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        sha.update(array.reshape(-1).view(dtype=torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def describe(part: object) -> Any:
    """Returns a part as plain data: its class and its public attributes, parts among them described likewise.

    A module is identified by a hash of its tensors too. Child modules that its constructor takes are parts; others, and
    torch's own, are layers, which only the hash covers. A `Frozen` network is described as the network that it holds.
    Attributes that are neither plain nor parts, such as functions, are left out.
    """
    if isinstance(part, Plain):
        return part
    if isinstance(part, list | tuple):
        return [describe(item) for item in part]
    if isinstance(part, Frozen):
        return describe(part.network)
    public = {name: value for name, value in vars(part).items() if not name.startswith("_") and name != "training"}
    if isinstance(part, nn.Module):
        public |= _child_parts(part)
    described: dict[str, Any] = {"class": type(part).__qualname__}
    described |= {name: describe(value) for name, value in sorted(public.items()) if _is_describable(value)}
    if isinstance(part, nn.Module):
        described["weights"] = digest(_tensors(part))
    return described


def _child_parts(module: nn.Module) -> dict[str, nn.Module]:
    taken = inspect.signature(type(module)).parameters
    return {
        name: child
        for name, child in module.named_children()
        if name in taken and not type(child).__module__.startswith("torch.")
    }


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module's state, then those of its frozen networks, which no state holds."""
    yield from module.state_dict(prefix=prefix).items()
    for name, child in module.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(child, Frozen):
            yield from _tensors(child.network, f"{name}.network.".removeprefix("."))


def _is_describable(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_describable, value))
    if isinstance(value, Tensor | type) or inspect.isroutine(value):
        return False
    return isinstance(value, Plain) or hasattr(value, "__dict__")


def device_name(device: torch.device) -> str:
    """What a device calls itself: "cuda (NVIDIA H100 ...)", "cpu (AMD EPYC ...)"."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu" and CPU_INFO.is_file():
        names = [line.partition(":")[2].strip() for line in CPU_INFO.read_text().splitlines() if "model name" in line]
        return f"cpu ({names[0] if names else platform.machine()})"
    return f"{device.type} ({platform.machine()})"


def key_of(what: Any) -> str:
    """The first 16 hex digits of a SHA-256 over plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Appends lines to a file in a single write, and waits until they are on the disk.

    Raises:
        OSError: If not all of them could be written; the file is unchanged then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines).encode()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            text = b"\n" + text
        if os.write(file, text) != len(text):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file)
    finally:
        os.close(file)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Appends one record as a JSON line.

    Raises:
        NonFinite: If a value is not finite; the message names it.
        OSError: If it could not be written; the file is unchanged then.
    """
    for name, value in _numbers(record):
        if not math.isfinite(value):
            raise NonFinite(f"{name}={value} is not finite: the result is not recorded in {path}")
    append_lines(path, [json.dumps(record, allow_nan=False)])


def append_once(path: Path, record: dict[str, Any], names: Iterable[str]) -> bool:
    """Appends a record unless the file has one that agrees with it in the given entries.

    Args:
        path: The file.
        record: The record.
        names: The entries that are compared; others, such as the time that a result took, may differ.

    Returns:
        Whether it was appended.

    Raises:
        NonFinite: If a value is not finite.
        OSError: If it could not be written; the file is unchanged then.
    """
    compared = json.loads(json.dumps({name: record.get(name) for name in names}))
    if any(compared == {name: other.get(name) for name in compared} for other in read_records(path)):
        return False
    append_record(path, record)
    return True


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers inside plain data, with their dotted names."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _numbers(item, f"{name}.{key}" if name else str(key))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file, oldest first; none if there is no file. Incomplete lines are skipped."""
    records = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                records.append(record)
    return records
