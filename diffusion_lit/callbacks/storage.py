"""Files that a run can do without."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_warn


@contextmanager
def if_possible(what: str) -> Iterator[None]:
    """Turns a disk that is full, or a directory that is gone, into a warning of what was not saved."""
    try:
        yield
    except OSError as error:
        rank_zero_warn(f"{what} could not be written ({error.strerror or error}); training goes on")
