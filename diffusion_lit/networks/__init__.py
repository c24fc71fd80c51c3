"""Networks, (x, time, condition) -> output, which do not depend on the diffusion process; and classifiers."""

from diffusion_lit.networks.adm import ADMUNet
from diffusion_lit.networks.attention import attention_control
from diffusion_lit.networks.classifier import ConvClassifier, NoisyClassifier
from diffusion_lit.networks.ddpmpp import DDPMpp
from diffusion_lit.networks.discriminator import Discriminator, PairDiscriminator
from diffusion_lit.networks.ncsnpp import NCSNpp
from diffusion_lit.networks.unet import UNet

__all__ = [
    "ADMUNet",
    "ConvClassifier",
    "DDPMpp",
    "Discriminator",
    "NCSNpp",
    "NoisyClassifier",
    "PairDiscriminator",
    "UNet",
    "attention_control",
]
