"""Networks, (x, time, condition) -> output, which do not depend on the process; classifiers, autoencoders."""

from diffusion_lit.networks.adm import ADMUNet
from diffusion_lit.networks.attention import attention_control
from diffusion_lit.networks.autoencoder import Autoencoder, Reconstruction
from diffusion_lit.networks.classifier import ConvClassifier, NoisyClassifier
from diffusion_lit.networks.ddpmpp import DDPMpp
from diffusion_lit.networks.discriminator import Discriminator, PairDiscriminator
from diffusion_lit.networks.ncsnpp import NCSNpp
from diffusion_lit.networks.patchgan import PatchGAN
from diffusion_lit.networks.regularizer import DiagonalGaussian, Regularizer, VectorQuantizer
from diffusion_lit.networks.text_encoder import TextEncoder
from diffusion_lit.networks.unet import UNet

__all__ = [
    "ADMUNet",
    "Autoencoder",
    "ConvClassifier",
    "DDPMpp",
    "DiagonalGaussian",
    "Discriminator",
    "NCSNpp",
    "NoisyClassifier",
    "PairDiscriminator",
    "PatchGAN",
    "Reconstruction",
    "Regularizer",
    "TextEncoder",
    "UNet",
    "VectorQuantizer",
    "attention_control",
]
