"""Conditions: from the entries of a batch to the further inputs of a network."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from diffusion_lit.types import Condition


class Conditioner(nn.Module, ABC):
    """Turns the entries of a batch other than its images into the condition of a network.

    It also drops conditions in training, so that one network learns to predict with and without them.
    """

    @abstractmethod
    def forward(self, given: Condition) -> Condition:
        """Computes the condition.

        Args:
            given: Entries of a batch, each (B, ...); entries that this conditioner does not use are ignored.

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


class Labels(Conditioner):
    """Class labels.

    Args:
        dropout: Probability, in [0, 1), that a label is replaced by the null label, -1, in training.

    Raises:
        ValueError: If the probability is out of range.

    Source: Ho & Salimans 2022, algorithm 1.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"conditioner.dropout={dropout} must lie in [0, 1); 0.1 is usual for guidance")
        self.dropout = dropout

    def forward(self, given: Condition) -> Condition:
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
