"""Classes as a context that a network attends to."""

import torch
from torch import Tensor, nn

from diffusion_lit.codec import Codec
from diffusion_lit.conditioner import Conditioner
from diffusion_lit.types import Condition


class ClassContext(Conditioner):
    """Gives the network a context of one token: the learned embedding of the image's class.

    Args:
        num_classes: Number of classes.
        width: Channels of the token, the network's `context_width`.
        null_class: Whether there is an embedding for "no class" too, the last, as classifier-free guidance needs.
        dropout: Probability, in [0, 1), that a class is replaced by the null class in training.

    Raises:
        ValueError: If a number is out of range, or classes are dropped and there is no null class.

    Source: Rombach et al. 2022, section 4.3 and appendix E.2; their model with a null class has 1,001 embeddings.
    """

    def __init__(self, num_classes: int, width: int = 512, null_class: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if num_classes < 1 or width < 1:
            raise ValueError(f"conditioner.num_classes={num_classes} and width={width} must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"conditioner.dropout={dropout} must lie in [0, 1); 0.1 is usual for guidance")
        if dropout and not null_class:
            raise ValueError(
                f"conditioner.dropout={dropout} needs a null class; set --model.conditioner.null_class true"
            )
        self.num_classes: int = num_classes
        self.width = width
        self.null_class = null_class
        self.dropout = dropout
        self.embedding = nn.Embedding(num_classes + null_class, width)

    def forward(self, given: Condition, codec: Codec) -> Condition:
        if "label" not in given:
            raise ValueError("the network attends to a class and was given none; say which by label")
        label: Tensor = given["label"]
        if self.null_class:
            label = label.masked_fill(label < 0, self.num_classes)
        if self.training and self.dropout:
            dropped = torch.rand(len(label), device=label.device) < self.dropout
            label = label.masked_fill(dropped, self.num_classes)
        return {"context": self.embedding(label)[:, None]}

    def null(self, condition: Condition) -> Condition:
        return {"context": self.embedding.weight[-1].expand_as(condition["context"])}

    def has_null(self, network: nn.Module) -> bool:
        return self.null_class

    def check(self, network: nn.Module) -> None:
        """Raises ValueError if the network does not attend to tokens of this width."""
        width = getattr(network, "context_width", None)
        if width != self.width:
            raise ValueError(
                f"conditioner.width={self.width}, and the {type(network).__name__} has context_width={width}; set "
                f"--model.network.context_width {self.width}"
            )
