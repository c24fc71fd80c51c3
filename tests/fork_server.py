"""A process that has imported everything, has started no thread, and forks children on request.

A child of a process that has threads, as autograd and OpenMP start them, cannot train: the threads do not exist in the
child, which fails or waits for them forever. pytest's own process may have any; this one only imports.
"""

import os
import pickle
import signal
import sys
import traceback
import warnings
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import walk_packages
from typing import NamedTuple

CRASHED = 99


class Call(NamedTuple):
    """What a child is to do.

    Args:
        function: A function without arguments, pickled by cloudpickle.
        output: The file to which the child appends its standard output and error.
        folder: Its working directory.
        environment: All its environment variables.
    """

    function: bytes
    output: str
    folder: str
    environment: dict[str, str]


def serve(connection: Connection) -> None:
    """Answers requests until the other end closes, then kills the process groups of all children that still run.

    A `Call` is answered with the id of the process that carries it out; the id of a child with its exit code, with the
    negative number of the signal that killed it, or with None while it runs.
    """
    _import_everything()
    running: set[int] = set()
    try:
        while True:
            request = connection.recv()
            if isinstance(request, Call):
                child = os.fork()
                if not child:
                    connection.close()
                    _carry_out(request)
                running.add(child)
                connection.send(child)
            else:
                ended, status = os.waitpid(request, os.WNOHANG)
                running.discard(ended)
                connection.send(os.waitstatus_to_exitcode(status) if ended else None)
    except EOFError:
        for child in running:
            os.killpg(child, signal.SIGKILL)


def _import_everything() -> None:
    """Imports what children need.

    Raises:
        RuntimeError: If an import has started a thread.
    """
    package = import_module("diffusion_lit")
    for module in walk_packages(package.__path__, "diffusion_lit."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    for name in ("pytest", "tests.tiny", "wandb"):
        import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"imports have started {threads - 1} threads: children that are forked now may hang")


def _carry_out(call: Call) -> None:
    """Carries out a call in a process that leads a group of its own; does not return."""
    code = CRASHED
    try:
        os.setsid()
        file = os.open(call.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.clear()
        os.environ.update(call.environment)
        os.chdir(call.folder)
        warnings.simplefilter("default")
        pickle.loads(call.function)()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    # Under its own name, by which requests are pickled.
    import_module("tests.fork_server").serve(Connection(int(sys.argv[1])))
