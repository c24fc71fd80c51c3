"""The names of Lightning 2.6 that are private and still needed, one small function each.

`tests` hold one test per name, which fails when an upgrade of Lightning takes the name away.
"""

import re
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback, RichProgressBar, Timer
from lightning.pytorch.plugins import _PLUGIN_INPUT
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

if TYPE_CHECKING:
    # Of no use to who trains from Python.
    from lightning.pytorch.cli import LightningCLI

AnyCLI = TypeVar("AnyCLI", bound="type[LightningCLI]")
PluginInput = _PLUGIN_INPUT
"""What Lightning takes as a plugin."""

SignalConnector = _SignalConnector
"""Installs the signal handlers of a trainer; the base of our own."""


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """The trainer that a module belongs to at this moment; None outside of `fit`, `test` and so on."""
    return module._trainer


def log_gathered(module: L.LightningModule, name: str, value: Any) -> None:
    """Logs a value that is the same in every process, without Lightning's advice to gather it."""
    advice = f"It is recommended to use `self.log({name!r}, ..., sync_dist=True)`"
    warnings.filterwarnings("ignore", message=re.escape(advice))
    module.log(name, value, rank_zero_only=False, sync_dist=False)


def show_no_epochs(callback: Callback) -> None:
    """Lets Rich's bar be called "Training", where it would count epochs of which a run here has no number."""
    if isinstance(callback, RichProgressBar):
        callback._get_train_description = lambda current_epoch: "Training"  # type: ignore[method-assign]


def dump_checkpoint(trainer: L.Trainer, weights_only: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, not yet written; collective, because callbacks may gather their state."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only)


def signal_connector(trainer: L.Trainer) -> _SignalConnector:
    """What installs the signal handlers of a trainer."""
    return trainer._signal_connector


def set_signal_connector(trainer: L.Trainer, connector: _SignalConnector) -> None:
    """Replaces what installs the signal handlers of a trainer."""
    trainer._signal_connector = connector


def disable_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Stops the training loop from talking to other processes about SIGTERM after every batch."""
    nothing: Callable[[], None] = lambda: None  # noqa: E731
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = nothing  # type: ignore[method-assign]


def set_process_timeout(trainer: L.Trainer, seconds: float) -> None:
    """How long one of several processes waits for another; nothing where there is one process."""
    if hasattr(trainer.strategy, "_timeout"):
        trainer.strategy._timeout = timedelta(seconds=seconds)


def rewind_to_step(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Sets the batch counters of a checkpoint to the end of its last optimiser step, in place.

    Lightning counts a batch in several places, and a checkpoint may be written between two of them. A run that
    continues must start with the first batch of the next step, or it would repeat noise and lose accumulated batches.

    Args:
        checkpoint: As Lightning wrote it.
        accumulate: Batches per optimiser step.
    """
    step = checkpoint["global_step"]
    done = step * accumulate
    loop = checkpoint["loops"]["fit_loop"]
    for progress in (loop["epoch_loop.batch_progress"]["total"], loop["epoch_loop.batch_progress"]["current"]):
        # "completed" lags by one, as in a checkpoint that is written at the end of a batch.
        progress.update(ready=done, started=done, processed=done, completed=max(done - 1, 0))
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = max(step - 1, 0)
    validation = loop["epoch_loop.val_loop.batch_progress"]
    for progress in (validation["total"], validation["current"]):
        progress.update(dict.fromkeys(progress, 0))


def timer_interval(timer: Timer) -> str:
    """When a `Timer` looks at the clock: "step" or "epoch"."""
    return str(getattr(timer._interval, "value", timer._interval))


def runs_nothing(cli: AnyCLI) -> AnyCLI:
    """A class of command lines like another one, which make their parts and run no command."""
    made: AnyCLI = type("Parts", (cli,), {"_run_subcommand": lambda self, subcommand: None})  # type: ignore[assignment]
    return made


def ignores_carried_arguments(cli: AnyCLI) -> AnyCLI:
    """Lets a command line take no arguments from the hyperparameters of the checkpoint that it is given."""
    cli._parse_ckpt_path = lambda self: None  # type: ignore[method-assign]
    return cli


def callback_keys(cli: "LightningCLI", command: str) -> list[str]:
    """The sections of a command that are callbacks; what is taken out of the list is not made."""
    keys: list[str] = cli._subcommand_parsers[command].callback_keys
    return keys
