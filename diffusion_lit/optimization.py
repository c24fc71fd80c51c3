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
    batch_size: int | None = None,
) -> dict[str, Any]:
    """An optimiser, with its learning rate scheduled by steps, in the form that `configure_optimizers` returns.

    Args:
        parameters: What is trained.
        make_optimizer: Makes the optimiser from them.
        make_lr_scheduler: Makes the schedule from the optimiser; None: the learning rate is constant.
        batch_size: Images per optimiser step, for schedules that count images.

    Raises:
        ValueError: That names the key, if torch refuses a setting, or a schedule counts images of unknown number.
    """
    optimizer: Any = named_errors("optimizer", lambda: make_optimizer(parameters))
    optimizer.register_load_state_dict_post_hook(keep_layout)
    if make_lr_scheduler is None:
        return {"optimizer": optimizer}
    scheduler = named_errors("lr_scheduler", lambda: make_lr_scheduler(optimizer))
    if isinstance(scheduler, ImageWarmup):
        scheduler.set_batch_size(batch_size)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ImageWarmup(LRScheduler):
    """The learning rate rises linearly from 0 over the first training images, and is constant afterwards.

    Step i, from 0, has the factor min(i batch_size / images, 1).

    Args:
        optimizer: The optimiser.
        images: Images over which the learning rate rises, at least 1.

    Raises:
        ValueError: If `images` is below 1.

    Source: Karras et al. 2022 (EDM), appendix F.2 and its code.
    """

    def __init__(self, optimizer: Optimizer, images: int = 10_000_000) -> None:
        if images < 1:
            raise ValueError(f"images={images} must be at least 1; leave lr_scheduler out for a constant learning rate")
        self.images = images
        self.batch_size = 0
        super().__init__(optimizer)

    def set_batch_size(self, batch_size: int | None) -> None:
        """Sets the images per optimiser step; raises ValueError if they are not known."""
        if batch_size is None:
            raise ValueError(
                "model.lr_scheduler: ImageWarmup counts images, but the data have no batch_size, the images of one "
                "optimiser step; choose a schedule that counts steps, such as LinearLR"
            )
        self.batch_size = batch_size

    def get_lr(self) -> list[float | Tensor]:
        factor = min(self.last_epoch * self.batch_size / self.images, 1.0)
        return [rate * factor for rate in self.base_lrs]


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
