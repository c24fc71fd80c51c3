"""What benchmarks/memory.py counts on tensors without numbers is what a real forward pass keeps."""

import torch
from torch import Tensor

from benchmarks.memory import peak_bytes
from diffusion_lit.networks import UNet


def make(checkpoint_blocks: bool) -> UNet:
    return UNet(
        16, width=8, multipliers=(1, 2), attention=(8,), num_groups=4, dropout=0.1, checkpoint_blocks=checkpoint_blocks
    )


def test_what_is_kept_is_what_autograd_saves() -> None:
    network = make(False)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(torch.zeros(3, 3, 16, 16), torch.zeros(3))
    expected = sum(tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in own)
    assert out.requires_grad
    counted = peak_bytes(make, False, 3)
    # The output, the loss and the like are alive too.
    assert 0 <= counted["kept"] - expected <= 3 * out.untyped_storage().nbytes()
    assert counted["kept"] < counted["peak"] < 3 * counted["kept"]
    less = peak_bytes(make, True, 3)
    assert less["kept"] < counted["kept"] / 3
    assert less["peak"] < counted["peak"]
