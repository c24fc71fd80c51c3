"""Keeps two programs from writing to one place at once."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info


@contextmanager
def locked(path: Path, activity: str, patience: float = float("inf"), remove: bool = False) -> Iterator[None]:
    """Holds a lock for as long as the context is active; the death of the process frees it.

    The lock works between the machines of a network file system that supports POSIX locks; where a file system has no
    locks, there is none.

    Args:
        path: The lock file.
        activity: What another holder does, for messages.
        patience: Seconds to wait for another holder.
        remove: Whether the file is removed in the end.

    Raises:
        ValueError: If another process holds the lock for longer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+") as file:
            _acquire(file.fileno(), path, activity, patience)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # The former holder has removed the file that was locked.
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
            # Closing the file frees a POSIX lock, and a forked child does not inherit it.
            try:
                yield
            finally:
                if remove:
                    path.unlink(missing_ok=True)
            return


def _acquire(descriptor: int, path: Path, activity: str, patience: float) -> None:
    end = time.monotonic() + patience
    told = False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
        holder = path.read_text().strip() or "another process"
        if time.monotonic() >= end:
            raise ValueError(f"{path.parent}: {holder} {activity} there at this moment; wait for it, or stop it")
        if not told:
            rank_zero_info(f"{path.parent}: waiting for {holder}, which {activity} there")
            told = True
        time.sleep(0.2)
