"""Functions that run in a process of their own, which costs no imports: it is forked from a server."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.fork_server import Call

SECONDS = 120
REPOSITORY = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
"""Of the server; a child gets that of the test that starts it."""


class Server:
    """The fork server of this process; it ends with it at the latest."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.fork_server", str(theirs.fileno())],
            env=ENVIRONMENT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            # Ctrl-C in a terminal is for pytest alone.
            start_new_session=True,
        )
        theirs.close()

    def ask(self, request: Call | int) -> Any:
        """Sends a request and returns the answer.

        Raises:
            RuntimeError: If the server has ended; with its output.
        """
        try:
            self.connection.send(request)
            return self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.wait()
            self.output.seek(0)
            raise RuntimeError(f"the fork server has ended:\n{self.output.read().decode()}") from error

    def close(self) -> None:
        """Ends the server, which kills the children that still run."""
        self.connection.close()
        self.process.wait()
        self.output.close()


@cache
def server() -> Server:
    """The fork server, which the first call starts; that takes seconds."""
    return Server()


def end_server() -> None:
    """Ends the fork server, if there is one."""
    if server.cache_info().currsize:
        server().close()
        server.cache_clear()


def fork(run: Callable[[], object], output: Path) -> int:
    """Calls a function in a process that leads a group of its own, with this process's environment and directory.

    Args:
        run: A function, also a lambda or a local one; it gets a copy of everything that it refers to.
        output: The file to which its standard output and error are appended.

    Returns:
        Its id. It exits with the code that `run` exits with, or `CRASHED` where that raises.
    """
    child: int = server().ask(Call(cloudpickle.dumps(run), str(output), os.getcwd(), dict(os.environ)))
    return child


def in_two(run: Callable[[], object], patience: float = SECONDS / 2) -> None:
    """Calls a function in this process and in a further one, with the environment that torchrun gives to two processes.

    For a process that `fork` has started. This one is rank 0 and serves the store through which both find each other.

    Args:
        run: What both call.
        patience: Seconds that the further process is given once this one has ended.

    Raises:
        RuntimeError: In this process, if `run` fails in the other.
    """
    here, there = Pipe(duplex=False)
    other = os.fork()
    store: TCPStore | None = None
    if other:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        there.send(store.port)
    port = store.port if store is not None else here.recv()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GROUP_RANK": "0"}
    rank = "0" if other else "1"
    os.environ.update(
        place, RANK=rank, LOCAL_RANK=rank, TORCHELASTIC_RUN_ID="here", TORCHELASTIC_USE_AGENT_STORE="True"
    )
    try:
        run()
    finally:
        # The leader of the group ends last: what is left of the group then is killed.
        end = time.monotonic() + patience
        status: int | None = None
        while other and status is None and time.monotonic() < end:
            ended, code = os.waitpid(other, os.WNOHANG)
            status = code if ended else None
            time.sleep(0.005)
    if status:
        raise RuntimeError("the other process failed")


def wait(child: int, seconds: float = SECONDS) -> int:
    """Waits for a process to end and kills what is left of its group.

    Returns:
        Its exit code, or the negative number of the signal that killed it.

    Raises:
        TimeoutError: If it does not end in time; it is killed then.
    """
    end = time.monotonic() + seconds
    code: int | None = None
    while code is None and time.monotonic() < end:
        time.sleep(0.005)
        code = server().ask(child)
    kill_group(child)
    if code is not None:
        return code
    while server().ask(child) is None:
        time.sleep(0.005)
    raise TimeoutError(f"the process did not end within {seconds} s")


def kill_group(child: int) -> None:
    """Kills a process and all that it has started."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


class FileOperations:
    """Counts what this process does to files in a folder, and kills its process group before one of these operations.

    Operations are opening, renaming, linking, truncating and removing a file, making a folder, and each write of
    `torch.save` into an open file. It cannot be undone: for a process that `fork` has started.

    Args:
        folder: The folder, with all that is below it.
        at: The number of the operation before which the group is killed, from 1; None: none is.
    """

    KINDS = ("open", "os.rename", "os.link", "os.truncate", "os.remove", "os.mkdir")

    def __init__(self, folder: Path, at: int | None = None) -> None:
        self.folder = str(folder)
        self.at = at
        self.count = 0
        save = torch.save

        def counted(content: object, file: Any, *args: Any, **kwargs: Any) -> None:
            save(content, CountedFile(file, self._count) if hasattr(file, "write") else file, *args, **kwargs)

        torch.save = counted  # type: ignore[assignment]
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.KINDS and str(arguments[0]).startswith(self.folder):
            self._count()

    def _count(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.killpg(0, signal.SIGKILL)


class CountedFile:
    """An open file whose writes are counted.

    Args:
        file: Where they go.
        count: Called before each of them.
    """

    def __init__(self, file: Any, count: Callable[[], None]) -> None:
        self.file = file
        self.count = count

    def write(self, data: Any) -> int:
        self.count()
        written: int = self.file.write(data)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
