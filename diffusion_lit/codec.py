"""Between images and what a generator models: pixels, or the latents of an autoencoder."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from diffusion_lit.types import Batch, Part

Shape = tuple[int, int, int]


class Codec(Part):
    """Maps images to latents and back.

    A codec that has a network is a `torch.nn.Module` too and holds it as `Frozen`, so that the module that owns the
    codec moves it and no checkpoint holds it.

    Attributes:
        bounded: Whether data lie in [-1, 1], so that predictions of x_0 may be clipped there.
        needs_pixels: Whether `latents` needs a batch's `image`.
    """

    bounded: bool = False
    needs_pixels: bool = True

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents, (B, C', H', W'), of images in [-1, 1], (B, C, H, W); always the same for the same images."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images, (B, C, H, W), nominally in [-1, 1], of latents, (B, C', H', W')."""

    def latents(self, batch: Batch) -> Tensor:
        """Latents, (B, C', H', W'), to train on, with chance in them where the codec has any.

        A codec may take stored ones from the batch instead of its images.
        """
        return self.encode(batch["image"])

    def check(self, data: L.LightningDataModule | None) -> None:
        """Raises ValueError if the data carry latents of another codec."""

    def start(self, data: L.LightningDataModule | None, device: torch.device) -> None:
        """Called once before a new run, on every process, such as to measure the scale of latents.

        Args:
            data: What will be trained on.
            device: Where this process trains.
        """

    def settled(self, carried: bool = False) -> dict[str, Any]:
        """Arguments of the codec that are known by now, as plain data, for the configuration of a run.

        Args:
            carried: Whether the configuration goes into a checkpoint beside `state`.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries besides the codec's buffers, so that it suffices to sample; {}: nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` returned; {} changes nothing.

        Raises:
            ValueError: If that is of another codec.
        """

    @abstractmethod
    def latent_shape(self, image_shape: Shape) -> Shape:
        """(C', H', W') of the latents of images of shape (C, H, W); ValueError if there are no such latents."""

    @abstractmethod
    def image_shape(self, latent_shape: Shape) -> Shape:
        """(C, H, W) of the images that latents of shape (C', H', W') decode to."""


class Pixels(Codec):
    """The images themselves."""

    bounded = True

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def latent_shape(self, image_shape: Shape) -> Shape:
        return image_shape

    def image_shape(self, latent_shape: Shape) -> Shape:
        return latent_shape
