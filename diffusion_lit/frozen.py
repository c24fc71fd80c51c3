"""A trained network that is used but not trained."""

from typing import Any

from torch import nn


class Frozen(nn.Module):
    """Holds a network that its owner uses and does not train.

    The network is in eval mode and its parameters need no gradient; gradients still flow through it to its inputs. It
    moves and casts with its owner. It is no registered submodule: it has no entry in the owner's `state_dict`, is not
    among its parameters or submodules, is not averaged, and `owner.train()` leaves it in eval mode.

    Args:
        network: The network; it is changed in place.
    """

    network: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # nn.Module.__setattr__ would register the network as a submodule.
        object.__setattr__(self, "network", network.eval().requires_grad_(False))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> "Frozen":
        self.network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
