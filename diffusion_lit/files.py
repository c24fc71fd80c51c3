"""Files that appear whole or not at all."""

import fcntl
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file beside `path`, renamed to `path` at the end or removed at an error.

    A reader therefore finds the whole file or none, and of several writers the last one wins. What a killed process
    left behind is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    while True:
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        with part.open("w+b") as file:
            try:
                with suppress(OSError):  # Without locks on this file system, nobody removes the file.
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink == 0:
                    continue  # Removed by another process before it was locked.
                yield file
                file.flush()
                part.replace(path)
                return
            finally:
                part.unlink(missing_ok=True)


def default_cache_dir() -> Path:
    """$DIFFUSION_LIT_CACHE, or ~/.cache/diffusion_lit."""
    return Path(os.environ.get("DIFFUSION_LIT_CACHE") or "~/.cache/diffusion_lit").expanduser()


def keep(paths: Iterable[Path], write: Callable[[BinaryIO], object]) -> None:
    """Writes the first of some files that can be written; none is no error."""
    for path in paths:
        with suppress(OSError):
            with whole_file(path) as file:
                write(file)
            return


def remove_abandoned(path: Path) -> None:
    """Removes the unfinished files of `whole_file(path)` whose process was killed; a living one holds a lock."""
    if not path.parent.is_dir():
        return
    for part in path.parent.iterdir():
        if part.name.startswith(f".{path.name}.") and part.name.endswith(".part"):
            with suppress(OSError), part.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


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
