"""The optimiser and the learning-rate schedule that a configuration asks for."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, empty_like
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

TORCH_ERRORS = (ValueError, TypeError, ArithmeticError, RuntimeError, LookupError, AttributeError, AssertionError)
"""What torch raises for settings that it does not take."""


def optimization(
    parameters: Iterable[Parameter],
    make_optimizer: Callable[[Iterable[Parameter]], Optimizer],
    make_lr_scheduler: Callable[[Optimizer], LRScheduler] | None,
    batch_size: int | None = None,
    key: str = "optimizer",
) -> dict[str, Any]:
    """An optimiser, with its learning rate scheduled by steps, in the form that `configure_optimizers` returns.

    Args:
        parameters: What is trained.
        make_optimizer: Makes the optimiser from them.
        make_lr_scheduler: Makes the schedule from the optimiser; None: the learning rate is constant.
        batch_size: Images per optimiser step, for schedules that count images.
        key: The argument of the system that the optimiser is from, such as "discriminator_optimizer".

    Raises:
        ValueError: That names the key, if torch refuses a setting, a schedule counts images of unknown number, needs a
            score, or starts elsewhere than at its beginning.
    """
    optimizer: Any = named_errors(key, lambda: make_optimizer(parameters))
    check_capturable(optimizer, key)
    optimizer.register_load_state_dict_post_hook(keep_layout)
    if make_lr_scheduler is None:
        return {"optimizer": optimizer}
    name = schedule_key(key)
    scheduler = named_errors(name, lambda: schedule(make_lr_scheduler, optimizer))
    for inner in schedules(scheduler):
        if type(inner) is CosineAnnealingLR:
            inner.__class__ = HeldCosine
    if isinstance(scheduler, ImageWarmup):
        scheduler.set_batch_size(batch_size)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def schedule_key(key: str) -> str:
    """The argument of a system that makes the schedule of the optimiser of an argument."""
    return key.replace("optimizer", "lr_scheduler")


def schedules(scheduler: Any) -> Iterator[Any]:
    """A schedule and those that it is made of."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from schedules(inner)


def check_capturable(optimizer: Optimizer, key: str) -> None:
    """Raises ValueError if an optimiser is to be captured in CUDA graphs and its parameters are not on a GPU."""
    for group in optimizer.param_groups:
        if group.get("capturable") and not all(parameter.is_cuda for parameter in group["params"]):
            raise ValueError(f"model.{key}.capturable=True needs parameters on a GPU; leave it out")


def schedule(make: Callable[[Optimizer], LRScheduler], optimizer: Optimizer) -> LRScheduler:
    """Makes a schedule.

    Raises:
        ValueError: If it cannot be advanced step by step from the first step on.
    """
    try:
        scheduler = make(optimizer)
    except KeyError as error:
        if "last_epoch" not in str(error):
            raise
        raise ValueError(
            "last_epoch must be -1: a run that continues finds its place in the schedule itself; leave it out"
        ) from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau follows a score, and the learning rate is a function of the step here; choose another "
            "schedule, such as CosineAnnealingLR"
        )
    short = [inner.T_max for inner in schedules(scheduler) if isinstance(inner, CosineAnnealingLR) and inner.T_max < 1]
    if short:
        raise ValueError(f"T_max={short[0]}, the step at which the schedule ends, must be at least 1")
    return scheduler


class HeldCosine(CosineAnnealingLR):
    """`CosineAnnealingLR`, except that the learning rate stays at its end after `T_max` instead of rising again.

    Source: Loshchilov & Hutter 2017 (SGDR), eq. 5, without restarts.
    """

    def get_lr(self) -> list[float | Tensor]:
        if self.last_epoch > self.T_max:
            return [group["lr"] for group in self.optimizer.param_groups]
        return super().get_lr()


class ImageWarmup(LRScheduler):
    """The learning rate rises linearly from 0 over the first training images, and is constant afterwards.

    The factor is min(n / images, 1), with n the images seen before the step, also where a run continues with another
    batch size.

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
        self._batch_size = 0
        # Images and steps up to the last change of the batch size.
        self._images_before = self._steps_before = 0
        super().__init__(optimizer)

    def set_batch_size(self, batch_size: int | None) -> None:
        """Sets the images per optimiser step; raises ValueError if they are not known."""
        if batch_size is None:
            raise ValueError(
                "model.lr_scheduler: ImageWarmup counts images, but the data have no batch_size, the images of one "
                "optimiser step; choose a schedule that counts steps, such as LinearLR"
            )
        self._batch_size = batch_size

    def _seen(self) -> int:
        """Images of the steps done."""
        return self._images_before + (self.last_epoch - self._steps_before) * self._batch_size

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the batch size that was set, whatever the state's."""
        batch_size = self._batch_size
        super().load_state_dict(state_dict)
        if self._batch_size != batch_size:
            self._images_before, self._steps_before = self._seen(), self.last_epoch
            self._batch_size = batch_size

    def get_lr(self) -> list[float | Tensor]:
        factor = min(self._seen() / self.images, 1.0)
        return [rate * factor for rate in self.base_lrs]


def named_errors(key: str, make: Callable[[], Any]) -> Any:
    """Returns what `make` returns; its errors begin with the key."""
    try:
        return make()
    except TORCH_ERRORS as error:
        raise ValueError(f"model.{key}: {error.args[0] if error.args else type(error).__name__}") from error


def keep_layout(optimizer: Optimizer) -> None:
    """Gives an optimiser's state the memory layout of its parameters, which fused kernels expect.

    A checkpoint may come from a run with another memory layout.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = empty_like(parameter, dtype=value.dtype).copy_(value)
