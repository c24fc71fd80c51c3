"""What data have and what a system takes, compared."""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn


def check_images(data: object, name: str, image_shape: tuple[int, int, int], needs_pixels: bool) -> None:
    """Compares the images of the data with those that a system takes.

    Args:
        data: A data module of any kind; None: there is none.
        name: Of the system's class, for messages.
        image_shape: (C, H, W) that it takes.
        needs_pixels: Whether it needs the images, and not only moments of a first stage.

    Raises:
        ValueError: If they do not fit.
    """
    shape = tuple(getattr(data, "image_shape", image_shape))
    if shape != image_shape:
        raise ValueError(
            f"the data's images are {shape} (channels, height, width) but the {name} takes {image_shape}; "
            "make the image_size of data and network, and the network's in_channels, agree"
        )
    if needs_pixels and not getattr(data, "gives_pixels", True):
        raise ValueError(
            f"the data give moments of a first stage in place of images, which the {name} needs; set "
            "--data.source.pixels true, or --data.source.moments null"
        )


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


def check_same_classes(names: Sequence[str], trained: Sequence[str]) -> list[str]:
    """Compares the classes of the data with those that a model was trained on; one of them may have more at its end.

    Returns:
        The longer list.

    Raises:
        ValueError: If a label means one class in the data and another to the model.
    """
    for label, (given, known) in enumerate(zip(names, trained, strict=False)):
        if given != known:
            raise ValueError(
                f"label {label} is {given!r} in the data, and {known!r} to the model, which was trained on the classes "
                f"{', '.join(trained[:10])}{', ...' if len(trained) > 10 else ''}; give data with these classes in "
                "this order, or train on others by a new run with --init_from"
            )
    return list(names if len(names) > len(trained) else trained)
