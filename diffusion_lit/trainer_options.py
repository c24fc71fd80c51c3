"""Which of Lightning's options and callbacks a run takes: docs/trainer_options.md has the whole table.

Training here is counted in optimiser steps, its data are an endless stream, and a run that is killed continues bit for
bit. What assumes epochs, changes the recipe while training, or does by itself what a section of the recipe does is
refused, with the option to use instead.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from diffusion_lit.lightning import timer_interval

STEPS = "training is counted in steps, of data.batch_size images each"
ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "fast_dev_run": ((False, 0), "it leaves no run behind that could continue, yet its files; for a short try set "
                     "--trainer.max_steps 2 --trainer.default_root_dir runs/try"),
    "max_epochs": ((None, -1), f"{STEPS}; set --trainer.max_steps"),
    "min_epochs": ((None,), f"{STEPS}; set --trainer.min_steps"),
    "limit_train_batches": ((None, 1.0), f"{STEPS}; set --trainer.max_steps"),
    "limit_predict_batches": ((None, 1.0), "images are asked for by their number; set --num_images"),
    "overfit_batches": ((0, 0.0), "the stream of training images does not repeat; to train on a few images, give a "
                        "folder that holds only these with --data.source Folder"),
    "check_val_every_n_epoch": ((None,), f"{STEPS}; set --trainer.val_check_interval to a number of batches"),
    "reload_dataloaders_every_n_epochs": ((0,), f"{STEPS}; leave it out"),
    "barebones": ((False,), "a run without checkpoints and curves is no run; set --trainer.logger false, --checkpoints "
                  "null and --trainer.enable_progress_bar false instead"),
    "model_registry": ((None,), "checkpoints are kept in the run's directory alone; leave it out"),
}  # fmt: skip
"""Options that take some values only, with the reason and the remedy."""
CALLBACKS: dict[type[Callback], str] = {
    BaseFinetuning: "it adds parameters to the optimiser while training; start from trained weights with --init_from",
    BatchSizeFinder: "the batch size is part of the recipe; set --data.batch_size and, to make memory suffice, "
    "--trainer.accumulate_grad_batches",
    GradientAccumulationScheduler: "a step has data.batch_size images; set --trainer.accumulate_grad_batches",
    LearningRateFinder: "the learning rate is part of the recipe; set --model.optimizer.lr",
    ModelPruning: "it replaces the parameters that checkpoints and averages hold; leave it out",
    OnExceptionCheckpoint: "it writes steps that are not whole; --checkpoints does so for whole ones, leave it out",
    SpikeDetection: "it skips batches, which a run that continues would not; set --model.max_skipped_steps",
    StochasticWeightAveraging: "averages of the weights belong to the section ema; set --ema.decays",
    WeightAveraging: "averages of the weights belong to the section ema; set --ema.decays",
}
"""Callbacks that are refused, with their subclasses."""
STRATEGIES = ("auto", "single_device", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
MOST_PROCESSES = 2**16
NO_STEP = ("", "4294967290", "4294967291")
"""What SLURM calls the step of a batch script's or an interactive shell's own processes."""


def check_options(options: Mapping[str, Any]) -> None:
    """Checks the arguments of a trainer that is not made yet.

    Args:
        options: As they were given, without those left out.

    Raises:
        ValueError: That names the option, its value and the remedy.
    """
    for name, (allowed, reason) in ALLOWED.items():
        value = options.get(name, allowed[0])
        if not any(type(value) is type(right) and value == right for right in allowed):
            raise ValueError(f"trainer.{name}={value!r} is not supported: {reason}")
    _check_numbers(options)
    if options.get("profiler") == "xla":
        raise ValueError("trainer.profiler=xla is not supported: it is a TPU's; use simple, advanced or pytorch")
    _check_machine(options)
    _check_launch(options.get("plugins") or [])


def _check_numbers(options: Mapping[str, Any]) -> None:
    interval = options.get("val_check_interval")
    if interval is not None and (type(interval) is not int or interval < 1):
        raise ValueError(
            f"trainer.val_check_interval={interval} must be a whole number of batches, at least 1: epochs are not "
            "counted, and a time differs from run to run; to skip validation set --trainer.limit_val_batches 0"
        )
    steps = options.get("max_steps", -1)
    if type(steps) is not int or steps < -1:
        raise ValueError(f"trainer.max_steps={steps} must be a whole number of steps, or -1 for no end")
    if (options.get("min_steps") or 0) < 0:
        raise ValueError(f"trainer.min_steps={options['min_steps']} must be at least 0")
    if (options.get("log_every_n_steps") or 0) < 0:
        raise ValueError(f"trainer.log_every_n_steps={options['log_every_n_steps']} must be at least 1, or 0 for never")
    if options.get("max_time") is not None:
        _check_time(options["max_time"])


def _check_time(value: Any) -> None:
    try:
        Timer(value)
    except Exception as error:  # Lightning's own, and what timedelta raises.
        raise ValueError(
            f"trainer.max_time={value!r} must be a time such as 00:12:00:00 (days, hours, minutes, seconds) or "
            "{hours: 12}"
        ) from error


def _check_machine(options: Mapping[str, Any]) -> None:
    for name in ("devices", "num_nodes"):
        count = options.get(name, 1)
        if type(count) is int and count > MOST_PROCESSES:
            raise ValueError(f"trainer.{name}={count} must be at most {MOST_PROCESSES}")
    accelerator, strategy = options.get("accelerator", "auto"), options.get("strategy", "auto")
    devices = options.get("devices", "auto")
    is_count = type(devices) in (int, str) and str(devices).strip().isdecimal() and int(devices) > 0
    if _is_cpu(accelerator) and devices != "auto" and not is_count:
        raise ValueError(f"trainer.devices={devices} must be a number of processes, at least 1, on a CPU, or auto")
    if not isinstance(accelerator, CPUAccelerator | CUDAAccelerator) and accelerator not in ACCELERATORS:
        raise ValueError(
            f"trainer.accelerator={accelerator} is not supported: a process needs float64, as CPUs and NVIDIA's GPUs "
            f"have it; use one of {', '.join(ACCELERATORS)}"
        )
    if isinstance(strategy, Strategy):
        right = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    else:
        right = strategy in STRATEGIES
    if not right:
        raise ValueError(
            f"trainer.strategy={strategy if isinstance(strategy, str) else type(strategy).__name__} is not supported: "
            "averages, checkpoints and signals need whole weights in processes of their own; use --trainer.strategy ddp"
        )


def _is_cpu(accelerator: Any) -> bool:
    chosen = accelerator == "cpu" or isinstance(accelerator, CPUAccelerator)
    return chosen or (accelerator == "auto" and not CUDAAccelerator.is_available())


def _check_launch(plugins: Any) -> None:
    """Refuses a job of several processes under SLURM that srun has not started."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if _in_job(plugins) and not _by_srun() and tasks != "1":
        raise ValueError(_not_by_srun(f"SLURM_NTASKS={tasks}"))


