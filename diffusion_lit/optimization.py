"""How weights are updated: optimiser and learning rate as the configuration makes them."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, empty_like
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
    optimizer.register_load_state_dict_post_hook(keep_layout)
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


def keep_layout(optimizer: Optimizer) -> None:
    """Lays an optimiser's state out as its parameters are: fused kernels take for granted that both are alike.

    A checkpoint may be from a run with another memory layout.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = empty_like(parameter, dtype=value.dtype).copy_(value)
