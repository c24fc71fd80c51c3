"""Files that a run can do without."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_warn


@contextmanager
def if_possible(what: str, kind: type[OSError] = OSError) -> Iterator[None]:
    """Turns a disk that is full, or a directory that is gone, into a warning of what was not saved.

    Args:
        what: That is.
        kind: Which errors; others pass.
    """
    try:
        yield
    except kind as error:
        rank_zero_warn(f"{what} could not be written ({error.strerror or error}); training goes on")
