"""What `predict` is asked for: which images, and what they show."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import cast

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from diffusion_lit.data.masks import White, check_white
from diffusion_lit.data.pictures import Size, kept_texts, picture_files, read_images, read_maps, read_masks
from diffusion_lit.files import require_writable
from diffusion_lit.generator import Generator, check_labels
from diffusion_lit.images import scaled
from diffusion_lit.requests import Conditions, Given, Request, Requests
from diffusion_lit.text import encode_text

BATCH = 64
SIDE = 8192
MOST_PIXELS = SIDE**2
"""Of one image that is made."""
OPTIONS = {"image": "--image", "low_res": "--image", "mask": "--mask", "map": "--map", "caption": "--prompts"}
"""By which option each entry is asked for."""


def asked_requests(
    conditions: Conditions | None, num_images: int | None, batch_size: int | None, seed: int
) -> Requests:
    """The images to generate.

    Args:
        conditions: What they show; None: the model's own choice.
        num_images: How many; None: one for each condition that was asked for by name, else 64.
        batch_size: Images at once by each process; None: at most 64, as even as the number allows.
        seed: Of the noise.

    Raises:
        ValueError: If a number is out of range.
    """
    if num_images is None:
        num_images = len(conditions) if isinstance(conditions, Given) else BATCH
    if batch_size is None:
        num_batches = -(-num_images // BATCH) or 1
        batch_size = max(-(-num_images // num_batches), 1)
    return Requests(num_images, batch_size, conditions, seed)


def asked_conditions(
    model: L.LightningModule,
    labels: str | Sequence[int] | None = None,
    per_class: int | None = None,
    prompts: Sequence[str] | None = None,
    prompts_file: str | None = None,
    image: str | None = None,
    mask: str | None = None,
    map: str | None = None,
    mask_white: White = "hole",
) -> Conditions | None:
    """What was asked for by name, by the options of `predict`; None: nothing in particular.

    Raises:
        ValueError: If the model cannot be asked for that, two of them exclude each other, or something is missing.
    """
    entries = model.entries if isinstance(model, Generator) else ()
    num_classes = model.num_classes if isinstance(model, Generator) else None
    if (labels is not None or per_class is not None) and num_classes is None and "caption" in entries:
        raise ValueError("labels: the model is asked by texts; give --prompts")
    texts = parse_prompts(prompts, prompts_file)
    if texts is not None and "caption" not in entries:
        raise ValueError("prompts: the model takes no texts" + ("; give --labels" if num_classes else ""))
    names = (model.class_names or ()) if isinstance(model, Generator) else ()
    numbers = parse_labels(labels, per_class, num_classes, names)
    given = {
        **({} if numbers is None else {"label": torch.tensor(numbers)}),
        **({} if texts is None else {"caption": encode_text(texts)}),
    }
    given = {**asked_pictures(model, image, mask, map, mask_white), **given}
    missing = [name for name in entries if name not in given]
    if given and missing:
        options = dict.fromkeys(OPTIONS.get(name, f"data with {name}") for name in missing)
        raise ValueError(f"the model makes images from {' and '.join(entries)}; give {' and '.join(options)} too")
    return Given(in_turn(given)) if given else None


def in_turn(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Repeats entries, (N, ...) each with an N of its own, so that all have as many as the longest."""
    count = max(map(len, given.values()))
    return {name: value[torch.arange(count) % len(value)] for name, value in given.items()}


def asked_pictures(
    model: L.LightningModule, image: str | None, mask: str | None, map: str | None, mask_white: White
) -> dict[str, Tensor]:
    """Images, masks and maps asked for by their files, as a model takes them, and what `predict` wrote into them.

    An image is the low-resolution image of models that take one.

    Raises:
        ValueError: If the model takes no such thing, or a file cannot be used.
    """
    check_white("mask_white", mask_white)
    entries = model.entries if isinstance(model, Generator) else ()
    of_image = next((name for name in ("image", "low_res") if name in entries), "image")
    given: dict[str, Tensor] = {}
    for path, name, option, read in (
        (image, of_image, "image", read_images),
        (mask, "mask", "mask", partial(read_masks, white=mask_white)),
        (map, "map", "map", read_maps),
    ):
        if path is None:
            continue
        if not isinstance(model, Generator) or name not in entries:
            taken = " and ".join(entries) or "noise alone"
            raise ValueError(
                f"{option}={path}: the model makes images from {taken}; leave it out, or choose an --edit that takes it"
            )
        files = picture_files(path, option)
        usual = model.shape_of(name)
        given[name] = read(files, Size(usual, partial(model.takes, name)))
        if given[name].shape[1:] != usual:
            height, width = given[name].shape[2:]
            rank_zero_info(
                f"{option}={path}: {width} x {height} pixels, where the model was trained with {usual[2]} x {usual[1]}"
            )
        check_size(model, name, given[name], f"{option}={path}")
        if option == "image":
            given |= kept_conditions(model, files)
    if "mask" in given and "image" in given and given["mask"].shape[2:] != given["image"].shape[2:]:
        (height, width), (h, w) = given["mask"].shape[2:], given["image"].shape[2:]
        raise ValueError(f"mask={mask} has {width} x {height} pixels, and the image {w} x {h}; resize it")
    return scaled(given)


