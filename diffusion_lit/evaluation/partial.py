"""Results of single batches on disk, so that what was interrupted continues where it stopped."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lit.files import whole_file

KEY = "key.json"


class PartialResults:
    """A folder with one file of tensors for each batch that is done.

    Files are written whole or not at all and belong to batches, not to processes: another number of processes can
    continue.

    Args:
        folder: Where to.
        key: Plain data; what the results depend on. The folder is this key's alone.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.key = dict(key)

    def open(self) -> None:
        """Makes the folder and writes the key down; on one process, before the others go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / KEY) as file:
            file.write(json.dumps(self.key, indent=1, sort_keys=True).encode())

    def path(self, batch: int) -> Path:
        """Where a batch's tensors lie."""
        return self.folder / f"{batch:06d}.npz"

    def save(self, batch: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a batch's tensors."""
        with whole_file(self.path(batch)) as file:
            np.savez(file, **{name: tensor.cpu().numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]

    def load(self, batch: int) -> dict[str, Tensor] | None:
        """A batch's tensors, None if it is not done or its file is damaged."""
        try:
            with self.path(batch).open("rb") as opened:
                file = np.load(opened, allow_pickle=False)
                return {name: torch.from_numpy(file[name]) for name in file.files}
        except Exception:  # Damaged bytes raise nearly anything; the batch is made again.
            return None

    def done(self, batch: int) -> bool:
        """Whether a batch's tensors are there and can be read."""
        return self.path(batch).is_file() and self.load(batch) is not None

    def columns(self, num_batches: int) -> dict[str, Tensor]:
        """The tensors of batches 0 .. num_batches - 1, joined along their rows.

        Raises:
            RuntimeError: If one is missing.
        """
        parts: dict[str, list[Tensor]] = {}
        for batch in range(num_batches):
            tensors = self.load(batch)
            if tensors is None:
                raise RuntimeError(f"{self.path(batch)} is missing: all processes must see one file system")
            for name, tensor in tensors.items():
                parts.setdefault(name, []).append(tensor)
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def others(self) -> list[tuple[Path, list[str]]]:
        """Unfinished results of other keys beside this one, each with the names of what differs."""
        found = []
        for file in sorted(self.folder.parent.glob(f"*/{KEY}")):
            if file.parent != self.folder:
                try:
                    theirs = json.loads(file.read_text())
                except ValueError:
                    continue
                found.append((file.parent, differences(theirs, self.key)))
        return found

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """The dotted names under which two nested structures differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [found for key in keys for found in differences(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))]
    return [] if a == b else [name]
