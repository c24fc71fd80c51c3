"""The LightningModule: wires process, network, parameterization, objective and sampler, and nothing else."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypedDict, cast

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion_lit.averaging import WeightAverages
from diffusion_lit.diffusion import (
    DDIM,
    Denoiser,
    DenoisingLoss,
    DiscreteProcess,
    Eps,
    Guidance,
    ImageNoise,
    Objective,
    Parameterization,
    Sampler,
)
from diffusion_lit.diffusion.guidance import num_classes_of
from diffusion_lit.execution import Execution
from diffusion_lit.generation import Request, check_labels
from diffusion_lit.images import to_uint8
from diffusion_lit.memory import as_of_whole, in_memory
from diffusion_lit.optimization import named, optimization
from diffusion_lit.types import Batch, Condition, DenoiseFn, StepFn

TRAINING, VALIDATION = 0, 1
RAW = "raw"
AVERAGED = "averaged"


class Generated(TypedDict):
    """What `predict_step` returns: `index` int64 (B,), `image` uint8 (B, C, H, W), and the condition asked for."""

    index: Tensor
    image: Tensor
    condition: dict[str, Tensor]


def condition_of(batch: Batch | Request) -> Condition:
    """What a network may be told of a batch: all of it but the images themselves."""
    return {k: cast(Tensor, v) for k, v in batch.items() if k not in ("image", "index")}


def seed_step(seed: int, stream: int, rank: int, batch: int) -> None:
    """Seeds torch by what is being done, so that no two ranks or steps share noise and a resumed run repeats it."""
    state = np.random.SeedSequence([seed, stream, rank, batch]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


def restart_at_step(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Sets a checkpoint's counters of batches to the end of its last optimiser step.

    Those of Lightning stand in the middle of a batch where a run was interrupted there: it would go on with another
    batch's noise and, of a step that accumulates several batches, with some already counted but not summed.
    """
    step = checkpoint["global_step"]
    done = step * accumulate
    loop = checkpoint["loops"]["fit_loop"]
    for progress in (loop["epoch_loop.batch_progress"]["total"], loop["epoch_loop.batch_progress"]["current"]):
        # Completed lags by one, as in a checkpoint that is written at the end of a batch.
        progress.update(ready=done, started=done, processed=done, completed=max(done - 1, 0))
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = max(step - 1, 0)
    validation = loop["epoch_loop.val_loop.batch_progress"]
    for progress in (validation["total"], validation["current"]):
        progress.update(dict.fromkeys(progress, 0))


class NonFiniteGradients(RuntimeError):
    """Gradients were infinite or not a number for too many steps in a row."""