def check_size(model: Generator, entry: str, pictures: Tensor, asked: str) -> None:
    """Refuses pictures, (N, C, h, w), of which a model would make larger images than there is memory for.

    Raises:
        ValueError: If an image would have more than `MOST_PIXELS`.
    """
    (height, width), usual = pictures.shape[2:], model.shape_of(entry)
    rows, columns = (
        side * made // trained
        for side, made, trained in zip((height, width), model.image_shape[1:], usual[1:], strict=True)
    )
    if rows * columns > MOST_PIXELS:
        factor = max(model.image_shape[1] // usual[1], 1)
        raise ValueError(
            f"{asked} has {width} x {height} pixels, of which an image of {columns} x {rows} would be made, and "
            f"{MOST_PIXELS:,} pixels are the most; reduce it, or cut it into pieces, such as of "
            f"{SIDE // factor} x {SIDE // factor}"
        )


def kept_conditions(model: Generator, files: Sequence[Path]) -> dict[str, Tensor]:
    """The classes and texts that `predict` has written into its images, of those that a model takes."""
    found: dict[str, Tensor] = {}
    labels = kept_texts(files, "label") if model.num_classes is not None else None
    if labels is not None:
        found["label"] = torch.tensor([int(label) for label in labels])
        check_labels(found["label"], model.num_classes)
    texts = kept_texts(files, "caption") if "caption" in model.entries else None
    return found if texts is None else {**found, "caption": encode_text(texts)}


def parse_prompts(prompts: Sequence[str] | None, prompts_file: str | None) -> list[str] | None:
    """The texts asked for, in order; None if there are none.

    Raises:
        ValueError: If both are given, the file cannot be read, or there is no text.
    """
    if prompts is not None and prompts_file is not None:
        raise ValueError("prompts and prompts_file exclude each other; give one of them")
    if prompts_file is not None:
        try:
            prompts = [line for line in Path(prompts_file).read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompts_file={prompts_file} cannot be read as text: {error}") from error
    if prompts is not None and not len(prompts):
        raise ValueError('prompts: there are none; give --prompts "a text" "another text"')
    return None if prompts is None else list(prompts)


def parse_labels(
    labels: str | Sequence[int] | None, per_class: int | None, num_classes: int | None, class_names: Sequence[str] = ()
) -> list[int] | None:
    """Which classes to generate, in order; None: none in particular.

    Args:
        labels: Classes one after the other, "3,3,7", "frog,7" or numbers.
        per_class: Instead, this many images of every class, class by class.
        num_classes: The model's; None if it is unconditional.
        class_names: Names that may stand for numbers, in the order of the classes.

    Raises:
        ValueError: If both are given, something is no class or out of range, or the model is unconditional.
    """
    if labels is None and per_class is None:
        return None
    if labels is not None and per_class is not None:
        raise ValueError(f"labels={labels} and per_class={per_class} exclude each other; give one of them")
    if per_class is not None:
        if per_class < 1:
            raise ValueError(f"per_class={per_class} must be at least 1")
        check_labels(torch.zeros(0), num_classes)
        return [label for label in range(num_classes or 0) for _ in range(per_class)]
    words = [word.strip() for word in labels.strip("[] ").split(",")] if isinstance(labels, str) else labels or []
    known: Mapping[str, int] = {name: number for number, name in enumerate(class_names)}
    try:
        numbers = [known[word] if word in known else int(word) for word in words]  # type: ignore[index]
    except ValueError:
        numbers = []
    if not numbers:
        names = f"; its classes are {', '.join(list(class_names)[:20])}" if class_names else ""
        raise ValueError(f"labels={labels!r} must be classes between commas, such as --labels 3,3,7{names}")
    check_labels(torch.tensor(numbers), num_classes)
    return numbers


class Generation(L.LightningDataModule):
    """Gives every process its requests, once it knows which process it is.

    Args:
        requests: What all processes are going to generate.
    """

    def __init__(self, requests: Requests) -> None:
        super().__init__()
        self.requests = requests

    def predict_dataloader(self) -> DataLoader[Request]:
        trainer = cast(L.Trainer, self.trainer)
        return self.requests.loader(trainer.global_rank, trainer.world_size)


@contextmanager
def room(directory: Path, replace: bool) -> Iterator[None]:
    """Keeps what a prediction writes apart from everything else, so that other programs can score the folder.

    Folders that were made for it and stayed empty, because nothing could be predicted, are removed.

    Args:
        directory: Where images are written.
        replace: Whether earlier images there may be removed; else whatever is there is an error.

    Raises:
        ValueError: If there is something that may not be removed, or the folder cannot be written to.
    """
    new = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        require_writable(directory)
        _make_room(directory, replace)
        yield
    finally:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()


def _make_room(directory: Path, replace: bool) -> None:
    there = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    if there and not replace:
        raise ValueError(
            f"{directory} is not empty ({len(there)} entries, first {there[0].name}); choose another directory with "
            "--out"
        )
    for path in directory.glob("[0-9]" * 6 + ".png"):
        path.unlink()
        path.with_suffix(".txt").unlink(missing_ok=True)
