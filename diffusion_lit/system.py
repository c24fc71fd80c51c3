"""The base of everything that is trained: optimisers, averages, skipped steps, seeds and checkpoints, but no diffusion.

A system writes `losses` and gets the rest. A system with several optimisers sets `automatic_optimization = False` and
writes a `training_step` made of `update` and `finish_step`.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion_lit import stepping
from diffusion_lit.data.fitting import check_class_names, check_images, check_same_classes
from diffusion_lit.data.tuples import Tuples
from diffusion_lit.execution import Execution
from diffusion_lit.lightning import log_gathered
from diffusion_lit.optimization import named_errors, optimization
from diffusion_lit.records import NonFinite
from diffusion_lit.types import Batch, batch_size
from diffusion_lit.weights import Weighted


class NonFiniteGradients(RuntimeError):
    """Gradients were infinite or not a number for too many steps in a row."""


class System(Weighted):
    """A LightningModule that trains exactly: optimisers, gradients, skipped steps and seeds are handled here.

    Args:
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimiser, advanced every step; None: constant.
        seed: Decides all randomness of training.
        max_skipped_steps: A step with a gradient that is not finite changes no weights and is counted as skipped; this
            many in a row end training. The host waits for the gradient norm at every step; None: it does not, and such
            gradients reach the weights.

    Attributes:
        gradient_norm: Of the newest update, before clipping.

    Raises:
        ValueError: If `max_skipped_steps` is below 1.
    """

    predicts: ClassVar[bool] = False
    """Whether `predict` can be called."""
    optimizer_keys: ClassVar[tuple[str, ...]] = ("optimizer",)
    """The arguments that make the optimisers, in the order of `configure_optimizers`."""

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        max_skipped_steps: int | None = 10,
    ) -> None:
        super().__init__()
        if max_skipped_steps is not None and max_skipped_steps < 1:
            raise ValueError(
                f"max_skipped_steps={max_skipped_steps} must be at least 1, or null; set --model.max_skipped_steps"
            )
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.seed = seed
        self.max_skipped_steps = max_skipped_steps
        self.gradient_norm: Tensor | None = None
        self._finite = True
        self._rate = 0.0
        self._outputs: list[Mapping[str, Tensor]] = []
        self._totals: dict[str, Tensor] = {}
        self._step_begun = 0
        self._tuples = Tuples()

    # What a system says of itself

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images; compared with the data's before anything starts."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes that the system tells apart or can be asked for; None: it knows no classes."""
        return None

    @property
    def needs_pixels(self) -> bool:
        """Whether `losses` needs a batch's `image`, and not only what is stored of it."""
        return True

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch, and what is to be logged with it.

        Args:
            batch: `image` float (B, C, H, W) in [-1, 1], and what else the data have.

        Returns:
            "loss", a scalar with gradient. Tensors of shape (B,) are values per image: "losses", and others that are
            logged as their mean under their name; where there is a time "t", (B,), also by quarter of it. Further
            scalars are logged as they are.
        """

    def start(self, data: L.LightningDataModule | None, device: torch.device) -> None:
        """Called once before a new run, not when one continues, on every process; the weights may still be changed.

        Args:
            data: What will be trained on.
            device: Where this process trains; the system is still on the CPU.
        """

    def learn(self, outputs: Sequence[Mapping[str, Tensor]]) -> None:
        """Called once after each whole step that was not skipped, before the averages move.

        Args:
            outputs: What `losses` returned for each batch of the step, detached.
        """

    def averaged_names(self) -> list[str]:
        """Names of the parameters that the `ema` section averages; by default all trainable ones."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def execute(self, execution: Execution) -> None:
        """Has the networks run in this way from now on; nothing by default."""

    def prediction(
        self,
        data: L.LightningDataModule | None,
        directory: Path,
        num_images: int | None,
        batch_size: int | None,
        seed: int,
    ) -> tuple[L.LightningDataModule, L.Callback] | None:
        """What `predict` does where that is not to generate images.

        Args:
            data: The data of the configuration, if there are any.
            directory: Where results go.
            num_images: How many images; None: the system's own choice.
            batch_size: Images at once in each process; None: the system's own choice.
            seed: Of the noise.

        Returns:
            The batches for `predict_step`, and a callback that writes what it returns; None: images are generated.

        Raises:
            ValueError: If that is not possible.
        """
        return None

    # Checks

    def setup(self, stage: str) -> None:
        """Compares the system with trainer and data.

        Raises:
            ValueError: If they do not fit together.
        """
        # Data modules of ours have no such hook, and others need this one.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer` in `LightningModule`")
        name = type(self).__name__
        if stage == "predict" and not self.predicts:
            raise ValueError(f"predict: a {name} generates nothing; give --ckpt_path of a model that makes images")
        if stage == "fit":
            self.check_training(self.trainer)
        data = getattr(self.trainer, "datamodule", None)
        names = None if stage == "predict" or self.num_classes is None else getattr(data, "class_names", None)
        if names is not None and self.num_classes is not None:
            check_class_names(names, self.num_classes)
            # Before a fit these may be of another training; a checkpoint to continue from is read later.
            trained = None if stage == "fit" else self.class_names
            self.class_names = list(names) if trained is None else check_same_classes(names, trained)
        if stage != "predict":
            check_images(data, name, self.image_shape, self.needs_pixels)
        self.execute(getattr(self.trainer, "execution", Execution()))

    def check_training(self, trainer: L.Trainer) -> None:
        """Raises ValueError if the system cannot be trained with the settings of a trainer."""
        name = type(self).__name__
        algorithm = trainer.gradient_clip_algorithm
        if algorithm not in (None, "norm"):
            algorithm = getattr(algorithm, "value", algorithm)
            raise ValueError(f"trainer.gradient_clip_algorithm={algorithm!r}: only 'norm' is supported")
        if self.automatic_optimization:
            return
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: a {name} has several optimisers, "
                "and a step is one batch; leave it at 1"
            )
        if str(trainer.precision) == "16-mixed":
            raise ValueError(
                f"trainer.precision=16-mixed: a {name} has several optimisers, which cannot share a scaled loss; "
                "use bf16-mixed or 32-true"
            )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Makes (image, label) tuples of other data modules into batches; see `Tuples` for ranges and errors."""
        if isinstance(batch, Mapping) and ({"image", "moments"} & batch.keys() or self.trainer.predicting):
            return batch
        return self._tuples(batch, self.image_shape, self.num_classes)

    # Training

    @property
    def step(self) -> int:
        """The number of the step that is being made, from 1; Lightning counts a step after `learn`, or before it."""
        return self._step_begun + 1

    def on_train_start(self) -> None:
        self._outputs.clear()
        self._step_begun = self.trainer.global_step
        self._finite = True
        if self.max_skipped_steps is not None:
            # A run that too many skipped steps ended makes another try.
            self.skipped_in_a_row = min(self.skipped_in_a_row, self.max_skipped_steps - 1)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds the batch.

        Raises:
            NonFiniteGradients: If `max_skipped_steps` in a row were skipped.
        """
        if self.max_skipped_steps is not None and self.skipped_in_a_row >= self.max_skipped_steps:
            skipped = self.skipped_in_a_row
            raise NonFiniteGradients(stepping.why_stopped(self.trainer, self._outputs, skipped, self._rate))
        if self.trainer.global_step != self._step_begun:
            self._outputs.clear()
        self._step_begun = self.trainer.global_step
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        stepping.seed_step(self.seed, stepping.TRAINING, self.global_rank, number)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        parts = self.losses(batch)
        # Lightning divides "loss" by the number of accumulated batches before callbacks see it.
        return {**self.note({**parts, stepping.MEAN_LOSS: parts["loss"]}), "loss": parts["loss"]}

    def note(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keeps what a batch gave, detached, for `learn` and for the log, and returns it.

        With several optimisers, called in `training_step` before `finish_step`; the result is what it returns.

        Args:
            parts: As `losses` returns them.
        """
        self._outputs.append({name: value.detach() for name, value in parts.items()})
        return dict(self._outputs[-1])

    def configure_optimizers(self) -> Any:
        batch_size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        return optimization(self.parameters(), self.make_optimizer, self.make_lr_scheduler, batch_size)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        named_errors("lr_scheduler", lambda: super(System, self).lr_scheduler_step(scheduler, metric))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the global norm and keeps the norm; a step with a gradient that is not finite is skipped."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._clip(parameters, self._clip_norm(gradient_clip_val))

    def _clip_norm(self, given: float | None) -> float:
        limit = getattr(self.trainer, "clip_norm", given)
        return float("inf") if not limit else float(limit)

    def _clip(self, parameters: Sequence[nn.Parameter], limit: float) -> bool:
        """Returns whether the gradients, which all processes have averaged, are finite; else they are dropped.

        Without gradients an optimiser leaves weights and its own state alone, and its step is counted.
        """
        self.gradient_norm = nn.utils.clip_grad_norm_(parameters, limit).detach()
        if self.max_skipped_steps is None or bool(self.gradient_norm.isfinite()):
            return True
        for parameter in parameters:
            parameter.grad = None
        self._finite = False
        return False

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.finish_step()

    def all_optimizers(self) -> list[Any]:
        """All optimisers, in the order of `configure_optimizers`, for `update`.

        The first is Lightning's, whose steps are counted in `trainer.global_step`; the others are not counted.
        """
        counted, plain = self.optimizers(), self.optimizers(use_pl_optimizer=False)
        if not isinstance(counted, list):
            return [counted]
        return [counted[0], *cast(list[Any], plain)[1:]]

    def update(self, optimizer: Any, loss: Tensor) -> bool:
        """Backward, mean of the gradients over processes, clipping and a step of one of several optimisers.

        Args:
            optimizer: One of `all_optimizers`. In each `training_step` the first is updated exactly once.
            loss: A scalar; only the parameters of this optimiser get gradients.

        Returns:
            Whether the step was taken; False if a gradient was not finite.
        """
        plain: Optimizer = getattr(optimizer, "optimizer", optimizer)
        parameters = [p for group in plain.param_groups for p in group["params"]]
        plain.zero_grad(set_to_none=True)
        # The reducer of DistributedDataParallel expects one backward pass for all parameters.
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        with block() if self.trainer.world_size > 1 else nullcontext():
            self.manual_backward(loss, inputs=parameters)
        if self.trainer.world_size > 1:
            stepping.average_gradients(parameters, self.trainer.world_size)
        taken = self._clip(parameters, self._clip_norm(self.trainer.gradient_clip_val))
        optimizer.step()
        plain.zero_grad(set_to_none=True)
        return taken

    def finish_step(self) -> None:
        """Ends a whole step: counts it if it was skipped; else what learns from steps learns, and the averages move.

        With several optimisers, called last in `training_step`; it advances the learning-rate schedules too.

        Raises:
            RuntimeError: If the first of several optimisers was not updated exactly once in this step.
        """
        self._rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        if not self.automatic_optimization:
            self._finish_manual()
        if not self._finite:
            self._finite = True
            self.skipped_in_a_row += 1
            self.skipped_steps += 1
            return
        self.skipped_in_a_row = 0
        self.learn(self._outputs)
        if self.averages is not None:
            self.averages.update(self)

    def _finish_manual(self) -> None:
        taken = self.trainer.global_step - self._step_begun
        if taken != 1:
            raise RuntimeError(
                f"{type(self).__name__}: a training step updated its first optimiser {taken} times instead of once; "
                "take the optimisers from `all_optimizers` and update the first exactly once per batch"
            )
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []:
            self.lr_scheduler_step(scheduler, None)
        if self.trainer.world_size > 1:
            # DistributedDataParallel does so before a forward pass, but not without a backward pass of its own.
            stepping.copy_buffers(self)

    # Validation and test

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        stepping.seed_step(self.seed, stepping.VALIDATION, self.global_rank, batch_idx)

    on_test_batch_start = on_validation_batch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        count = batch_size(batch)
        if count:
            with self.averaged_weights():
                for name, total in stepping.totals(self.losses(batch), count).items():
                    self._totals[name] = self._totals[name] + total if name in self._totals else total

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        self._totals.clear()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        self._log_totals("val")

    def on_test_epoch_end(self) -> None:
        self._log_totals("test")

    def _log_totals(self, stage: str) -> None:
        """Logs the means, collective; raises NonFinite if one is not finite, except while training."""
        for name, mean in stepping.means(self._totals, self.trainer.world_size).items():
            if not math.isfinite(mean) and self.trainer.state.fn != TrainerFn.FITTING:
                raise NonFinite(f"{stage}/{name}={mean}: the model has diverged, or makes values that are not finite")
            log_gathered(self, f"{stage}/{name}", mean)
