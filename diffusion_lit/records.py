"""Results as JSON lines, and parts as plain data, so that a figure says how it came about."""

import errno
import hashlib
import inspect
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

RESULTS = "results.jsonl"
CPU_INFO = Path("/proc/cpuinfo")
Plain = None | bool | int | float | str


def digest(tensors: Iterable[tuple[str, Tensor]], settings: str = "") -> str:
    """The first 16 hex digits of a SHA-256 over settings and the names, types, shapes and bytes of tensors."""
    sha = hashlib.sha256(settings.encode())
    for name, tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        sha.update(array.reshape(-1).view(dtype=torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def describe(part: object) -> Any:
    """A part as plain data: its class and its public attributes, parts among them likewise.

    A module is told apart by a hash of its weights too. What is neither plain nor a part, functions say, is left out.
    """
    if isinstance(part, Plain):
        return part
    if isinstance(part, list | tuple):
        return [describe(item) for item in part]
    public = {name: value for name, value in vars(part).items() if not name.startswith("_") and name != "training"}
    described: dict[str, Any] = {"class": type(part).__qualname__}
    described |= {name: describe(value) for name, value in sorted(public.items()) if _is_describable(value)}
    if isinstance(part, nn.Module):
        described["weights"] = digest(part.state_dict().items())
    return described


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


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON line to a file in a single write, and waits until it is on the disk.

    Raises:
        OSError: If not all of it could be written; the file is as it was then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record) + "\n").encode()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(file, line) != len(line):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file)
    finally:
        os.close(file)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, oldest first; none where there is no file. A line that was cut short is passed over."""
    records = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def read_recipe(path: Path | str) -> dict[str, Any]:
    """What a recipe says.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is no YAML of keys and values.
    """
    try:
        said = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} is no configuration; give a recipe such as configs/cifar10.yaml")
    return said