class DiffusionModule(L.LightningModule):
    """A denoising diffusion model: trains by its objective and samples by its sampler.

    Args:
        network: Called as network(x, time, condition). It has `image_size` and `in_channels`.
        process: The forward process.
        parameterization: What the network predicts.
        objective: The loss.
        sampler: Draws images unless another is given.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimiser, advanced every step; None: constant.
        seed: Decides times, noise and dropout while training.
        guidance: How sampling follows the label; None: as far as the network does by itself. Training is unguided.
        max_skipped_steps: A step whose gradients are not finite changes nothing but the count of skipped steps; so many
            in a row end training. To see them the host waits for the gradient norm at every step; None: it does not,
            and such gradients reach the weights.

    Raises:
        ValueError: If parts do not fit together: see `Denoiser`, `Sampler.times` and `Guidance.check`.
    """

    def __init__(
        self,
        network: nn.Module,
        process: DiscreteProcess = DiscreteProcess(),
        parameterization: Parameterization = Eps(),
        objective: Objective = DenoisingLoss(),
        sampler: Sampler = DDIM(),
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        guidance: Guidance | None = None,
        max_skipped_steps: int | None = 10,
    ) -> None:
        super().__init__()
        if max_skipped_steps is not None and max_skipped_steps < 1:
            raise ValueError(
                f"max_skipped_steps={max_skipped_steps} must be at least 1, or null; "
                "set --model.init_args.max_skipped_steps"
            )
        self.denoiser = Denoiser(network, parameterization, process)
        self.process = process
        self.objective = objective
        self.sampler = sampler
        self.sampler.times(process)
        self.guidance = guidance
        if guidance is not None:
            guidance.check(self.denoiser)
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.seed = seed
        self.averages: WeightAverages | None = None
        self.restored_averages: dict[str, Any] | None = None
        self.load_weights = AVERAGED
        self.loaded_weights = RAW
        self.loaded_step: int | None = None
        self.generation_seed = 0
        self.config: dict[str, Any] = {}
        self.gradient_norm: Tensor | None = None
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.seen_in_step: list[tuple[Tensor, Tensor]] = []
        self.on_sampling_step: StepFn | None = None
        self.sampled_at_once: int | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        network = self.denoiser.network
        size = cast(int, network.image_size)
        return cast(int, network.in_channels), size, size

    @property
    def num_classes(self) -> int | None:
        """How many classes can be asked for, by the network or by its guidance; None: the model is unconditional."""
        own = num_classes_of(self.denoiser.network)
        return own if own is not None or self.guidance is None else self.guidance.num_classes

    def setup(self, stage: str) -> None:
        """Raises ValueError if the data's images have not the network's shape, or clipping is not by norm."""
        algorithm = self.trainer.gradient_clip_algorithm
        if stage == "fit" and algorithm not in (None, "norm"):
            name = getattr(algorithm, "value", algorithm)
            raise ValueError(f"trainer.gradient_clip_algorithm={name!r}: only 'norm', the papers', is supported")
        data = getattr(self.trainer, "datamodule", None)
        shape = getattr(data, "image_shape", self.image_shape)
        if stage != "predict" and tuple(shape) != self.image_shape:
            raise ValueError(
                f"the data's images are {tuple(shape)} (channels, height, width) but the network takes "
                f"{self.image_shape}; make data.init_args.image_size and the network's image_size and in_channels agree"
            )
        self.execute(getattr(self.trainer, "execution", Execution()))

    def execute(self, execution: Execution) -> None:
        """Has the network run so from now on; a trainer does this, a program without one may."""
        self.denoiser.run = execution.of(self.denoiser.network)

    # Training

    def on_train_start(self) -> None:
        self.seen_in_step.clear()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed_step(self.seed, TRAINING, self.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        parts = self.objective(self.denoiser, batch["image"], condition_of(batch))
        self.seen_in_step.append((parts["t"], parts["losses"]))
        # Lightning divides "loss" by the number of accumulated batches before callbacks see it.
        return {**parts, "mean_loss": parts["loss"].detach()}

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        seed_step(self.seed, VALIDATION, self.global_rank, batch_idx)

    on_test_batch_start = on_validation_batch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with self.averaged_weights():
            self._log_loss("val/loss", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        with self.averaged_weights():
            self._log_loss("test/loss", batch)

    def _log_loss(self, name: str, batch: Batch) -> None:
        x0 = batch["image"]
        if not len(x0):
            return
        loss = self.objective(self.denoiser, x0, condition_of(batch))["loss"]
        self.log(name, loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=x0.shape[0])

    def configure_optimizers(self) -> Any:
        return optimization(self.parameters(), self.make_optimizer, self.make_lr_scheduler)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        named("lr_scheduler", lambda: super(DiffusionModule, self).lr_scheduler_step(scheduler, metric))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the global norm, which Lightning would not tell, and keeps it for the log.

        Without gradients an optimiser leaves weights and its own state alone: so a step is skipped. The norm is of
        gradients that all processes have summed, so that they agree.
        """
        limit = gradient_clip_val or float("inf")
        self.gradient_norm = nn.utils.clip_grad_norm_(self.parameters(), limit).detach()
        if self.max_skipped_steps is None or bool(self.gradient_norm.isfinite()):
            self.skipped_in_a_row = 0
        else:
            optimizer.zero_grad(set_to_none=True)
            self.skipped_in_a_row += 1
            self.skipped_steps += 1

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Averages right after the weights have moved, so that no callback's order matters.

        The objective too hears of whole steps only: one that is interrupted is done again when the run goes on.

        Raises:
            NonFiniteGradients: If `max_skipped_steps` in a row were skipped.
        """
        super().optimizer_step(*args, **kwargs)
        seen = list(self.seen_in_step)
        self.seen_in_step.clear()
        if self.skipped_in_a_row:
            if self.skipped_in_a_row == self.max_skipped_steps:
                why = self._why_stopped([losses for _, losses in seen])
                # The step is not done: whoever goes on from before it counts it anew.
                self.skipped_in_a_row -= 1
                self.skipped_steps -= 1
                raise NonFiniteGradients(why)
            return
        t, losses = (torch.cat(column) for column in zip(*seen, strict=True))
        self.objective.observe(t, losses, self._gather)
        if self.averages is not None:
            self.averages.update(self)

    def _why_stopped(self, losses: list[Tensor]) -> str:
        """What a person needs to find the cause; collective.

        Args:
            losses: Of this process's images, a tensor (B,) for each micro-batch of the step.
        """
        step = self.trainer.global_step + 1
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        # Rank-major, as gathered, to the order of the step's images: micro-batch, rank, image.
        by_rank = self._gather(torch.stack(losses).float()[None])
        bad = (~by_rank.isfinite()).transpose(0, 1).flatten().tolist()
        find = getattr(getattr(self.trainer, "datamodule", None), "images_of_step", None)
        images = [] if find is None else find(step)
        named = [image for image, is_bad in zip(images, bad, strict=False) if is_bad] or images
        what = "images with non-finite losses" if any(bad) else "images of that step"
        folder = f"{self.trainer.default_root_dir}/checkpoints/last.ckpt"
        return (
            f"gradients were not finite in {self.max_skipped_steps} steps in a row, the last of them step {step}, at a "
            f"learning rate of {rate:.3g}; {what}: {', '.join(map(str, named)) or 'not known'}; the weights of step "
            f"{step - self.skipped_in_a_row} are in {folder}; lower the learning rate, or look at these images"
        )

    def _gather(self, tensor: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return tensor
        of_all = [torch.empty_like(tensor) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(of_all, tensor.contiguous())
        return torch.cat(of_all)

    # Averaged weights and checkpoints

    def averaged_weights(self, name: str | None = None) -> AbstractContextManager[None]:
        """A context in which the module holds averaged weights, where there are any.

        Safe to enter where that average is in place already; every callback that looks at the model uses this.

        Args:
            name: Which average, as str(decay); by default the one that `load_weights` names, in training the
                primary one.

        Raises:
            ValueError: If there is no such average.
            RuntimeError: If another average is in place.
        """
        name = name or self.load_weights
        if self.averages is None or name == RAW:
            return nullcontext()
        if name == AVERAGED:
            name = self.averages.primary
        if name == self.averages.in_place:
            return nullcontext()
        if name not in map(str, self.averages.decays):
            raise ValueError(f"weights={name!r} are not averaged; there are {[str(d) for d in self.averages.decays]}")
        return self.averages.swapped(self, name)

    @property
    def weights_name(self) -> str:
        """Which weights the module holds: "raw", or the decay of their average, as a string."""
        return (self.loaded_weights if self.averages is None else self.averages.in_place) or RAW

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """`state_dict` becomes the primary average, which is what a reader of weights wants; the raw weights, from
        which training goes on, and further averages stand beside it.
        """
        checkpoint["config"] = self.config
        checkpoint["weights"] = RAW if self.averages is None else self.averages.primary
        if "optimizer_states" in checkpoint:
            checkpoint["objective"] = self.objective.state_dict()
            checkpoint["skipped_steps"] = [self.skipped_steps, self.skipped_in_a_row]
        if self.averages is None:
            return
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **self.averages.average()}
        if "optimizer_states" in checkpoint:
            checkpoint["current_model_state"] = self.averages.raw(self)
            checkpoint["averages"] = self.averages.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Training goes on from the raw weights; everything else takes those that `load_weights` names.

        Raises:
            ValueError: If the checkpoint's tensors are not those of this model, or it lacks the weights asked for.
        """
        self._check_fits(checkpoint["state_dict"])
        averages = checkpoint.get("averages")
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            restart_at_step(checkpoint, self.trainer.accumulate_grad_batches)
            self.objective.load_state_dict(checkpoint.get("objective", {}))
            self.skipped_steps, self.skipped_in_a_row = checkpoint.get("skipped_steps", (0, 0))
            if averages is not None:
                primary = checkpoint["state_dict"]
                self.restored_averages = {"state": averages, "primary": primary}
                checkpoint["state_dict"] = {**primary, **checkpoint["current_model_state"]}
            return
        self.averages = None
        choices: dict[str, dict[str, Tensor]] = {AVERAGED: {}, checkpoint.get("weights", RAW): {}}
        if averages is not None:
            choices |= {RAW: checkpoint["current_model_state"], **averages["averages"]}
        if self.load_weights not in choices:
            raise ValueError(f"weights={self.load_weights!r} are not in the checkpoint; it has {sorted(choices)}")
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **choices[self.load_weights]}
        self.loaded_step = checkpoint.get("global_step")
        averaged = self.load_weights == AVERAGED
        self.loaded_weights = checkpoint.get("weights", RAW) if averaged else self.load_weights

    def _check_fits(self, state: dict[str, Tensor]) -> None:
        own = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"the checkpoint is of another architecture: {len(wrong)} of {len(own)} tensors differ, first {name}: "
                f"{given.get(name, 'missing')} in the checkpoint, {own.get(name, 'missing')} in this model; "
                "give the model's options that it was trained with"
            )

    # Sampling

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode, no gradients and the trainer's precision; what was is restored."""
        modes = [(m, m.training) for m in self.modules()]
        precision = nullcontext() if self._trainer is None else self.trainer.precision_plugin.forward_context()
        self.eval()
        try:
            with torch.no_grad(), precision:
                yield
        finally:
            for m, training in modes:
                m.training = training

    def bind(self, condition: Condition) -> DenoiseFn:
        """What samplers call: the denoiser, with guidance if there is any, told this condition.

        Raises:
            ValueError: If a label is out of range, or given to a model without classes.
        """
        if "label" in condition:
            check_labels(condition["label"], self.num_classes)
        condition = {name: value.to(self.device) for name, value in condition.items()}
        return self.denoiser.bind(condition) if self.guidance is None else self.guidance(self.denoiser, condition)

    def sample(
        self,
        indices: Sequence[int],
        seed: int = 0,
        sampler: Sampler | None = None,
        condition: Condition | None = None,
        on_step: StepFn | None = None,
    ) -> Tensor:
        """Generates images with the weights that the module holds.

        Where memory does not suffice for all of them at once, half as many are made at a time, from then on; images
        are the same up to rounding, because each depends on the seed and its index alone.

        Args:
            indices: Which images, (B,); image i depends on the seed and i alone.
            seed: At least 0.
            sampler: Another sampler than the module's own.
            condition: Passed to the network; by default, of a model with classes, image i shows class i modulo their
                number. Without a label, {}, a network that knows the null label is unconditional.
            on_step: Told of every step done.

        Returns:
            Images, (B, C, H, W), nominally in [-1, 1], on the module's device.

        Raises:
            ValueError: If the condition does not fit the model or its guidance.
            torch.OutOfMemoryError: If memory does not suffice for a single image.
        """
        given = self.default_condition(indices) if condition is None else condition
        on_step = on_step or self.on_sampling_step

        def work(some: slice, part: int, parts: int) -> Tensor:
            of_part = {name: value[some] for name, value in given.items()}
            return self._sample(
                indices[some], seed, sampler or self.sampler, of_part, as_of_whole(on_step, part, parts)
            )

        if not indices:
            return torch.empty(0, *self.image_shape, device=self.device)
        at_once = self.sampled_at_once or len(indices)
        images, suffices = in_memory(work, len(indices), at_once, "while sampling")
        if suffices < at_once:
            self.sampled_at_once = suffices
        return torch.cat(images)

    def _sample(
        self, indices: Sequence[int], seed: int, sampler: Sampler, condition: Condition, on_step: StepFn | None
    ) -> Tensor:
        noise = ImageNoise(seed, indices, self.image_shape, self.device)
        denoise = self.bind(condition)
        with self.evaluating():
            return sampler(denoise, noise.draw(), self.process, noise.draw, on_step)

    def default_condition(self, indices: Sequence[int]) -> Condition:
        """What images are of where nobody says: class i modulo the number of classes, if there are any."""
        return {} if self.num_classes is None else {"label": torch.tensor(indices) % self.num_classes}

    def encode(self, images: Tensor, sampler: DDIM, condition: Condition | None = None) -> Tensor:
        """The noise that a deterministic sampler would turn into these images.

        Args:
            images: (B, C, H, W), in [-1, 1].
            sampler: Gives the grid.
            condition: Passed to the network.
        """
        with self.evaluating():
            return sampler.encode(self.bind(condition or {}), images.to(self.device), self.process)

    def decode(self, noise: Tensor, sampler: DDIM, condition: Condition | None = None) -> Tensor:
        """Images from given noise, (B, C, H, W), by a deterministic sampler.

        Raises:
            ValueError: If the sampler is not deterministic.
        """
        if sampler.eta != 0:
            raise ValueError(f"decode: eta={sampler.eta} would add noise of its own; use eta=0")
        noise = noise.to(self.device)
        with self.evaluating():
            return sampler(self.bind(condition or {}), noise, self.process, lambda: torch.zeros_like(noise))

    def predict_step(self, batch: Request, batch_idx: int) -> Generated:
        condition = dict(condition_of(batch) or self.default_condition(batch["index"].tolist()))
        with self.averaged_weights():
            images = self.sample(batch["index"].tolist(), self.generation_seed, condition=condition)
        return {"index": batch["index"], "image": to_uint8(images), "condition": condition}
