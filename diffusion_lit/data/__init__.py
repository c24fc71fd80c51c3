"""Images: where they come from and how they reach the model."""

from diffusion_lit.data.cifar10 import CIFAR10
from diffusion_lit.data.dataset import CorruptImage, CorruptImageWarning, Example, ImageDataset, InMemoryImages, Split
from diffusion_lit.data.digits import Digits
from diffusion_lit.data.folder import Folder
from diffusion_lit.data.lsun import LSUN
from diffusion_lit.data.module import ImageData
from diffusion_lit.data.mvtec import DefectImages, MVTec
from diffusion_lit.data.prepared import Prepared
from diffusion_lit.data.source import Source

__all__ = [
    "CIFAR10",
    "LSUN",
    "CorruptImage",
    "CorruptImageWarning",
    "DefectImages",
    "Digits",
    "Example",
    "Folder",
    "ImageData",
    "ImageDataset",
    "InMemoryImages",
    "MVTec",
    "Prepared",
    "Source",
    "Split",
]
