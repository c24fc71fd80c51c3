"""The command line in a process of its own that is forked from this one, so that its start costs no imports."""

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_lit.callbacks.checkpoints import Hashing

CRASHED = 99
SECONDS = 120


def fork(run: Callable[[], object], output: Path) -> int:
    """Starts a process that leads a group of its own and calls `run`; what it says is appended to a file.

    Returns:
        Its id. It exits with the code that `run` asks for, or `CRASHED` where that raises.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        warnings.simplefilter("default")
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_two(run: Callable[[], object]) -> None:
    """Calls `run` in this process and in a further one, as torchrun would have started them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    other = os.fork()
    rank = "0" if other else "1"
    os.environ.update(place, RANK=rank, LOCAL_RANK=rank, GROUP_RANK="0", TORCHELASTIC_RUN_ID="here")
    try:
        run()
    finally:
        # Whoever leads the group outlives the others, so that what these have to say is heard.
        end = time.monotonic() + SECONDS / 2
        status: int | None = None
        while other and status is None and time.monotonic() < end:
            ended, code = os.waitpid(other, os.WNOHANG)
            status = code if ended else None
            time.sleep(0.005)
    if status:
        raise RuntimeError("the other process failed")


def wait(child: int, seconds: float = SECONDS) -> int:
    """Waits for a process and sees that nothing of its group is left.

    Returns:
        Its exit code, or the negative number of the signal that killed it.

    Raises:
        TimeoutError: If it does not end; it is killed then.
    """
    end = time.monotonic() + seconds
    ended = 0
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.005)
    kill_group(child)
    if not ended:
        os.waitpid(child, 0)
        raise TimeoutError(f"the process did not end within {seconds} s")
    return os.waitstatus_to_exitcode(status)


def kill_group(child: int) -> None:
    """Kills a process and all that it has started."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


class FileOperations:
    """Counts what this process does to files below a folder, and at one operation kills its group.

    Operations are opening, renaming, linking, truncating and removing a file, and each of the writes that make a
    checkpoint. It cannot be undone: for a process that is forked for it.

    Args:
        folder: Where.
        at: The operation before which the process is killed; None: none is.
    """

    KINDS = ("open", "os.rename", "os.link", "os.truncate", "os.remove", "os.mkdir")

    def __init__(self, folder: Path, at: int | None = None) -> None:
        self.folder = str(folder)
        self.at = at
        self.count = 0
        write = Hashing.write

        def counted(hashing: Hashing, data: Any) -> int:
            self._count()
            return write(hashing, data)

        Hashing.write = counted  # type: ignore[method-assign, assignment]
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.KINDS and str(arguments[0]).startswith(self.folder):
            self._count()

    def _count(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.killpg(0, signal.SIGKILL)
