"""Images: where they come from and how they reach the model."""

from diffusion_lit.data.base import CorruptImage, ImageData, ImageDataset, InMemoryImages
from diffusion_lit.data.cifar10 import CIFAR10
from diffusion_lit.data.digits import Digits
from diffusion_lit.data.folder import Folder
from diffusion_lit.data.lsun import LSUN
from diffusion_lit.data.prepared import Prepared

__all__ = [
    "CIFAR10",
    "LSUN",
    "CorruptImage",
    "Digits",
    "Folder",
    "ImageData",
    "ImageDataset",
    "InMemoryImages",
    "Prepared",
]
