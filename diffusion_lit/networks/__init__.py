"""Networks, which know nothing of diffusion: (x, time, condition) -> output; and classifiers."""

from diffusion_lit.networks.adm import ADMUNet, NoisyClassifier
from diffusion_lit.networks.classifier import ConvClassifier
from diffusion_lit.networks.unet import UNet

__all__ = ["ADMUNet", "ConvClassifier", "NoisyClassifier", "UNet"]
