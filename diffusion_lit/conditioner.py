"""Conditions: from the entries of a batch to the further inputs of a network."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from diffusion_lit.codec import Codec, Shape
from diffusion_lit.types import Condition, Part

DrawFn: TypeAlias = Callable[[Sequence[int]], Tensor]
"""Draws standard normal noise of B images, each of the shape given."""


class Conditioner(nn.Module, Part):
    """Turns the entries of a batch other than its images into the condition of a network.

    It also drops conditions in training, so that one network learns to predict with and without them. It may have
    weights, which are trained and averaged with the network's; a network that is used but not trained is `Frozen`.

    Attributes:
        entries: Entries of an example that it cannot do without, other than its label.
        num_classes: Number of classes, if the conditioner and not the network knows them.
        roles: Inputs of the network that it makes.
    """

    entries: tuple[str, ...] = ()
    num_classes: int | None = None
    roles: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, given: Condition, codec: Codec) -> Condition:
        """Computes the condition; called once per batch in training, and once per image in sampling.

        Args:
            given: Entries of a batch, each (B, ...), `image` among them in training; entries that this conditioner
                does not use are ignored.
            codec: Of the model, for conditions that are images and are given to the network as latents.

        Returns:
            Inputs of the network, each (B, ...). In training mode some examples have the null condition.
        """

    @abstractmethod
    def null(self, condition: Condition) -> Condition:
        """Returns the null condition, with the names and shapes of `condition`, for unconditional predictions."""

    @abstractmethod
    def has_null(self, network: nn.Module) -> bool:
        """Whether the network is able to predict from the null condition."""

    def check(self, network: nn.Module) -> None:
        """Raises ValueError if the network cannot take these conditions."""

    def shape_of(self, entry: str, image_shape: Shape, latent_shape: Shape) -> Shape:
        """The shape, (C, H, W), of one of `entries` that is an image.

        Args:
            entry: Its name.
            image_shape: Of the model's images.
            latent_shape: Of what is diffused.
        """
        return image_shape if entry == "image" else (1, *image_shape[1:])

    def vary(self, given: Condition, draw: DrawFn) -> Condition:
        """Adds what is random in the condition when sampling; called before `forward`, by default nothing.

        Args:
            given: As for `forward`.
            draw: Draws the images' own noise, which depends on (seed, index) alone.
        """
        return given

    def start(self, data: L.LightningDataModule | None, device: torch.device) -> None:
        """Called once before a new run, on every process, such as to learn a vocabulary.

        Args:
            data: What will be trained on.
            device: Where this process trains.
        """

    def finish(self, images: Tensor, given: Condition) -> Tensor:
        """Puts into generated images what the condition says of them, such as known pixels; by default nothing.

        Args:
            images: (B, C, H, W), nominally in [-1, 1].
            given: What they show, as for `forward`.
        """
        return images


class Labels(Conditioner):
    """Class labels.

    Args:
        dropout: Probability, in [0, 1), that a label is replaced by the null label, -1, in training.

    Raises:
        ValueError: If the probability is out of range.

    Source: Ho & Salimans 2022, algorithm 1.
    """

    roles = ("label",)

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"conditioner.dropout={dropout} must lie in [0, 1); 0.1 is usual for guidance")
        self.dropout = dropout

    def forward(self, given: Condition, codec: Codec) -> Condition:
        if "label" not in given:
            return {}
        label: Tensor = given["label"]
        if self.training and self.dropout:
            dropped = torch.rand(len(label), device=label.device) < self.dropout
            label = label.masked_fill(dropped, -1)
        return {"label": label}

    def null(self, condition: Condition) -> Condition:
        return {name: torch.full_like(value, -1) for name, value in condition.items()}

    def has_null(self, network: nn.Module) -> bool:
        return bool(getattr(network, "has_null_label", False))

    def check(self, network: nn.Module) -> None:
        """Raises ValueError if labels are dropped but the network has no null label."""
        if self.dropout and not self.has_null(network):
            raise ValueError(
                f"conditioner.dropout={self.dropout} needs a network with a null label, which this "
                f"{type(network).__name__} lacks; set --model.conditioner.dropout 0, or give the network one"
            )
