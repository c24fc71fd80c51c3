"""The optimiser and the learning-rate schedule that a configuration asks for."""

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
) -> dict[str, Any]:
    """An optimiser, with its learning rate scheduled by steps, in the form that `configure_optimizers` returns.

    Raises:
        ValueError: That names the key, if torch refuses a setting.
    """
    optimizer: Any = named_errors("optimizer", lambda: make_optimizer(parameters))
    optimizer.register_load_state_dict_post_hook(keep_layout)
    if make_lr_scheduler is None:
        return {"optimizer": optimizer}
    scheduler = named_errors("lr_scheduler", lambda: make_lr_scheduler(optimizer))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def named_errors(key: str, make: Callable[[], Any]) -> Any:
    """Returns what `make` returns; its errors begin with the key."""
    try:
        return make()
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"model.{key}: {error}") from error


def keep_layout(optimizer: Optimizer) -> None:
    """Gives an optimiser's state the memory layout of its parameters, which fused kernels expect.

    A checkpoint may come from a run with another memory layout.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = empty_like(parameter, dtype=value.dtype).copy_(value)
