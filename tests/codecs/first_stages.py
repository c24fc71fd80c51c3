"""Small autoencoders of 8x8 digits, f = 2 with two latent channels, and their checkpoints."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lit.codecs import FirstStage
from diffusion_lit.data import Digits, ImageData
from diffusion_lit.diffusion import DDIM
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import Autoencoder, DiagonalGaussian, UNet, VectorQuantizer
from diffusion_lit.upgrade import FORMAT
from tests import tiny

SHAPE: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 1,
    "latent_channels": 2,
    "width": 4,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "num_groups": 2,
}
CODES = 16


def autoencoder(codes: int | None = None, seed: int = 0) -> Autoencoder:
    """Always with the same weights, of which the encoder's bias keeps the means of the latents from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        regularizer = DiagonalGaussian() if codes is None else VectorQuantizer(codes)
        network = Autoencoder(**SHAPE, regularizer=regularizer)
        with torch.no_grad():
            # Latents with means and deviations of their own, and noise in the posterior.
            network.quant_conv.weight[:2].mul_(torch.tensor([6.0, 8.0]).view(2, 1, 1, 1))
            bias = network.quant_conv.get_parameter("bias")
            bias.copy_(torch.tensor([2.0, -1.0, -2.0, -0.5])[: len(bias)])
            if codes is not None:
                network.quantize.get_parameter("embedding.weight").normal_()
        return network


def config(codes: int | None = None) -> dict[str, Any]:
    arguments = dict(SHAPE)
    if codes is not None:
        arguments["regularizer"] = {"class_path": "VectorQuantizer", "init_args": {"num_codes": codes}}
    return {"class_path": "diffusion_lit.networks.Autoencoder", "init_args": arguments}


def write(path: Path, codes: int | None = None, seed: int = 0, network: Any = None) -> Path:
    """Writes the checkpoint of an autoencoder as training it does."""
    state = {f"network.{name}": value for name, value in autoencoder(codes, seed).state_dict().items()}
    model = {"class_path": "AutoencoderModule", "init_args": {"network": network or config(codes)}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "config": {"model": model}, "format": FORMAT}, path)
    return path


def unet(in_channels: int = 2) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(4, in_channels, width=8, multipliers=[1, 2], num_blocks=1, attention=[], num_groups=4)


def latent_model(codec: FirstStage, **parts: Any) -> DiffusionModule:
    return tiny.module(**{"network": unet(), "codec": codec, "sampler": DDIM(steps=3, clip=False), **parts})


def digits(count: int = 16) -> Tensor:
    """(B, 1, 8, 8), in [-1, 1]."""
    return ImageData(Digits()).examples(range(count), "train")["image"]
