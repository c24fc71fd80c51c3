"""Small networks, inputs for them, and what tests of networks share."""

import torch
from torch import nn

from diffusion_lit.networks import ADMUNet, DDPMpp, NoisyClassifier, UNet

SHAPE: dict[str, object] = {
    "image_size": 8,
    "width": 8,
    "multipliers": (1, 2),
    "num_blocks": 1,
    "attention": (4,),
    "num_groups": 4,
}
"""Two resolutions of 8 and 16 channels, attention at the lower one."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IMAGES = torch.randn(3, 3, 8, 8, generator=seeded())
TIMES = torch.tensor([0.0, 10.0, 999.0])


def randomize(module: nn.Module) -> None:
    """Draws all parameters, so that the branches that start at zero matter."""
    generator = seeded(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)


def small_unet(**changes: object) -> UNet:
    return UNet(**{**SHAPE, "dropout": 0.0, **changes})  # type: ignore[arg-type]


def small_adm(**changes: object) -> ADMUNet:
    return ADMUNet(**{**SHAPE, "head_channels": 4, **changes})  # type: ignore[arg-type]


def small_ddpmpp(**changes: object) -> DDPMpp:
    shape = {name: value for name, value in SHAPE.items() if name != "num_groups"}
    return DDPMpp(**{**shape, "dropout": 0.0, **changes})  # type: ignore[arg-type]


def small_classifier(**changes: object) -> NoisyClassifier:
    return NoisyClassifier(**{**SHAPE, "num_classes": 5, "head_channels": 4, **changes})  # type: ignore[arg-type]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
