"""The classes of data and those of a network, compared."""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn


def check_class_names(names: Sequence[str], num_classes: int) -> None:
    """Compares the classes of the data with the number that a network has; a warning says so where it has more.

    Raises:
        ValueError: If the network has fewer.
    """
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    if len(names) > num_classes:
        raise ValueError(
            f"the data have {len(names)} classes ({listed}) but the network has num_classes={num_classes}; "
            f"set num_classes to {len(names)}"
        )
    if len(names) < num_classes:
        rank_zero_warn(
            f"the network has num_classes={num_classes} but the data have only {len(names)} classes "
            f"({listed}): it learns nothing about the others, and shows these alone unless asked otherwise"
        )
