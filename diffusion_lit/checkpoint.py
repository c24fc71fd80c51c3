"""Checkpoint files: where a run keeps them, how they are written and read, and models made from them."""

import contextlib
import os
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn

from diffusion_lit.configuration import build
from diffusion_lit.upgrade import FORMAT, upgrade

FOLDER = "checkpoints"
LAST = "last"
PREVIOUS = "previous"
PART = ".part"
DAMAGED = ".damaged"
AVERAGED = "averaged"
RAW = "raw"
SNAPSHOTS = "step_" + 8 * "[0-9]" + ".ckpt"
Model = TypeVar("Model", bound=nn.Module)
_KINDS: dict[str, Any] = {
    "config": dict,
    "global_step": int,
    "class_names": list | tuple,
    **dict.fromkeys(("callbacks", "loops", "averages", "codec"), dict),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
}
"""What entries of a checkpoint are, where they are not None."""


class DamagedCheckpointWarning(UserWarning):
    """Names a checkpoint that was passed over because it is damaged."""


def last_checkpoint(run_dir: Path | str) -> Path:
    """The file of a run's newest checkpoint."""
    return Path(run_dir) / FOLDER / f"{LAST}.ckpt"


def snapshots(run_dir: Path | str) -> list[Path]:
    """The snapshots of a run, step_<n>.ckpt, oldest first."""
    return sorted((Path(run_dir) / FOLDER).glob(SNAPSHOTS))


def has_run(run_dir: Path | str) -> bool:
    """Whether a directory holds a run that can be continued."""
    return any((Path(run_dir) / FOLDER / f"{name}.ckpt").is_file() for name in (LAST, PREVIOUS))


def run_of(checkpoint: Path | str) -> Path:
    """The run directory that a checkpoint belongs to; its own directory if it was moved out of a run."""
    folder = Path(checkpoint).resolve().parent
    return folder.parent if folder.name == FOLDER else folder


def newest_checkpoint(run_dir: Path | str) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run: last.ckpt, else previous.ckpt, else the newest of all others.

    Warns of every damaged checkpoint that it passes over. Others than last.ckpt and previous.ckpt count only where one
    of these is damaged: a best.ckpt alone does not make a run.

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
        others = whole(sorted(set(folder.glob("*.ckpt")) - {*first}))
        newest = max(others, key=lambda found: int(found[1].get("global_step", 0)), default=None)
    if newest is None and damaged:
        raise ValueError(
            f"no checkpoint in {folder} is whole: {damaged[0]}; move them away, or choose another directory with "
            "--trainer.default_root_dir"
        )
    for problem in damaged:
        warnings.warn(f"{problem}; continuing from {newest and newest[0]}", DamagedCheckpointWarning, stacklevel=2)
    return newest


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Reads a checkpoint without executing anything in it; tensors stay on disk until they are used.

    The checksums of the archive are verified, so that a torn file and a flipped bit are found; those of a file that has
    not changed since it was last read are not verified again. Checkpoints of version 0.1.0 are translated.

    Returns:
        The content, with tensors of its own at every call: training works on those of the optimiser in place.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds more than tensors and plain data.
    """
    path = Path(path)
    if not os.path.isfile(path):  # False for a name that is too long, where Path.is_file raises
        raise FileNotFoundError(f"ckpt_path={path}: there is no such file")
    status = path.stat()
    key = (str(path.resolve()), status.st_mtime_ns, status.st_size, status.st_ino)
    if _verified.get("newest") != key:
        _verify(path)
    checkpoint = _read(path)
    _verified["newest"] = key
    return checkpoint


_verified: dict[str, Any] = {}


def _verify(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # Damaged bytes raise nearly anything.
        raise ValueError(f"{path} is damaged, or no checkpoint ({_first_line(error)})") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} in it does not agree")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, or no checkpoint of tensors and plain data ({_first_line(error)})"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint: it has no state_dict")
    _require_kinds(checkpoint, path)
    return checkpoint if checkpoint.get("format") == FORMAT else upgrade(checkpoint)


def _require_kinds(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError if an entry of a checkpoint is not of its kind."""
    for name, kind in _KINDS.items():
        value = checkpoint.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{path} is damaged, or no checkpoint: its {name} is {type(value).__name__}")
    sets = {"state_dict": checkpoint["state_dict"]}
    if "averages" in checkpoint:
        averages = checkpoint["averages"] or {}
        own = averages.get("averages")
        if not isinstance(own, dict) or not isinstance(averages.get("decays", ()), list | tuple):
            raise ValueError(f"{path} is damaged, or no checkpoint: its averages have no names")
        sets |= {"current_model_state": checkpoint.get("current_model_state"), **own}
    for name, state in sets.items():
        tensors = isinstance(state, dict) and all(isinstance(n, str) for n in state)
        if not tensors or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{path} is damaged, or no checkpoint: its {name} does not hold tensors by name")
    if not all(isinstance(name, str) for name in checkpoint.get("class_names") or ()):
        raise ValueError(f"{path} is damaged, or no checkpoint: its class_names are not texts")


