"""Files and results that a run can do without."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_warn

from diffusion_lit.records import NonFinite


@contextmanager
def if_possible(what: str, kind: type[OSError] = OSError) -> Iterator[None]:
    """Turns a full disk, a missing directory and values that are not finite into a warning.

    Args:
        what: Named in the warning.
        kind: The errors of files that are caught.
    """
    try:
        yield
    except kind as error:
        rank_zero_warn(f"{what} could not be written ({error.strerror or error}); training continues")
    except NonFinite as error:
        rank_zero_warn(f"{what} was left out: {error}; training continues")
