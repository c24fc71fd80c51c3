"""Images: where they come from and how they reach the model."""

from diffusion_lit.data.caption_forms import CaptionForm, COCOCaptions, Metadata, TextFiles
from diffusion_lit.data.captioned_digits import CaptionedDigits
from diffusion_lit.data.captions import Captions
from diffusion_lit.data.cifar10 import CIFAR10
from diffusion_lit.data.dataset import CorruptImage, CorruptImageWarning, Example, ImageDataset, InMemoryImages, Split
from diffusion_lit.data.degradation import Area, Bicubic, BSRLight, Degradation
from diffusion_lit.data.derived import Holes, LowResolution, WithMaps
from diffusion_lit.data.digits import Digits
from diffusion_lit.data.folder import Folder
from diffusion_lit.data.lsun import LSUN
from diffusion_lit.data.masks import CentreHole, LaMaMasks, MaskFiles, Masks
from diffusion_lit.data.module import ImageData
from diffusion_lit.data.mvtec import DefectImages, MVTec
from diffusion_lit.data.one_class import OneClass
from diffusion_lit.data.prepared import Prepared
from diffusion_lit.data.source import Source
from diffusion_lit.data.webdataset import WebDataset

__all__ = [
    "CIFAR10",
    "LSUN",
    "Area",
    "BSRLight",
    "Bicubic",
    "COCOCaptions",
    "CaptionForm",
    "CaptionedDigits",
    "Captions",
    "CentreHole",
    "CorruptImage",
    "CorruptImageWarning",
    "DefectImages",
    "Degradation",
    "Digits",
    "Example",
    "Folder",
    "Holes",
    "ImageData",
    "ImageDataset",
    "InMemoryImages",
    "LaMaMasks",
    "LowResolution",
    "MVTec",
    "MaskFiles",
    "Masks",
    "Metadata",
    "OneClass",
    "Prepared",
    "Source",
    "Split",
    "TextFiles",
    "WebDataset",
    "WithMaps",
]
