"""The program: its commands, its help, and how it ends. What a command needs is imported when it runs."""

import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import Any, TextIO, cast

from diffusion_lit.errors import fail, report

COMMANDS: dict[str, str] = {
    "fit": "train a model",
    "validate": "compute the loss over the validation images",
    "test": "compute the loss over the test images, scores and likelihood",
    "predict": "generate images",
    "table": "fill a table of scores; the same as test --evaluation.table",
}
TOOLS: dict[str, tuple[str, str]] = {
    "import": ("diffusion_lit.tools.import_weights", "make a checkpoint from published weights"),
    "export": ("diffusion_lit.tools.export_weights", "write a checkpoint's weights in another form"),
    "prepare": ("diffusion_lit.tools.prepare", "store the images of a recipe at their size in one file"),
    "plot": ("diffusion_lit.tools.plot", "draw the curves of runs"),
    "completion": ("diffusion_lit.completion", "print a script that completes commands and options in bash"),
    "reference": ("diffusion_lit.tools.reference", "compute the statistics of real images that scores compare with"),
}
"""Commands that need no Trainer: the module whose `main` takes the words after the name."""
ADDRESS_SPACE = 4 * 10**9
"""Bytes of virtual memory that the imports need; most of it is never used."""
HELP = """usage: diffusion_lit COMMAND [-c RECIPE] [--ckpt_path CHECKPOINT] [--key value ...]

Trains diffusion models, samples from them and scores them.

commands:
{commands}

examples:
  diffusion_lit fit -c cifar10
  diffusion_lit fit -c cifar10 --ckpt_path last
  diffusion_lit predict --ckpt_path runs/cifar10/checkpoints/last.ckpt --num_images 64
  diffusion_lit test --ckpt_path runs/cifar10/checkpoints/last.ckpt --model.sampler DPMSolver

A recipe is a YAML file, or the name of one that comes with the package. More: diffusion_lit COMMAND --help [KEY]
"""


def help_text() -> str:
    """The help of the program as a whole."""
    lines = {**COMMANDS, **{name: text for name, (_, text) in TOOLS.items()}}
    return HELP.format(commands="\n".join(f"  {name:<11}{text}" for name, text in lines.items()))


class Unbreakable:
    """A stream that drops what is written to it once the other end is gone, so that training outlives its terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            return


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; what a user got wrong ends in one line and exit code 2.

    A run that is stopped by SIGTERM or SIGUSR1 ends in one line and exit code 75: it can continue.

    Set DIFFUSION_LIT_TRACEBACK=1 to see the traceback instead.
    """
    words = sys.argv[1:] if args is None else list(args)
    _open_streams()
    stderr = sys.stderr
    # Progress that nobody reads any more ends no work.
    sys.stderr = cast(TextIO, Unbreakable(stderr))
    try:
        _run([_expanded(word) for word in words])
    except BrokenPipeError as error:
        if not _reader_is_gone():
            report(error)
    except Exception as error:
        report(error)
    finally:
        _flush()
        sys.stderr = stderr


def _run(words: list[str]) -> None:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            name = word.encode(errors="backslashreplace").decode()
            fail(f"{name} is not UTF-8, as configurations are; rename it, or give a link to it")
    name = words[0] if words else ""
    if name in ("", "-h", "--help", "help"):
        (sys.stdout if name else sys.stderr).write(help_text())
        if not name:
            raise SystemExit(2)
    elif name in TOOLS:
        require_address_space()
        import_module(TOOLS[name][0]).main(words[1:])
    else:
        require_address_space()
        _import_torchmetrics()
        import_module("diffusion_lit.cli").run(words)


def require_address_space() -> None:
    """Ends the program in one line if this process may not have the virtual memory that PyTorch's libraries need."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE:
        fail(
            f"the address space of this process is limited to {limit / 1e9:.1f} GB, and PyTorch needs at least "
            f"{ADDRESS_SPACE / 1e9:.0f} GB of it; raise the limit with `ulimit -v unlimited`, or that of the job"
        )


def _import_torchmetrics() -> None:
    """Imports torchmetrics, as Lightning does, without scipy.signal, which takes half a second and is not used."""
    name = "scipy.signal"
    if name in sys.modules or "torchmetrics" in sys.modules:
        return
    sys.modules[name] = stub = ModuleType(name)
    stub.hamming = None  # type: ignore[attr-defined]
    try:
        import_module("torchmetrics")
    finally:
        if sys.modules.get(name) is stub:
            del sys.modules[name]


def _expanded(word: str) -> str:
    key, equals, value = word.partition("=")
    if word.startswith("-") and equals and value.startswith("~"):
        return f"{key}={os.path.expanduser(value)}"
    return os.path.expanduser(word) if word.startswith("~") else word


def _open_streams() -> None:
    """Gives the program streams where it was started without."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _flush() -> None:
    """Writes out what was printed; if its reader is gone, drops it, which Python would complain of when it exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def outlive_terminal() -> Iterator[None]:
    """Within it this process continues when its terminal is closed, or a pipe that it writes to."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN) if in_main else None
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        if in_main:
            signal.signal(signal.SIGHUP, handler)
