"""The Trainer behind the command line: what fit, validate, test and predict take and check."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.fabric.loggers.logger import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from diffusion_lit.callbacks.changes import ChangedOptions
from diffusion_lit.callbacks.checkpoints import save
from diffusion_lit.callbacks.image_writer import ImageWriter
from diffusion_lit.callbacks.progress import one_bar
from diffusion_lit.callbacks.signals import StopSignals
from diffusion_lit.checkpoint import (
    AVERAGED,
    LAST,
    WholeFiles,
    has_run,
    last_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    run_of,
    tidy,
)
from diffusion_lit.data import ImageData
from diffusion_lit.edit import Edit, Edited
from diffusion_lit.execution import Execution
from diffusion_lit.files import require_writable
from diffusion_lit.generator import Generator
from diffusion_lit.lightning import PluginInput, disable_sigterm_broadcast, set_process_timeout, set_signal_connector
from diffusion_lit.locks import locked
from diffusion_lit.loggers import bind_loggers, resume_loggers
from diffusion_lit.prediction import Generation, asked_conditions, asked_requests, room
from diffusion_lit.system import System
from diffusion_lit.trainer_options import (
    check_callbacks,
    check_device,
    check_options,
    check_processes,
    place_checkpoints,
)

LOCK_PATIENCE = 60.0
"""Seconds that a run waits for another one in its directory, which may be ending."""
LONGEST = 1e9
"""Seconds that one process may wait for another; some 30 years."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class Trainer(L.Trainer):
    """Lightning's Trainer with whole-file checkpoints, our own sharding of data, and `predict` by number of images.

    A run is its directory, `default_root_dir`.

    Args:
        logger: Loggers of curves, of Lightning's base class of all of them, which LitLogger derives from.
        plugins: Lightning's; a checkpoint plugin replaces ours.
        gradient_clip_val: Largest global norm of the gradients of one optimiser; null or 0: no limit.
        process_timeout: Seconds after which one of several processes gives up waiting for another; more than the
            longest that one may be busy alone, such as drawing a grid of samples.
        channels_last: Whether the network's convolutions have their channels last in memory, as tensor cores want.
        compile: "inductor", or another backend of torch.compile, to compile the network for each batch size at its
            first use, which takes minutes; null: it is not compiled.
        cuda_graphs: Whether sampling with a compiled network replays CUDA graphs; on a CPU it changes nothing.

    Raises:
        ValueError: If the time or `accumulate_grad_batches` is not positive, the limit of gradients is negative, the
            precision is none of `PRECISIONS`, or the network cannot be run so.
    """

    def __init__(
        self,
        *args: Any,
        logger: Logger | Iterable[Logger] | bool | None = None,
        plugins: PluginInput | list[PluginInput] | None = None,
        gradient_clip_val: float | None = 1.0,
        process_timeout: float = 1800.0,
        channels_last: bool = False,
        compile: str | None = None,
        cuda_graphs: bool = False,
        **kwargs: Any,
    ) -> None:
        if type(process_timeout) not in (int, float) or not 0 < process_timeout <= LONGEST:
            raise ValueError(
                f"trainer.process_timeout={process_timeout} must be above 0 seconds, and at most {LONGEST:.0f}"
            )
        self.execution = Execution(channels_last, compile, cuda_graphs)
        kwargs = {"max_epochs": -1, "check_val_every_n_epoch": None, **kwargs}
        check_options({"plugins": plugins, **kwargs})
        given = [] if plugins is None else plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in given):
            given = [*given, WholeFiles()]
        callbacks = kwargs.get("callbacks") or []
        callbacks = one_bar(
            callbacks if isinstance(callbacks, list) else [callbacks], kwargs.get("enable_progress_bar")
        )
        check_callbacks(callbacks, kwargs)
        kwargs["callbacks"] = [ChangedOptions(), *callbacks]
        if gradient_clip_val is not None and not gradient_clip_val >= 0:
            raise ValueError(
                f"trainer.gradient_clip_val={gradient_clip_val} must be at least 0; 0 or null to clip nothing"
            )
        self.clip_norm = gradient_clip_val
        """Read by `System`, which clips, with one optimiser and with several; Lightning is not told."""
        kwargs["use_distributed_sampler"] = False
        super().__init__(*args, logger=logger, plugins=given, **kwargs)  # type: ignore[arg-type]
        check_processes(self, plugins)
        check_device(self, kwargs)
        place_checkpoints(callbacks_of(self), Path(self.default_root_dir))
        bind_loggers(self)
        if not self.accumulate_grad_batches or self.accumulate_grad_batches < 1:
            raise ValueError(f"trainer.accumulate_grad_batches={self.accumulate_grad_batches} must be at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={self.precision}: weights and noise are float32 here; use {', '.join(PRECISIONS)}"
            )
        set_process_timeout(self, process_timeout)
        set_signal_connector(self, StopSignals(self))
        # `Checkpoints` agrees on signals once a step.
        disable_sigterm_broadcast(self)

    def fit(  # type: ignore[override]
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        init_from: str | None = None,
        weights: str = AVERAGED,
    ) -> None:
        """Trains a model.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: A checkpoint to continue from, or "last": the run's own newest that is whole, if it has one.
            init_from: A checkpoint from whose weights a new run starts; optimiser, data and steps are new. A class
                embedding for another number of classes starts at random.
            weights: Which of the weights of `init_from`: "averaged", "raw", or a decay such as "0.999".

        Raises:
            ValueError: If the run directory cannot be written to, is in use, or holds a run that would be overwritten;
                or if a checkpoint is damaged, does not fit or has no steps left.
            FileNotFoundError: If a checkpoint is not there.
        """
        if init_from is not None and ckpt_path not in (None, LAST):
            raise ValueError(
                f"ckpt_path={ckpt_path} continues a run and init_from={init_from} starts one; give one of them, or "
                "--ckpt_path last beside --init_from, which continues the run if there is one"
            )
        if init_from is None and weights != AVERAGED:
            raise ValueError(f"weights={weights!r} are those of --init_from, which is not given")
        if isinstance(model, System):
            model.check_training(self)
        if self.world_size > 1 and datamodule is not None and not isinstance(datamodule, ImageData):
            rank_zero_warn(
                f"{type(datamodule).__name__}: each of {self.world_size} processes trains on what its loader gives; "
                "give it a DistributedSampler, or train with Lightning's own Trainer, which adds one"
            )
        run_dir = Path(self.default_root_dir)
        if self.is_global_zero:
            require_writable(run_dir)
        with locked(run_dir / ".lock", "trains", LOCK_PATIENCE) if self.is_global_zero else nullcontext():
            start = self._find_start(run_dir, ckpt_path)
            if start is not None:
                ckpt_path = str(start[0])
            elif ckpt_path == LAST:
                ckpt_path = None
            if self.is_global_zero:
                tidy(run_dir, None if start is None else start[0])
            if ckpt_path is None and init_from is not None:
                initialize(model, init_from, weights)
            if ckpt_path is None and isinstance(model, System):
                model.start(datamodule, self.strategy.root_device)
            before = {"curves": 0} if start is None else start[1]
            state = {name: before[name] for name in ("curves", "wandb") if name in before}
            resume_loggers(self, before.get("global_step", 0), state)
            del start, before
            super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

    def _find_start(self, run_dir: Path, ckpt_path: str | None) -> tuple[Path, Mapping[str, Any]] | None:
        """The checkpoint to continue from and its content, if there is one; see `fit` for the errors."""
        if ckpt_path == LAST:
            found = newest_checkpoint(run_dir)
            rank_zero_info(
                f"{last_checkpoint(run_dir)} is not there: starting a new run"
                if found is None
                else f"continuing from {found[0]}"
            )
            if found is not None and 0 <= self.max_steps < (step := found[1].get("global_step", 0)):
                raise ValueError(f"{found[0]} is of step {step}, beyond trainer.max_steps={self.max_steps}; raise it")
            return found
        checkpoint = None if ckpt_path is None else read_checkpoint(ckpt_path)
        if self.is_global_zero and has_run(run_dir) and (ckpt_path is None or run_of(ckpt_path) != run_dir.resolve()):
            raise ValueError(
                f"{run_dir} holds a run already: continue it with --ckpt_path last, or choose another directory with "
                "--trainer.default_root_dir"
            )
        if ckpt_path is None or checkpoint is None:
            return None
        step = checkpoint.get("global_step", 0)
        if 0 <= self.max_steps <= step:
            raise ValueError(
                f"{ckpt_path} is of step {step}, and trainer.max_steps={self.max_steps} leaves none to train; raise "
                "--trainer.max_steps, or start a new run from its weights with --init_from"
            )
        return Path(ckpt_path), checkpoint

    def validate(  # type: ignore[override]
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights: str = AVERAGED,
    ) -> Any:
        """Computes the loss over the validation images.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: The checkpoint to look at.
            weights: "averaged", "raw", or the decay of a further average.
        """
        require_batches("limit_val_batches", self.limit_val_batches)
        with held_weights(model, ckpt_path, weights):
            return super().validate(model, datamodule=datamodule)

    def test(  # type: ignore[override]
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights: str = AVERAGED,
    ) -> Any:
        """Computes the loss over the test images and what the sections `evaluation` and `likelihood` ask for.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: The checkpoint to look at.
            weights: "averaged", "raw", or the decay of a further average.
        """
        require_batches("limit_test_batches", self.limit_test_batches)
        with held_weights(model, ckpt_path, weights):
            return super().test(model, datamodule=datamodule)

    def predict(  # type: ignore[override]
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights: str = AVERAGED,
        num_images: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        out: str | None = None,
        npz: bool = True,
        labels: str | list[int] | None = None,
        per_class: int | None = None,
        prompts: list[str] | None = None,
        prompts_file: str | None = None,
        image: str | None = None,
        mask: str | None = None,
        mask_white: Literal["hole", "known"] = "hole",
        map: str | None = None,
        edit: Edit | None = None,
        animate: Literal["x0", "x_t"] | None = None,
    ) -> None:
        """Generates images: a folder of PNG files, and a grid and an .npz beside it; or what else a system predicts.

        Args:
            model: The model.
            datamodule: For systems that predict something of images, and for generators that make them from examples.
            ckpt_path: The checkpoint to draw from.
            weights: "averaged", "raw", or the decay of a further average.
            num_images: How many images; by default as many as labels ask for, else 64.
            batch_size: Images made at once by each process; by default at most 64, as even as the number allows. Images
                are the same to the bit at one batch size, and up to rounding at others.
            seed: Image i depends on the seed and i alone.
            out: Where to; by default <run>/predictions/<checkpoint>_seed_<seed>, whose earlier images are replaced.
            npz: Whether to write all images as one .npz too.
            labels: Classes, such as 3,3,7: image i shows the i-th, and after the last the first again. By default, of a
                model with classes, image i shows class i modulo their number.
            per_class: Instead of labels, so many images of every class, class by class; the grid has one row a class.
            prompts: Texts, for models that take them: image i shows the i-th.
            prompts_file: Instead, a file with one text on each line.
            image: A file, or a folder such as an earlier prediction's: image i is made from the i-th, in the order of
                paths, and after the last from the first again. For models of low resolution it is the small image.
            mask: Likewise, a file or folder of masks, of two colours.
            mask_white: Whether white in the masks is what is to be filled in ("hole"), or what is known ("known").
            map: Likewise, a file or folder of maps, palette or grey PNG files whose values are classes.
            edit: Another way to make images with the same model.
            animate: Whether to write an animated PNG too, in which the first 16 images come about: the clean image as
                predicted at each step (x0), or the noisy one (x_t).

        Raises:
            ValueError: If a number is out of range, the model has no such class or `out` cannot be written to.
        """
        with held_weights(model, ckpt_path, weights):
            if edit is not None:
                model = Edited.of(model, edit)
            conditions = asked_conditions(model, labels, per_class, prompts, prompts_file, image, mask, map, mask_white)
            if conditions is None and isinstance(model, Generator) and model.entries:
                conditions = model.conditions(datamodule)
            requests = asked_requests(conditions, num_images, batch_size, seed)
            source = "" if ckpt_path is None else f"{Path(ckpt_path).stem}_"
            default = Path(self.default_root_dir) / "predictions" / f"{source}seed_{seed}"
            # Not as it was given: "." has no name, after which the files beside the folder are called.
            directory = default if out is None else Path(os.path.abspath(out))
            other = None
            if isinstance(model, System):
                other = model.prediction(datamodule, directory, num_images, batch_size, seed)
            if other is None:
                other = Generation(requests), ImageWriter(directory, requests, npz, per_class, animate)
            batches, writer = other
            callbacks = callbacks_of(self)
            callbacks.append(writer)
            try:
                with room(directory, replace=out is None) if self.is_global_zero else nullcontext():
                    super().predict(model, datamodule=batches, return_predictions=False)
            finally:
                callbacks.remove(writer)

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint; collective. While training, one that cannot be written is a warning.

        Args:
            filepath: Where to.
            weights_only: Whether to leave out what only training needs.
            storage_options: For a checkpoint plugin of the user's.
        """
        if self.state.status != TrainerStatus.RUNNING or storage_options is not None:
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        save(self, os.fspath(filepath), bool(weights_only))


def require_batches(option: str, limit: float) -> None:
    """Raises ValueError if an option leaves a command no batch, without which Lightning does nothing at all."""
    if limit == 0:
        raise ValueError(
            f"trainer.{option}=0 leaves nothing to do, scores included; leave it out, or set it to at least 1"
        )


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks of a trainer, as it holds them."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def initialize(model: L.LightningModule, path: str, weights: str) -> None:
    """Gives a new run weights of a checkpoint; see `Weighted.initialize`."""
    if not isinstance(model, System):
        raise ValueError(f"init_from: a {type(model).__name__} is no System")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"init_from={path}: there is no such file")
    fresh = model.initialize(read_checkpoint(path), weights)
    rank_zero_info(f"starting from the weights of {path}" + (f"; at random: {', '.join(fresh)}" if fresh else ""))


@contextmanager
def held_weights(model: L.LightningModule, ckpt_path: str | None, weights: str) -> Iterator[None]:
    """Gives a model one set of weights: those of a checkpoint, for good, or its own, inside this context.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, does not fit the model, or there are no such weights.
    """
    if isinstance(model, System):
        if ckpt_path is not None:
            checkpoint: Mapping[str, Any] = read_checkpoint(ckpt_path)
            model.load(checkpoint, weights, ckpt_path)
        with model.only_weights(weights) if ckpt_path is None else nullcontext():
            yield
    elif ckpt_path is None:
        yield
    else:
        raise ValueError(f"a {type(model).__name__} is no System, whose weights can be chosen from a checkpoint")
