"""The base of conditions that are images: they are concatenated to what the network is given."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from diffusion_lit.codec import Codec
from diffusion_lit.conditioner import Conditioner
from diffusion_lit.types import Condition


class Spatial(Conditioner):
    """Makes the condition `concat`, (B, C, H, W), of the size of what is diffused.

    Args:
        dropout: Probability, in [0, 1), that it is replaced by zeros in training, for guidance.

    Raises:
        ValueError: If the probability is out of range.
    """

    roles: tuple[str, ...] = ("concat",)

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"conditioner.dropout={dropout} must lie in [0, 1); 0.1 is usual for guidance")
        self.dropout = dropout

    @abstractmethod
    def concat(self, given: Condition, codec: Codec) -> Tensor:
        """Computes the condition; see `Conditioner.forward`.

        Raises:
            ValueError: If what is given does not fit.
        """

    def forward(self, given: Condition, codec: Codec) -> Condition:
        missing = [name for name in self.entries if name not in given]
        if missing:
            raise ValueError(f"{type(self).__name__} needs {' and '.join(missing)}, which was not given")
        concat = self.concat(given, codec)
        if self.training and self.dropout:
            dropped = torch.rand(len(concat), device=concat.device) < self.dropout
            concat = concat.masked_fill(dropped.view(-1, 1, 1, 1), 0)
        return {"concat": concat}

    def null(self, condition: Condition) -> Condition:
        return {name: torch.zeros_like(value) for name, value in condition.items()}

    def has_null(self, network: nn.Module) -> bool:
        return self.dropout > 0

    def check(self, network: nn.Module) -> None:
        """Raises ValueError if the network takes no further channels."""
        if not getattr(network, "concat_channels", 0):
            raise ValueError(
                f"conditioner: {type(self).__name__} makes channels to concatenate, which this "
                f"{type(network).__name__} does not take; choose ADMUNet and set --model.network.concat_channels"
            )
