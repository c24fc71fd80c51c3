"""What the tensors of a training step need at their peak, with and without `checkpoint_blocks`.

    python -m benchmarks.memory

Counted, not timed: networks run on fake CPU tensors, which have shapes and no numbers, and every storage is counted
from its birth to its death, through forward and backward pass; parameters and gradients are left out, kernels' own
workspaces unknown. So the largest network takes seconds on any machine.
"""

import argparse
import json
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_lit.networks import ADMUNet, UNet

NETWORKS: dict[str, tuple[int, Callable[[bool], UNet | ADMUNet]]] = {
    "UNet, CIFAR-10 32x32": (128, lambda on: UNet(checkpoint_blocks=on)),
    "UNet, LSUN 256x256": (
        4,
        lambda on: UNet(
            256, multipliers=(1, 1, 2, 2, 4, 4), attention=(16,), dropout=0.0, checkpoint_blocks=on
        ),
    ),
    "ADMUNet, LSUN 256x256": (
        4, lambda on: ADMUNet(256, out_channels=6, head_channels=64, dropout=0.1, checkpoint_blocks=on)
    ),
}  # fmt: skip


class Living(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live.

    Args:
        known: Tensors that are there already, and do not count.

    Attributes:
        now: Bytes alive.
        peak: The most there were.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage, unless it is known."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        """A storage has died."""
        self.seen.discard(key)
        self.now -= size


def network_bytes(make: Callable[[], nn.Module], batch_size: int, bf16: bool = False) -> dict[str, int]:
    """What lives beside parameters and gradients: at the end of the forward pass, and at the worst moment.

    Args:
        make: A network of images, 32x32 RGB unless its `in_channels` and `image_size` say otherwise.
        batch_size: Of those images.
        bf16: Whether the forward pass runs in bf16 by autocast.
    """
    with FakeTensorMode():
        network = make()
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        size = getattr(network, "image_size", 32)
        x = torch.zeros(batch_size, cast(int, getattr(network, "in_channels", 3)), size, size)
        with Living(network.parameters()) as living:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                answer = network(x, torch.zeros(batch_size))
            loss = getattr(answer, "sample", answer).square().mean()
            kept = living.now
            loss.backward()
        return {"kept": kept, "peak": living.peak}


def peak_bytes(make: Callable[[bool], UNet | ADMUNet], checkpoint_blocks: bool, batch_size: int) -> dict[str, int]:
    """`network_bytes` of a network of ours, in float32."""
    return network_bytes(partial(make, checkpoint_blocks), batch_size)


def main() -> None:
    """Prints a table; writes JSON if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="a JSON file to write")
    out = parser.parse_args().out
    rows = []
    print("| network | images | blocks | kept for backward | peak |\n|---|---|---|---|---|")
    for name, (batch_size, make) in NETWORKS.items():
        for on in (False, True):
            found = peak_bytes(make, on, batch_size)
            rows.append({"network": name, "batch_size": batch_size, "checkpoint_blocks": on, **found})
            sizes = " | ".join(f"{found[key] / 2**30:.2f} GiB" for key in ("kept", "peak"))
            print(f"| {name} | {batch_size} | {'computed again' if on else 'kept'} | {sizes} |", flush=True)
    if out:
        with open(out, "w") as file:
            json.dump({"torch": torch.__version__, "cases": rows}, file, indent=1)


if __name__ == "__main__":
    main()
