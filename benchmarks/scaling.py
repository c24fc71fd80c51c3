"""Several GPUs by arithmetic alone: what sending the gradients costs beside computing them.

    python -m benchmarks.scaling

Parameters and operations are counted on the networks themselves; rates are assumptions, to be given. Gradients are
float32, as of bf16-mixed too. They are summed within nodes of 8 GPUs over NVLink and between nodes over one network
card for each GPU, in rings: of S bytes every member of a ring of n sends 2 (n - 1) / n S.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lit.networks import ADMUNet, UNet

NODE = 8
NETWORKS: dict[str, tuple[int, Callable[[], UNet | ADMUNet]]] = {
    "UNet, CIFAR-10 32x32": (128, UNet),
    "UNet, LSUN 256x256": (
        64,
        lambda: UNet(256, multipliers=(1, 1, 2, 2, 4, 4), attention=(16,), dropout=0.0),
    ),
    "ADMUNet, LSUN 256x256": (256, lambda: ADMUNet(256, out_channels=6, head_channels=64, dropout=0.1)),
}
"""With the batch of the paper's recipe."""


@dataclass(frozen=True)
class Rates:
    """Assumptions.

    Attributes:
        flops: Of one GPU, effective, operations per second; a multiply-add is two.
        nvlink: Within a node, bytes per second of one GPU in one direction.
        card: Between nodes, likewise.
    """

    flops: float
    nvlink: float
    card: float

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds to sum so many bytes over so many GPUs, in full nodes or in a part of one."""
        within, nodes = min(gpus, NODE), max(gpus // NODE, 1)
        return 2 * (within - 1) / within * size / self.nvlink + 2 * (nodes - 1) / nodes * size / within / self.card


def size_and_work(network: nn.Module, image_size: int) -> tuple[int, float]:
    """Parameters; operations to train on one image, three times those of the forward pass."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, image_size, image_size), torch.zeros(1))
    return sum(p.numel() for p in network.parameters()), 3.0 * counter.get_total_flops()


def scale(parameters: int, work: float, batch_size: int, gpus: int, rates: Rates) -> dict[str, Any]:
    """What a step of a whole batch takes.

    Returns:
        "sending" and "computing", seconds; "share", of a step that does the one after the other; "batch" from which on
        that share is at most a tenth.
    """
    sending = rates.all_reduce(4 * parameters, gpus)
    computing = work * batch_size / gpus / rates.flops
    return {
        "sending": sending,
        "computing": computing,
        "share": sending / (sending + computing),
        "batch": 9 * sending * rates.flops / work * gpus,
    }


def main(args: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teraflops", type=float, default=300, help="of one GPU, effective")
    parser.add_argument("--nvlink", type=float, default=300, help="GB/s of one GPU in one direction, effective")
    parser.add_argument("--card", type=float, default=40, help="GB/s of the network card that each GPU has, effective")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    given = parser.parse_args(args)
    rates = Rates(given.teraflops * 1e12, given.nvlink * 1e9, given.card * 1e9)
    print("| network, batch | gradients | GPUs | sending | computing | share of sending | batch for a tenth |")
    print("|---|---|---|---|---|---|---|")
    for name, (batch_size, make) in NETWORKS.items():
        with FakeTensorMode():
            network = make()
            parameters, work = size_and_work(network, network.image_size)
        for gpus in given.gpus:
            found = scale(parameters, work, batch_size, gpus, rates)
            times = " | ".join(f"{1e3 * found[key]:.2f} ms" for key in ("sending", "computing"))
            ends = f"{found['share']:.0%} | {found['batch']:,.0f}"
            print(f"| {name}, {batch_size} | {4 * parameters / 1e6:,.0f} MB | {gpus} | {times} | {ends} |")


if __name__ == "__main__":
    main()
