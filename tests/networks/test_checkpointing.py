"""Blocks that are computed again for gradients: less is kept, nothing else changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.networks import ADMUNet, UNet

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([0.0, 10.0, 999.0])
LABELS = {"label": torch.tensor([0, -1, 2])}


def unet(checkpoint_blocks: bool, dropout: float = 0.0) -> nn.Module:
    return UNet(
        16, width=8, multipliers=(1, 2, 2), attention=(8,), dropout=dropout, num_groups=4,
        checkpoint_blocks=checkpoint_blocks,
    )  # fmt: skip


def adm(checkpoint_blocks: bool, dropout: float = 0.0) -> nn.Module:
    return ADMUNet(
        16, width=8, multipliers=(1, 2, 2), attention=(8,), dropout=dropout, num_groups=4, head_channels=4,
        num_classes=4, null_label=True, checkpoint_blocks=checkpoint_blocks,
    )  # fmt: skip


NETWORKS = pytest.mark.parametrize("make", [unet, adm])


def awake(network: nn.Module) -> nn.Module:
    """With branches that no longer start at zero, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return network


def learn(network: nn.Module) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The output, every gradient, and a number drawn afterwards."""
    torch.manual_seed(2)
    x = IMAGES.clone().requires_grad_()
    out = network(x, TIMES, LABELS)
    out.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert x.grad is not None
    return out.detach(), {"x": x.grad, **gradients}, torch.rand(1)


@NETWORKS
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_and_random_numbers_are_the_same_bits(
    make: Callable[[bool, float], nn.Module], dropout: float
) -> None:
    plain, recomputing = (learn(awake(make(checkpoint, dropout))) for checkpoint in (False, True))
    assert torch.equal(plain[0], recomputing[0])
    assert plain[1].keys() == recomputing[1].keys()
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, recomputing[1][name]), name
    assert torch.equal(plain[2], recomputing[2])


def kept_bytes(network: nn.Module) -> int:
    """What the forward pass leaves for the backward pass, beside the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(IMAGES, TIMES, LABELS)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)


@NETWORKS
def test_a_third_is_kept_at_most(make: Callable[[bool], nn.Module]) -> None:
    assert kept_bytes(make(True)) < kept_bytes(make(False)) / 3


@NETWORKS
def test_without_gradients_every_block_is_computed_once(make: Callable[[bool], nn.Module]) -> None:
    network = awake(make(True)).eval()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(IMAGES, TIMES, LABELS)
    once = calls
    network(IMAGES, TIMES, LABELS).mean().backward()
    convolutions = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in network.modules())
    assert once == convolutions
    assert once < calls - once <= 2 * once


@NETWORKS
def test_weights_have_the_same_names(make: Callable[[bool], nn.Module]) -> None:
    assert make(True).state_dict().keys() == make(False).state_dict().keys()