def choose_weights(checkpoint: Mapping[str, Any], weights: str = AVERAGED) -> dict[str, Tensor]:
    """One set of the weights that a checkpoint holds, as a state dict.

    Args:
        checkpoint: From `read_checkpoint`.
        weights: "averaged", "raw", or the decay of an average.

    Raises:
        ValueError: If the checkpoint does not hold these weights.
    """
    choices: dict[str, Mapping[str, Tensor]] = {AVERAGED: {}, checkpoint.get("weights", RAW): {}}
    if "averages" in checkpoint:
        choices |= {RAW: checkpoint["current_model_state"], **checkpoint["averages"]["averages"]}
    if weights not in choices:
        raise ValueError(f"weights={weights!r} are not in the checkpoint; it has {sorted(choices)}")
    return {**checkpoint["state_dict"], **choices[weights]}


def load_model(
    path: Path | str,
    base: type[Model] = nn.Module,  # type: ignore[assignment]
    weights: str = AVERAGED,
    trust: Collection[str] = (),
) -> Model:
    """A model in evaluation mode, made from a checkpoint alone.

    Args:
        path: A checkpoint that `fit` or `import` wrote.
        base: What the model must be, a subclass of `System`.
        weights: "averaged", "raw", or the decay of an average.
        trust: Modules or classes outside of this package that the configuration in the file may name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, carries no configuration, is of something else, lacks the weights, or names
            something that is not trusted.
    """
    checkpoint = read_checkpoint(path)
    config = (checkpoint.get("config") or {}).get("model")
    if config is None:
        raise ValueError(
            f"{path} carries no configuration of its model; make the model in Python and give it the weights by "
            "model.load(read_checkpoint(path))"
        )
    file = Path(path).resolve()
    if file in _loading:
        raise ValueError(f"{path} names itself, through its own configuration")
    _loading.append(file)
    try:
        model = build(config, base, trust, source=str(path))
    finally:
        _loading.remove(file)
    load: Any = model
    load.load(checkpoint, weights, path)
    return model.eval()


_loading: list[Path] = []
"""The files whose models are being made: a model may need another one, such as a classifier that guides it."""


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it, so that the file is whole or absent at every moment.

    The file is synced to disk. An existing last.ckpt becomes previous.ckpt, so that one of the two is always there.
    """

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}{PART}")
        try:
            with part.open("wb") as file:
                _save({**checkpoint, "format": FORMAT}, file)
                file.flush()
                os.fsync(file.fileno())
            if target.stem == LAST:
                _keep_as_previous(target)
            os.replace(part, target)
            _sync_folder(target.parent)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See `read_checkpoint`."""
        return read_checkpoint(path)


class _Writer:
    """A file for torch.save, whose writer turns an OSError into some RuntimeError: the cause is kept here."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self.file.write(data))
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(checkpoint: dict[str, Any], file: Any) -> None:
    writer = _Writer(file)
    try:
        torch.save(checkpoint, writer)  # type: ignore[arg-type]
    except RuntimeError as error:
        interrupted = error.__context__ if isinstance(error.__context__, KeyboardInterrupt) else None
        cause = writer.error or interrupted
        if cause is not None:
            raise cause from None
        raise


def _keep_as_previous(last: Path) -> None:
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
        # A file system without hard links: for a moment there is only a previous.ckpt.
        os.replace(last, previous)
    finally:
        link.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power failure, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def tidy(run_dir: Path | str, continued: Path | None) -> None:
    """Removes what killed processes left half written, and sets a damaged last.ckpt aside.

    Otherwise the next write would replace a whole previous.ckpt with the damaged last.ckpt.

    Args:
        run_dir: The run's directory.
        continued: What `newest_checkpoint` found; None if the run starts.
    """
    last = last_checkpoint(run_dir)
    for part in last.parent.glob(f"*{PART}"):
        part.unlink(missing_ok=True)
    if continued is not None and continued != last and last.is_file():
        os.replace(last, last.with_name(last.name + DAMAGED))
        _sync_folder(last.parent)
