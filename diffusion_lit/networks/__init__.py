"""Networks, which know nothing of diffusion: (x, time, condition) -> output."""

from diffusion_lit.networks.adm import ADMUNet, NoisyClassifier
from diffusion_lit.networks.unet import UNet

__all__ = ["ADMUNet", "NoisyClassifier", "UNet"]
