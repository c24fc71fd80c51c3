"""What is kept of a run, and how it is written."""

import contextlib
import hashlib
import os
import pickle
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import lightning.pytorch as L
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm

from diffusion_lit.callbacks.signals import asked_to_stop, stop
from diffusion_lit.loggers import curves_of
from diffusion_lit.module import NonFiniteGradients

FOLDER = "checkpoints"
LAST = "last"
CARRIED = (
    "seed_everything",
    "model",
    "data",
    "ema",
    "sample_grid",
    "frechet",
    "evaluation",
    "likelihood",
    "checkpoints",
)
"""The sections of a configuration that a checkpoint carries."""
PREVIOUS = "previous"
INTERRUPTED = "interrupted"
PART = ".part"
DAMAGED = ".damaged"
_TAG = b"sha256="
_DIGEST_LENGTH = 2 * hashlib.sha256().digest_size
_COMMENT_LENGTH = struct.pack("<H", len(_TAG) + _DIGEST_LENGTH)
_ZIP, _ZIP_END, _ZIP_END_LENGTH = b"PK\x03\x04", b"PK\x05\x06", 22
_NO_COMMENT = struct.pack("<H", 0)
Module = TypeVar("Module", bound=L.LightningModule)


def last_checkpoint(run_dir: Path | str) -> Path:
    """Where a run keeps its newest checkpoint."""
    return Path(run_dir) / FOLDER / f"{LAST}.ckpt"


def newest_checkpoint(run_dir: Path | str) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint of a run: last.ckpt; where that is damaged or missing, previous.ckpt.

    Where both are damaged it is the newest of all others. Warns of every damaged one that it passes over.

    Returns:
        Its path and content; None if the run has no checkpoint.

    Raises:
        ValueError: If there are checkpoints, and all of them are damaged.
    """
    folder = Path(run_dir) / FOLDER
    damaged: list[str] = []

    def whole(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in paths:
            try:
                yield path, read_checkpoint(path)
            except FileNotFoundError:
                continue
            except ValueError as error:
                damaged.append(str(error))

    first = [folder / f"{name}.ckpt" for name in (LAST, PREVIOUS)]
    newest = next(whole(first), None)
    if newest is None and damaged:
        # Not where there is neither: a best.ckpt alone is not from between two steps, and the run starts anew.
        passed = {*first, folder / f"{INTERRUPTED}.ckpt"}
        others = whole(sorted(set(folder.glob("*.ckpt")) - passed))
        newest = max(others, key=lambda found: int(found[1].get("global_step", 0)), default=None)
    if damaged and newest is None:
        raise ValueError(
            f"no checkpoint in {folder} is whole: {damaged[0]}; move them away, or choose another directory with "
            "--trainer.default_root_dir"
        )
    if newest is None:
        return None
    for problem in damaged:
        warnings.warn(f"{problem}; continuing from {newest[0]} instead", DamagedCheckpointWarning, stacklevel=2)
    return newest


class DamagedCheckpointWarning(UserWarning):
    """Names a checkpoint that was passed over because it is damaged."""


def has_run(run_dir: Path | str) -> bool:
    """Whether a directory holds a run that could go on."""
    return any((Path(run_dir) / FOLDER / f"{name}.ckpt").is_file() for name in (LAST, PREVIOUS, INTERRUPTED))


def run_of(checkpoint: Path | str) -> Path:
    """The run directory that a checkpoint lies in; its own directory where it was moved out of one."""
    folder = Path(checkpoint).resolve().parent
    return folder.parent if folder.name == FOLDER else folder


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Opens a checkpoint without executing anything in it; tensors stay on disk until they are used.

    A checkpoint that `WholeFiles` wrote carries a hash of its content, which must agree; others need none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds more than tensors and plain data.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"ckpt_path={path}: there is no such file")
    if not seal_holds(path):
        raise ValueError(f"{path} is damaged: its content is not what was written (SHA-256 differs)")
    try:
        checkpoint = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is damaged, or no checkpoint of tensors and plain data ({reason})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint: it has no state_dict")
    return checkpoint


def restore(path: str, base: type[Module]) -> Module:
    """A model from a checkpoint alone, with the weights that a reader of it wants.

    Args:
        path: A checkpoint that `fit` wrote.
        base: What the model must be.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, carries no configuration or is of something else.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint.get("config", {}).get("model")
    if config is None:
        raise ValueError(f"{path} carries no configuration of its model: it was not written by the command line")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "model")
    try:
        made = parser.instantiate_classes(parser.parse_object({"model": config}))
    except ArgumentError as error:
        if "does not correspond to a subclass" in str(error):
            raise ValueError(
                f"{path} is of {config.get('class_path')}, no {base.__name__}; give the checkpoint of a {base.__name__}"
            ) from error
        raise ValueError(
            f"{path} is of {config.get('class_path')}, no {base.__name__} that can be made: {error}"
        ) from error
    model: Module = made.model
    model.load_state_dict(checkpoint["state_dict"])
    return model


