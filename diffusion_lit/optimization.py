"""How weights are updated: optimiser and learning rate as the configuration makes them."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def optimization(
    parameters: Iterable[Parameter],
    make_optimizer: Callable[[Iterable[Parameter]], Optimizer],
    make_lr_scheduler: Callable[[Optimizer], LRScheduler] | None,
) -> Any:
    """What `configure_optimizers` returns: an optimiser, its learning rate scheduled by optimiser steps.

    Raises:
        ValueError: That names the key, if torch refuses a setting.
    """
    optimizer: Any = named("optimizer", lambda: make_optimizer(parameters))
    if make_lr_scheduler is None:
        return optimizer
    scheduler = named("lr_scheduler", lambda: make_lr_scheduler(optimizer))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def named(key: str, make: Callable[[], Any]) -> Any:
    """What `make` returns; an error of its begins with the key."""
    try:
        return make()
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"model.init_args.{key}: {error}") from error
