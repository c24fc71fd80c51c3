"""How errors end a command: one line that names the key, the value and the remedy, and exit code 2.

An error of this package itself keeps its traceback, and says how to report it.
"""

import errno
import os
import re
import sys
import traceback
from typing import NoReturn, cast

from diffusion_lit.terminal import printable

TRACEBACK = "DIFFUSION_LIT_TRACEBACK"
USER_ERRORS = (ValueError, TypeError, RuntimeError, ArithmeticError, OSError)
VAGUE_ERRORS = (TypeError, RuntimeError, ZeroDivisionError, OverflowError)
"""Those whose messages do not make sense without their names."""
OTHER_ERRORS = (LookupError, AttributeError, AssertionError, ImportError, SyntaxError, NameError)
"""Errors that are the user's where another package raises them, for what it was given, and bugs where this one does."""
NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")
"""What torch says where tensors are larger than the memory."""
LONG = 300
"""Characters of the longest word that is quoted in full."""
_PACKAGE = "diffusion_lit"
_IN_A_WORKER = "in DataLoader worker process"
_RAISED = re.compile(r"[A-Za-z_][\w.]*: ")
_OF_A_PART = re.compile(r"^  - (?!Expected a )(?:Problem with given class_path '.*':\s)?((?:.*\n)(?: {4}.*\n)*)", re.M)
"""Where an argument takes several types, the parser joins the errors of all of them: that of a part is to the point."""
_WRAPPERS = ("jsonargparse", "lightning.pytorch.utilities.combined_loader")


def fail(message: str) -> NoReturn:
    """Ends the program with a one-line error, which names the process where there are several."""
    line = " ".join(word if len(word) <= LONG else f"{word[:LONG]}..." for word in message.split())
    line = printable(line.replace("init_args.", ""))
    sys.stderr.write(f"diffusion_lit: error: {which_process()}{line}\n")
    sys.stderr.flush()
    raise SystemExit(2)


def which_process() -> str:
    """Such as "rank 3: " in one of several processes, as launchers number them; else nothing."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), None)
    several = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")) != "1"
    return f"rank {rank}: " if several and rank is not None else ""


def report(error: Exception) -> NoReturn:
    """Ends the program because of an error.

    Raises:
        SystemExit: With code 2 if the error comes from what the user gave, with 1 if it is one of this package.
        Exception: The error itself, if DIFFUSION_LIT_TRACEBACK is set.
    """
    if os.environ.get(TRACEBACK):
        raise error
    cause = innermost(error)
    text = str(cause)
    if is_of_another_process(cause):
        fail(f"another process has failed or does not answer, see its own error ({' '.join(text.split())[:200]})")
    if isinstance(cause, MemoryError) or any(words in text for words in NO_MEMORY):
        fail(f"there is not enough memory ({text or 'MemoryError'}); use smaller batches or a smaller network")
    if isinstance(cause, OSError) and cause.errno == errno.ENAMETOOLONG:
        name = max(str(cause.filename).split("/"), key=len)
        fail(f"the file name {name[:40]}... is too long ({len(name)} characters); give a shorter one")
    if isinstance(cause, ModuleNotFoundError) and not str(cause.name).startswith(_PACKAGE):
        fail(f"{text}; install it with pip, or choose another part")
    if is_users(cause):
        text = "; ".join(filter(None, (of_a_worker(text), getattr(cause, "remedy", ""))))
        fail(f"{type(cause).__name__}: {text}" if type(cause) in VAGUE_ERRORS else text)
    if isinstance(cause, OTHER_ERRORS) and not is_raised_in(cause, (_PACKAGE,)):
        where = traceback.extract_tb(cause.__traceback__)[-1]
        fail(f"{type(cause).__name__}: {text} ({where.filename}, line {where.lineno}); for more set {TRACEBACK}=1")
    traceback.print_exception(error)
    sys.stderr.write(
        "diffusion_lit: this is an error in diffusion_lit itself; please report it with the lines above and the "
        "command, as CONTRIBUTING.md describes\n"
    )
    raise SystemExit(1)


def of_a_worker(text: str) -> str:
    """The message of an error that a loader's worker raised, which comes with the worker's traceback; others as is."""
    if not text.startswith("Caught ") or _IN_A_WORKER not in text:
        return text
    lines = text.rstrip().split("\n")
    start = max(number for number, line in enumerate(lines) if _RAISED.match(line) or number == 0)
    return "\n".join(lines[start:]).partition(": ")[2] or text


def is_users(error: BaseException) -> bool:
    """Whether an error is one that parts and Lightning raise for what they were given."""
    misconfigured = any(kind.__name__ == "MisconfigurationException" for kind in type(error).__mro__)
    unfinished = isinstance(error, NotImplementedError | RecursionError)
    return misconfigured or (isinstance(error, USER_ERRORS) and not unfinished)


def is_of_another_process(error: BaseException) -> bool:
    """Whether an error comes from waiting for another process."""
    backend = type(error) is RuntimeError and ("gloo" in str(error).lower() or "nccl" in str(error).lower())
    return backend or any(kind.__name__ == "DistError" for kind in type(error).__mro__)


def innermost(error: BaseException) -> BaseException:
    """The error that another one hides: the parser wraps what a part raises, Lightning fails to close a loader."""
    while is_raised_in(error, _WRAPPERS) and is_hidden(error.__cause__ or error.__context__):
        if (found := of_a_part(str(error))) is not None:
            # A bug in a part says more by its kind and its line.
            root = root_of(error)
            says_all = isinstance(root, OTHER_ERRORS) and " ".join(str(root).split()) == found
            return root if says_all else ValueError(found)
        error = cast(BaseException, error.__cause__ or error.__context__)
    found = of_a_part(str(error)) if "Union subtypes" in str(error) else None
    return error if found is None else ValueError(found)


def root_of(error: BaseException) -> BaseException:
    """The first of the errors that caused one another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def of_a_part(text: str) -> str | None:
    """What a part says in a message of the parser in one line, also a part of a part; None: it is no such message."""
    found = None
    while (match := _OF_A_PART.search(text)) is not None:
        found, text = " ".join(match[1].split()), match[1].replace("\n    ", "\n")
    return found


def is_hidden(error: BaseException | None) -> bool:
    """Whether an error is more to the point than one that was raised while it was handled."""
    return error is not None and (is_users(error) or isinstance(error, (*OTHER_ERRORS, MemoryError)))


def is_raised_in(error: BaseException, modules: tuple[str, ...]) -> bool:
    """Whether the statement that raised an error stands in one of some modules or packages."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith(modules)
