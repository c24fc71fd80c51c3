"""SIGTERM, SIGUSR1 and Ctrl-C: training stops between two steps, with a checkpoint; everything else stops at once."""

import os
import signal
from types import FrameType

import lightning.pytorch as L
from lightning.pytorch.trainer.states import TrainerFn

from diffusion_lit.lightning import SignalConnector, signal_connector

TO_BE_CONTINUED = os.EX_TEMPFAIL
"""Exit code, 75, of a run that was asked to stop and can continue; a run that has ended exits with 0."""


class Stopped(SystemExit):
    """A run was asked to stop before its end.

    Args:
        reason: The signal.
        step: The optimiser steps done; None if it did not train.
        code: Exit code of this process.
    """

    def __init__(self, reason: signal.Signals, step: int | None, code: int) -> None:
        super().__init__(code)
        self.reason = reason
        self.step = step

    def __str__(self) -> str:
        if self.step is None:
            return f"{self.reason.name}: stopped; the same command continues, or starts again"
        return f"{self.reason.name}: stopped after step {self.step:,}; --ckpt_path last continues from there"


class StopSignals(SignalConnector):
    """Notes a signal while a run trains; `Checkpoints` acts on it between two steps.

    Lightning's own handlers stop between two batches of a step, talk to other processes while these may be talking
    about something else, and differ under SLURM. A second Ctrl-C stops at once, without a checkpoint. Evaluations keep
    their parts as they go and have nothing to save: they stop at once too.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__(trainer)
        self.noted: signal.Signals | None = None

    def register_signal_handlers(self) -> None:
        self.received_sigterm = False
        self.noted = None
        self._original_handlers = self._get_current_signal_handlers()
        if self.trainer.state.fn != TrainerFn.FITTING:
            for signum in (signal.SIGTERM, signal.SIGUSR1):
                self._register_signal(signum, self._stop)
            return
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._register_signal(signum, self._note)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(signum), None, TO_BE_CONTINUED)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.noted is not None:
            raise KeyboardInterrupt
        self.noted = signal.Signals(signum)
        end = "; again to stop at once" if signum == signal.SIGINT else ""
        os.write(2, f"\n{self.noted.name}: stopping after this step{end}\n".encode())


def requested_stop(trainer: L.Trainer) -> signal.Signals | None:
    """The signal that any of the processes has received; collective, and the same on all."""
    signals = signal_connector(trainer)
    if not isinstance(signals, StopSignals):
        return None
    if trainer.world_size == 1:
        return signals.noted
    if not trainer.strategy.reduce_boolean_decision(signals.noted is not None, all=False):
        return None
    return signals.noted or signal.SIGTERM


def stop(trainer: L.Trainer, reason: signal.Signals) -> None:
    """Ends a run by an exception.

    Raises:
        Stopped: With the step. After Ctrl-C the exit code is 130. Of several processes only the first has another exit
            code than 0: a launcher would take it for a failure and kill the first before it has finished.
    """
    code = 128 + signal.SIGINT if reason == signal.SIGINT else TO_BE_CONTINUED
    raise Stopped(reason, trainer.global_step, code if trainer.is_global_zero else 0)
