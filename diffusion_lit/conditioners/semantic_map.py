"""Semantic synthesis: the network is given the class of each pixel."""

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lit.codec import Codec
from diffusion_lit.conditioners.spatial import Spatial
from diffusion_lit.data import ImageData, WithMaps
from diffusion_lit.types import Condition


class SemanticMap(Spatial):
    """Gives the network `map`, one-hot, halved bilinearly and mapped to few channels by trained weights.

    Args:
        num_classes: Values of the map are below it.
        halvings: How often height and width are halved: twice for latents four times smaller than images.
        channels: Channels that the network is given.
        dropout: See `Spatial`.

    Raises:
        ValueError: If a number is out of range.

    Source: Rombach et al. 2022, section 4.3.2, and its code, `SpatialRescaler`: 546 parameters for 182 classes.
    """

    entries = ("map",)

    def __init__(self, num_classes: int = 182, halvings: int = 2, channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        if num_classes < 1 or halvings < 0 or channels < 1:
            raise ValueError(
                f"conditioner: num_classes={num_classes} and channels={channels} must be at least 1, "
                f"halvings={halvings} at least 0"
            )
        # Not `num_classes`, which says that images have a class.
        self.num_values = num_classes
        self.halvings = halvings
        self.channel_mapper = nn.Conv2d(num_classes, channels, 1, bias=False)

    def start(self, data: L.LightningDataModule | None, device: torch.device) -> None:
        """Raises ValueError if maps of the data may have classes that the model does not know."""
        source = data.source if isinstance(data, ImageData) else None
        while source is not None and not isinstance(source, WithMaps):
            source = getattr(source, "source", None)
        if source is not None and source.num_classes > self.num_values:
            raise ValueError(
                f"conditioner.num_classes={self.num_values}, and the data's maps have {source.num_classes} classes; "
                f"set --model.conditioner.num_classes {source.num_classes}"
            )

    def concat(self, given: Condition, codec: Codec) -> Tensor:
        values = given["map"].long()
        # In training the data check what they read: here it would make every step wait for the device.
        if not self.training and int(values.max()) >= self.num_values:
            raise ValueError(
                f"map: class {int(values.max())}, and the model has {self.num_values}, from 0 to {self.num_values - 1}"
            )
        classes = torch.arange(self.num_values, device=values.device).view(1, -1, 1, 1)
        x = (values == classes).to(self.channel_mapper.weight.dtype)
        for _ in range(self.halvings):
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        mapped: Tensor = self.channel_mapper(x)
        return mapped
