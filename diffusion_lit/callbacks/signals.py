"""What SIGTERM, SIGUSR1 and Ctrl-C do: what trains stops between two steps, with a checkpoint, all else at once."""

import os
import signal
from types import FrameType

import lightning.pytorch as L
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn

TO_BE_CONTINUED = os.EX_TEMPFAIL
"""Exit code, 75, of a run that was asked to stop and can go on; 0 is that of one that has ended."""


class Stopped(SystemExit):
    """A run was asked to stop before its end.

    Args:
        reason: The signal.
        step: The optimiser steps done; None where it did not train.
        code: Exit code of this process.
    """

    def __init__(self, reason: signal.Signals, step: int | None, code: int) -> None:
        super().__init__(code)
        self.reason = reason
        self.step = step

    def __str__(self) -> str:
        if self.step is None:
            return f"{self.reason.name}: stopped; the same command goes on, or does it again"
        return f"{self.reason.name}: stopped after step {self.step:,}; --ckpt_path last goes on from there"


class StopSignals(_SignalConnector):
    """Takes note of a signal while a run trains; `Checkpoints` acts on it between two steps.

    Lightning's own handlers stop between two batches of a step, talk to other processes while these may be talking
    about something else, and differ under SLURM. A second Ctrl-C stops at once. What does not train has nothing to
    save, for evaluations keep their parts as they go: it stops at once too.
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


def asked_to_stop(trainer: L.Trainer) -> signal.Signals | None:
    """The signal that any of the processes has received; collective, and the same on all."""
    signals = trainer._signal_connector
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
        KeyboardInterrupt: After Ctrl-C.
        Stopped: After any other signal. The code of all processes but the first is 0: a launcher would take another
            for a failure, and end the first before it has finished.
    """
    if reason == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(reason, trainer.global_step, TO_BE_CONTINUED if trainer.is_global_zero else 0)