class Hashing:
    """Passes bytes on to a file and hashes them on the way.

    Args:
        file: Where they go.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except OSError as error:
            # On its way through torch's writer this becomes some RuntimeError.
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def seal(file: BinaryIO, digest: str) -> None:
    """Puts the hash of a zip archive, which is what torch writes, into the comment at its end; it stays one file.

    Args:
        file: Open at the archive's end, where two bytes say that there is no comment.
        digest: SHA-256 over the archive without a comment, hexadecimal.
    """
    file.seek(-len(_NO_COMMENT), os.SEEK_END)
    file.write(_COMMENT_LENGTH + _TAG + digest.encode())


def seal_holds(path: Path | str) -> bool:
    """Whether a file's content is what its seal says; one that was written without is not judged."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        length = len(_COMMENT_LENGTH) + len(_TAG) + _DIGEST_LENGTH
        file.seek(max(size - length, 0))
        found = file.read()
        mark = _COMMENT_LENGTH + _TAG
        if not found.startswith(mark):
            file.seek(0)
            end = found[-_ZIP_END_LENGTH:]
            return file.read(len(_ZIP)) != _ZIP or (end.startswith(_ZIP_END) and end.endswith(_NO_COMMENT))
        digest = hashlib.sha256()
        file.seek(0)
        left = size - length
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        digest.update(_NO_COMMENT)
        return found.removeprefix(mark) == digest.hexdigest().encode()


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder outlive a power failure, where its file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it, so that a file is there whole or not at all.

    The file is synced to disk and sealed with its hash. A last.ckpt that was there becomes previous.ckpt, so that at
    every moment one of the two is there.
    """

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}{PART}")
        try:
            with part.open("w+b") as file:
                hashing = Hashing(file)
                try:
                    torch.save(dict(checkpoint), hashing)  # type: ignore[arg-type]
                except RuntimeError as error:
                    if hashing.error is not None:
                        raise hashing.error from None
                    if isinstance(error.__context__, KeyboardInterrupt):
                        # The writer, broken off, complains of an end that is too early.
                        raise error.__context__ from None
                    raise
                seal(file, hashing.digest.hexdigest())
                file.flush()
                os.fsync(file.fileno())
            if target.stem == LAST:
                keep_as_previous(target)
            os.replace(part, target)
            sync_folder(target.parent)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def keep_as_previous(last: Path) -> None:
    """Gives last.ckpt the further name previous.ckpt, in place of an older one."""
    if not last.is_file():
        return
    previous = last.with_stem(PREVIOUS)
    link = previous.with_name(f"{previous.name}.{os.getpid()}{PART}")
    try:
        link.unlink(missing_ok=True)
        os.link(last, link)
        os.replace(link, previous)
    except OSError:
        # A file system without hard links: for a moment there is a previous.ckpt alone.
        os.replace(last, previous)
    finally:
        link.unlink(missing_ok=True)


def tidy(run_dir: Path | str, continued: Path | None) -> None:
    """Removes what killed processes left half written, and sets a last.ckpt that was passed over aside.

    Else the next writing would put a damaged one in the place of a previous.ckpt that is whole.

    Args:
        run_dir: The run's directory.
        continued: What `newest_checkpoint` found; None: nothing was looked for.
    """
    last = last_checkpoint(run_dir)
    for part in last.parent.glob(f"*{PART}"):
        part.unlink(missing_ok=True)
    if continued is not None and continued != last and last.is_file():
        os.replace(last, last.with_name(last.name + DAMAGED))
        sync_folder(last.parent)


def save(trainer: L.Trainer, path: Path | str, weights_only: bool | None = False) -> str | None:
    """Writes a checkpoint; collective.

    Returns:
        On every process, why the first could not write it; None if it could.
    """
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only)
    problem: str | None = None
    try:
        trainer.strategy.save_checkpoint(checkpoint, path)
    except OSError as error:
        problem = f"{path} could not be written ({error.strerror or error})"
    answer: str | None = trainer.strategy.broadcast(problem)
    return answer


def _steps_and_batches(trainer: L.Trainer) -> tuple[int, int]:
    """How many steps Lightning has finished, with their validation, and how many batches it has begun."""
    loop: Any = trainer.fit_loop.epoch_loop
    return loop._batches_that_stepped, loop.batch_progress.total.started


class Checkpoints(Checkpoint):
    """Keeps <run>/checkpoints/last.ckpt, also when training ends, is interrupted or fails; and snapshots if asked.

    A checkpoint is written between two steps, when all that belongs to a step is done: its scores, its samples, its
    validation. A run that goes on therefore neither repeats nor misses any of it. The last.ckpt before stays as
    previous.ckpt. Where a file cannot be written a warning says so, and training goes on. After SIGTERM, SIGUSR1 or
    Ctrl-C the run stops with the step that it is at.

    Args:
        every_n_steps: Optimiser steps between two writings of last.ckpt.
        keep_every_n_steps: Optimiser steps between snapshots, step_<n>.ckpt; null: none.
        keep_at_most: How many snapshots to keep; the oldest are removed. null: all.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(
        self, every_n_steps: int = 5000, keep_every_n_steps: int | None = None, keep_at_most: int | None = None
    ) -> None:
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("keep_every_n_steps", keep_every_n_steps),
            ("keep_at_most", keep_at_most),
        ):
            if value is not None and value < 1:
                raise ValueError(f"checkpoints.{name}={value} must be at least 1")
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.keep_at_most = keep_at_most
        self._training = False
        self._saved_at: int | None = None
        self._step = 0
        self._begun: int | None = None
        self._finished = self._started = 0
        self._ending = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = True
        self._step = trainer.global_step
        self._begun, self._ending = None, False
        _, self._started = _steps_and_batches(trainer)
        last = last_checkpoint(trainer.default_root_dir)
        there = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == last.resolve()
        self._saved_at = trainer.global_step if trainer.strategy.broadcast(there) else None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sees that the curves up to here are on disk first, and notes how much of them is of this checkpoint."""
        curves = curves_of(trainer)
        if curves is not None:
            curves.save()
            checkpoint["curves"] = curves.num_rows

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self._ending = False
        self._finished, started = _steps_and_batches(trainer)
        if trainer.global_step == self._step:
            return
        self._step, self._started = trainer.global_step, started
        if self._step % self.every_n_steps == 0:
            self._save_last(trainer)
        self._snapshot(trainer)
        reason = asked_to_stop(trainer)
        if reason is not None:
            if self._saved_at != self._step:
                self._save_last(trainer)
            stop(trainer, reason)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self._begun = trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ending = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises OSError if what training has come to cannot be kept."""
        # All others' business is done: this callback is the last.
        self._ending = False
        problem = None if self._saved_at == trainer.global_step else self._save_last(trainer)
        self._snapshot(trainer)
        self._training = False
        if problem is not None:
            raise OSError(f"{problem}: training has ended, and nothing after the last whole checkpoint is kept")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes last.ckpt, but not over a good one where a run fails before it has started; waits for no process,
        because the others may never come. A step that was broken off half-way is not kept.

        Where it is the business after a step that was broken off, such as a score, last.ckpt stays what it was, for a
        run that went on from here would miss it; interrupted.ckpt is for those who would rather.
        """
        new = trainer.global_step > 0 and self._saved_at != trainer.global_step
        if self._training and new and self._whole(trainer, pl_module, exception):
            path = last_checkpoint(trainer.default_root_dir)
            if not self._between_steps(trainer):
                again = "goes on from before" if path.is_file() else "begins anew"
                path = path.with_name(f"{INTERRUPTED}.ckpt")
                rank_zero_info(
                    f"step {trainer.global_step:,} was broken off before all that belongs to it, such as scores. "
                    f"`--ckpt_path last` {again} and does it all; `--ckpt_path {path}` goes on from here, without"
                )
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            try:
                trainer.strategy.save_checkpoint(checkpoint, path)
            except OSError as error:
                warnings.warn(f"{path.name} could not be written: {error}", stacklevel=2)
        self._training = False

    def _whole(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> bool:
        """Whether weights, averages and counters are of one step: the last that was done."""
        if trainer.global_step == self._begun:
            # That the weights move no more is why this one is raised.
            return isinstance(exception, NonFiniteGradients)
        if trainer.global_step > self._step:
            return True
        # Running means move with every batch, long before the weights.
        running = any(isinstance(part, _BatchNorm) for part in module.modules())
        return not running or _steps_and_batches(trainer)[1] == self._started

    def _between_steps(self, trainer: L.Trainer) -> bool:
        """Whether all that belongs to the last step is done: scores, samples, validation; at the end, the last ones."""
        if self._ending:
            return False
        return trainer.global_step == self._step or _steps_and_batches(trainer)[0] > self._finished

    def _save_last(self, trainer: L.Trainer) -> str | None:
        problem = save(trainer, last_checkpoint(trainer.default_root_dir))
        if problem is None:
            self._saved_at = trainer.global_step
            if trainer.is_global_zero:
                # Older than this one.
                with contextlib.suppress(OSError):
                    last_checkpoint(trainer.default_root_dir).with_name(f"{INTERRUPTED}.ckpt").unlink(missing_ok=True)
        else:
            rank_zero_warn(f"{problem}; training goes on")
        return problem

    def _snapshot(self, trainer: L.Trainer) -> None:
        step, keep = trainer.global_step, self.keep_every_n_steps
        if keep is None or step == 0 or step % keep:
            return
        path = last_checkpoint(trainer.default_root_dir).with_name(f"step_{step:08d}.ckpt")
        problem = save(trainer, path)
        if problem is not None:
            rank_zero_warn(f"{problem}; training goes on")
        elif self.keep_at_most is not None and trainer.is_global_zero:
            for old in sorted(path.parent.glob("step_" + 8 * "[0-9]" + ".ckpt"))[: -self.keep_at_most]:
                old.unlink(missing_ok=True)