def check_processes(trainer: L.Trainer, plugins: Any) -> None:
    """Raises ValueError if SLURM has not started as many processes as a trainer is made of."""
    wanted = f"trainer.devices={trainer.num_devices} and trainer.num_nodes={trainer.num_nodes}"
    tasks, processes = os.environ.get("SLURM_NTASKS", "1"), trainer.num_devices * trainer.num_nodes
    if not _in_job(plugins) or tasks == str(processes):
        return
    if not _by_srun():
        raise ValueError(_not_by_srun(wanted))
    raise ValueError(
        f"{wanted} make {processes} processes, but srun has started SLURM_NTASKS={tasks}; make them agree: "
        "--trainer.devices is srun's --ntasks-per-node, and --trainer.num_nodes its --nodes"
    )


def _in_job(plugins: Any) -> bool:
    """Whether Lightning takes this process for one that srun has started."""
    given = plugins if isinstance(plugins, list) else [plugins]
    chosen = any(hasattr(plugin, "creates_processes_externally") for plugin in given)
    inside = "SLURM_NTASKS" in os.environ and SLURMEnvironment.job_name() not in ("bash", "interactive")
    return inside and not chosen and not TorchElasticEnvironment.detect()


def _by_srun() -> bool:
    return os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID", "")) not in NO_STEP


def _not_by_srun(what: str) -> str:
    return (
        f"{what} inside a SLURM job, but srun has not started this process: it would wait for others that never come; "
        "put srun in front of the command, with a task for each process, or, to let this process start the others on "
        "this machine, also in a shell of salloc, put SLURM_JOB_NAME=interactive in front of it"
    )


def check_kind(kind: type) -> None:
    """Raises ValueError, with the remedy, if no trainer takes callbacks of a class."""
    for refused, reason in CALLBACKS.items():
        if issubclass(kind, refused):
            raise ValueError(f"trainer.callbacks: {kind.__name__} is not supported: {reason}")


def check_callbacks(callbacks: Iterable[Callback], options: Mapping[str, Any]) -> None:
    """Checks the callbacks of a trainer that is not made yet.

    Args:
        callbacks: All of them.
        options: The other arguments of the trainer.

    Raises:
        ValueError: That names the callback and the remedy.
    """
    for callback in callbacks:
        name = type(callback).__name__
        check_kind(type(callback))
        if isinstance(callback, Timer) and timer_interval(callback) != "step":
            raise ValueError(f"trainer.callbacks: {name}.interval must be 'step': {STEPS}")
        if isinstance(callback, ModelCheckpoint):
            _check_model_checkpoint(callback)
        if isinstance(callback, EarlyStopping) and not _validates(options):
            raise ValueError(
                f"trainer.callbacks: {name} looks at scores after each validation, and there is none; set "
                "--trainer.val_check_interval and leave --trainer.limit_val_batches out"
            )
        if isinstance(callback, Checkpoint) and options.get("enable_checkpointing") is False:
            raise ValueError(
                f"trainer.enable_checkpointing=False, but there is {name}; to write no checkpoints set --checkpoints "
                "null and leave enable_checkpointing out"
            )


def _validates(options: Mapping[str, Any]) -> bool:
    limit = options.get("limit_val_batches")
    return options.get("val_check_interval") is not None and (limit is None or limit > 0)


def _check_model_checkpoint(callback: ModelCheckpoint) -> None:
    if callback.save_last:
        raise ValueError(
            "trainer.callbacks: ModelCheckpoint.save_last=True is not supported: last.ckpt is written by the section "
            "checkpoints; set --checkpoints.every_n_steps, and leave save_last out"
        )
    if (callback.every_n_epochs or 0) > 1:
        raise ValueError(
            f"trainer.callbacks: ModelCheckpoint.every_n_epochs={callback.every_n_epochs} is not supported: {STEPS}; "
            "set every_n_train_steps"
        )


def check_device(trainer: L.Trainer, options: Mapping[str, Any]) -> None:
    """Raises ValueError if an option needs another device than a trainer uses."""
    if options.get("sync_batchnorm") and trainer.strategy.root_device.type == "cpu":
        raise ValueError("trainer.sync_batchnorm=True is not supported on a CPU, where torch has none; leave it out")


def place_checkpoints(callbacks: Iterable[Callback], run_dir: Path) -> None:
    """Lets `ModelCheckpoint` write into the run's folder of checkpoints where it names no other."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = os.path.abspath(run_dir / "checkpoints")
