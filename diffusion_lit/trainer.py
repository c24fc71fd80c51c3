"""The Trainer behind the command line: what fit, validate, test, predict and table take and check."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
from lightning.pytorch.plugins import _PLUGIN_INPUT, CheckpointIO
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from diffusion_lit.callbacks.checkpoints import (
    WholeFiles,
    has_run,
    last_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    save,
    tidy,
)
from diffusion_lit.callbacks.image_writer import ImageWriter
from diffusion_lit.callbacks.progress import ProgressBar
from diffusion_lit.callbacks.signals import StopSignals
from diffusion_lit.evaluation import Evaluation, Likelihood
from diffusion_lit.evaluation.tables import DDIMTable, Table, Tabulator
from diffusion_lit.execution import Execution
from diffusion_lit.generation import Request, Requests, asked_labels, check_seed
from diffusion_lit.loggers import curves_of
from diffusion_lit.module import AVERAGED, DiffusionModule

LAST = "last"
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class Trainer(L.Trainer):
    """Lightning's Trainer with whole-file checkpoints, our own sharding of data, and `predict` by number of images.

    A run is its directory, `default_root_dir`.

    Args:
        plugins: Lightning's; a checkpoint plugin takes the place of ours.
        process_timeout: Seconds after which a process gives up waiting for another, of several; more than the longest
            that one may be busy alone, such as drawing a grid of samples.
        channels_last: Whether the network's convolutions have their channels last in memory, as tensor cores want.
        compile: "inductor", or another backend of torch.compile, to compile the network for each batch size at its
            first use, which takes minutes; null: it runs as it is.
        cuda_graphs: Whether sampling with a compiled network replays CUDA graphs; on a CPU it changes nothing.

    Raises:
        ValueError: If the time or `accumulate_grad_batches` is not positive, the limit of gradients is negative, the
            precision is none of `PRECISIONS`, or the network cannot be run so.
    """

    def __init__(
        self,
        *args: Any,
        plugins: _PLUGIN_INPUT | list[_PLUGIN_INPUT] | None = None,
        process_timeout: float = 1800.0,
        channels_last: bool = False,
        compile: str | None = None,
        cuda_graphs: bool = False,
        **kwargs: Any,
    ) -> None:
        if not process_timeout > 0:
            raise ValueError(f"trainer.process_timeout={process_timeout} must be above 0 seconds")
        self.execution = Execution(channels_last, compile, cuda_graphs)
        interval = kwargs.get("val_check_interval")
        if isinstance(interval, float) and kwargs.get("check_val_every_n_epoch", 1) is None:
            raise ValueError(
                f"trainer.val_check_interval={interval} must be a whole number of batches: epochs are not counted"
            )
        given = [] if plugins is None else plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in given):
            given = [*given, WholeFiles()]
        if kwargs.get("enable_progress_bar") is False and isinstance(kwargs.get("callbacks"), list):
            kwargs["callbacks"] = [c for c in kwargs["callbacks"] if not isinstance(c, ProgressBar)]
        kwargs["use_distributed_sampler"] = False
        super().__init__(*args, plugins=given, **kwargs)
        if not self.accumulate_grad_batches or self.accumulate_grad_batches < 1:
            raise ValueError(f"trainer.accumulate_grad_batches={self.accumulate_grad_batches} must be at least 1")
        if self.gradient_clip_val is not None and not self.gradient_clip_val >= 0:
            raise ValueError(
                f"trainer.gradient_clip_val={self.gradient_clip_val} must be at least 0; 0 or null to clip nothing"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={self.precision}: weights and noise are float32 here; use {', '.join(PRECISIONS)}"
            )
        if hasattr(self.strategy, "_timeout"):
            self.strategy._timeout = timedelta(seconds=process_timeout)
        self._signal_connector = StopSignals(self)
        # Lightning's way to agree, once a batch; `Checkpoints` agrees once a step.
        self.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def fit(  # type: ignore[override]
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Trains a model.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: A checkpoint to continue from, or "last": the run's own newest that is whole, if it has one.

        Raises:
            ValueError: If the run directory cannot be written to, or holds a run that would be overwritten; or if the
                checkpoint is damaged.
            FileNotFoundError: If the checkpoint is not there.
        """
        run_dir = Path(self.default_root_dir)
        step: int = 0
        rows: int | None = 0
        may_begin = ckpt_path == LAST
        found = newest_checkpoint(run_dir) if may_begin else None
        if found is not None:
            ckpt_path, checkpoint = str(found[0]), found[1]
            rank_zero_info(f"continuing from {ckpt_path}")
        elif ckpt_path == LAST:
            ckpt_path = None
            rank_zero_info(f"{last_checkpoint(run_dir)} is not there: starting anew")
        elif ckpt_path is not None:
            checkpoint = read_checkpoint(ckpt_path)
        if ckpt_path is not None:
            step, rows = checkpoint.get("global_step", 0), checkpoint.get("curves")
            del checkpoint
        if self.is_global_zero:
            require_writable(run_dir)
            if ckpt_path is None and not may_begin and has_run(run_dir):
                raise ValueError(
                    f"{run_dir} holds a run already: continue it with --ckpt_path last, or choose another directory "
                    "with --trainer.default_root_dir"
                )
            tidy(run_dir, None if found is None else found[0])
        curves = curves_of(self)
        if curves is not None:
            curves.go_on(step, rows)
        del found
        super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

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
        self._choose(model, ckpt_path, weights)
        return super().validate(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

    def test(  # type: ignore[override]
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights: str = AVERAGED,
    ) -> Any:
        """Computes the loss over the test images and what `evaluation` and `likelihood` ask for.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: The checkpoint to look at.
            weights: "averaged", "raw", or the decay of a further average.
        """
        self._choose(model, ckpt_path, weights)
        return super().test(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

    def predict(  # type: ignore[override]
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights: str = AVERAGED,
        num_images: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        out: str | None = None,
        npz: bool = True,
        labels: str | list[int] | None = None,
        per_class: int | None = None,
    ) -> None:
        """Generates images: PNG files, a grid and an .npz.

        Args:
            model: The model.
            datamodule: Not used.
            ckpt_path: The checkpoint to draw from.
            weights: "averaged", "raw", or the decay of a further average.
            num_images: How many images; by default as many as labels ask for, else 64.
            batch_size: Images made at once by each process.
            seed: Image i depends on the seed and i alone.
            out: Where to; by default <run>/predictions/<checkpoint>_seed_<seed>, whose earlier images are replaced.
            npz: Whether to write all images as one .npz too.
            labels: Classes, such as 3,3,7: image i shows the i-th, and after the last the first again. By default, of a
                model with classes, image i shows class i modulo their number.
            per_class: Instead of labels, so many images of every class, class by class; the grid has one row a class.

        Raises:
            ValueError: If a number is out of range, the model has no such class or `out` cannot be written to.
        """
        self._choose(model, ckpt_path, weights)
        check_seed("seed", seed)
        asked = asked_labels(labels, per_class, getattr(model, "num_classes", None))
        if num_images is None:
            num_images = 64 if asked is None else len(asked)
        requests = Requests(num_images, batch_size, asked)
        source = "" if ckpt_path is None else f"{Path(ckpt_path).stem}_"
        default = Path(self.default_root_dir) / "predictions" / f"{source}seed_{seed}"
        directory = Path(out) if out is not None else default
        if self.is_global_zero:
            require_writable(directory)
            make_room(directory, mine=out is None)
        if isinstance(model, DiffusionModule):
            model.generation_seed = seed
        writer = ImageWriter(directory, requests, npz, columns=per_class)
        self.callbacks.append(writer)  # type: ignore[attr-defined]
        try:
            super().predict(
                model, datamodule=Generation(requests), return_predictions=False, ckpt_path=ckpt_path, weights_only=True
            )
        finally:
            self.callbacks.remove(writer)  # type: ignore[attr-defined]

    def table(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights: str = AVERAGED,
        table: Table = DDIMTable(),
    ) -> None:
        """Fills a table of scores: <run>/table_<name>.md, .csv and .png. What is done already is not done again.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: The checkpoint to look at.
            weights: "averaged", "raw", or the decay of a further average.
            table: Over what: DDIM's steps and eta (DDIMTable), samplers (SamplerTable), averages (AverageTable) or
                training steps (StepTable).

        Raises:
            ValueError: If there is no checkpoint, or nothing to fill the table with.
        """
        if ckpt_path is None:
            raise ValueError("table: give --ckpt_path CHECKPOINT")
        self._choose(model, ckpt_path, weights)
        callbacks: list[L.Callback] = self.callbacks  # type: ignore[attr-defined]
        [evaluation] = [callback for callback in callbacks if isinstance(callback, Evaluation)]
        tabulator = Tabulator(evaluation, table, Path(ckpt_path))
        kept = list(callbacks)
        callbacks[:] = [c for c in kept if not isinstance(c, Evaluation | Likelihood)] + [tabulator]
        try:
            super().test(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True, verbose=False)
        finally:
            callbacks[:] = kept

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
        problem = save(self, os.fspath(filepath), weights_only)
        if problem is not None:
            rank_zero_warn(f"{problem}; training goes on")

    def _choose(self, model: L.LightningModule, ckpt_path: str | None, weights: str) -> None:
        if ckpt_path is not None:
            read_checkpoint(ckpt_path)
        if isinstance(model, DiffusionModule):
            model.load_weights = weights


class Generation(L.LightningDataModule):
    """Gives every process its requests, once it knows which process it is.

    Args:
        requests: What all processes are going to generate.
    """

    def __init__(self, requests: Requests) -> None:
        super().__init__()
        self.requests = requests

    def predict_dataloader(self) -> DataLoader[Request]:
        trainer = cast(L.Trainer, self.trainer)
        return self.requests.loader(trainer.global_rank, trainer.world_size)


def make_room(directory: Path, mine: bool) -> None:
    """Sees to it that images of two predictions never mix.

    Args:
        directory: Where images are to go.
        mine: Whether images there may be removed; else they are an error.

    Raises:
        ValueError: If there are images that may not be removed.
    """
    there = sorted(directory.glob("[0-9]" * 6 + ".png"))
    if there and not mine:
        raise ValueError(f"{directory} holds {len(there)} images already; choose another directory with --out")
    for path in there:
        path.unlink()


def require_writable(directory: Path) -> None:
    """Makes the directory; raises ValueError if that, or writing into it, is not possible."""
    probe = directory / f".writable.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to {directory} ({error.strerror}); choose another directory with "
            "--trainer.default_root_dir, or --out in predict"
        ) from error
