"""The forms in which captions come with folders of images."""

import csv
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusion_lit.data.captions import Captions
from diffusion_lit.data.dataset import Split
from diffusion_lit.types import Part


class CaptionForm(Part):
    """A form in which captions come with a folder of images."""

    remedy: str
    """What to do about a missing caption."""

    @abstractmethod
    def read(self, root: Path, files: Sequence[str], split: Split) -> Iterable[list[str]]:
        """Reads the captions of a folder's images.

        Args:
            root: The folder.
            files: Paths of the images below it, with forward slashes.
            split: Which images they are.

        Returns:
            Captions of each image, [] for one that has none.

        Raises:
            FileNotFoundError: If a file of captions is missing.
            ValueError: If it cannot be used.
        """

    def captions(self, root: Path, files: Sequence[str], split: Split) -> Captions:
        """Reads the captions, of which every image must have one.

        Raises:
            ValueError: If one has none, or see `read`.
        """
        found = [[text for text in texts if text.strip()] for texts in self.read(root, files, split)]
        missing = [file for file, texts in zip(files, found, strict=True) if not texts]
        if missing:
            raise ValueError(
                f"{root}: {len(missing)} of {len(files)} images have no caption, first {missing[0]}; {self.remedy}"
            )
        return Captions(found)


class TextFiles(CaptionForm):
    """A text file beside each image, `name.txt` beside `name.jpg`: every line that is not empty is a caption."""

    remedy = "put a .txt of the same name beside each image, or take images without one away"

    def read(self, root: Path, files: Sequence[str], split: Split) -> Iterable[list[str]]:
        for file in files:
            path = (root / file).with_suffix(".txt")
            try:
                yield path.read_text(encoding="utf-8").splitlines()
            except FileNotFoundError:
                yield []
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} cannot be read as text: {error}") from error


class Metadata(CaptionForm):
    """The `metadata.jsonl` or `metadata.csv` of Hugging Face's image folders, in the folder or in those below it.

    Args:
        column: Holds the captions: a text, or in .jsonl also a list of texts.
    """

    remedy = "add a line for each image to metadata.jsonl or metadata.csv"

    def __init__(self, column: str = "text") -> None:
        self.column = column

    def read(self, root: Path, files: Sequence[str], split: Split) -> Iterable[list[str]]:
        folders = sorted({parent for file in files for parent in Path(file).parents})
        paths = [root / folder / f"metadata.{kind}" for folder in folders for kind in ("jsonl", "csv")]
        tables = [path for path in paths if path.is_file()]
        if not tables:
            raise FileNotFoundError(
                f"there is no metadata.jsonl or metadata.csv in {root} or a folder of images below it; "
                "set --data.source.captions to the form that the captions have"
            )
        found: dict[str, list[str]] = {}
        for table in tables:
            folder = table.parent.relative_to(root)
            for name, texts in self._rows(table):
                found.setdefault((folder / name).as_posix(), []).extend(texts)
        return (found.get(file, []) for file in files)

    def _rows(self, table: Path) -> Iterator[tuple[str, list[str]]]:
        """(file name, captions) of each row."""
        with table.open(encoding="utf-8", newline="") as file:
            lines: Iterable[str] = (line for line in file if line.strip())
            rows: Iterable[Any] = csv.DictReader(file) if table.suffix == ".csv" else map(json.loads, lines)
            try:
                for number, row in enumerate(rows, 1):
                    if not isinstance(row, dict):
                        raise ValueError(f"row {number} is no object with file_name and {self.column}")
                    columns = [str(name) for name in row]
                    missing = [name for name in ("file_name", self.column) if name not in columns]
                    if missing:
                        raise ValueError(
                            f"row {number} has no {' and no '.join(missing)}, only {', '.join(columns)}; set "
                            "--data.source.captions.column"
                        )
                    value = row[self.column]
                    texts = value if isinstance(value, list) else [value or ""]
                    if not all(isinstance(text, str) for text in (row["file_name"], *texts)):
                        raise ValueError(f"row {number} has something else than texts in file_name or {self.column}")
                    yield row["file_name"], texts
            except (ValueError, RecursionError, csv.Error) as error:
                raise ValueError(f"{table}: {error}") from error


class COCOCaptions(CaptionForm):
    """COCO's `captions_train2017.json` and `captions_val2017.json`, five captions for each image.

    Args:
        file: Captions of the training images.
        val_file: Captions of the validation and test images; None: `file` holds them too.

    Source: Chen et al. 2015, Microsoft COCO Captions.
    """

    remedy = "take the file of captions that belongs to these images"

    def __init__(self, file: str, val_file: str | None = None) -> None:
        self.file = file
        self.val_file = val_file

    def read(self, root: Path, files: Sequence[str], split: Split) -> Iterable[list[str]]:
        own = split != "train" and self.val_file is not None
        path = Path(str(self.val_file) if own else self.file).expanduser()
        if not path.is_file():
            option = "val_file" if own else "file"
            raise FileNotFoundError(f"{path} is no file; set --data.source.captions.{option} to COCO's captions_*.json")
        try:
            content = json.loads(path.read_bytes())
            names = {image["id"]: image["file_name"] for image in content["images"]}
            found: dict[str, list[str]] = {}
            for annotation in content["annotations"]:
                found.setdefault(names[annotation["image_id"]], []).append(annotation["caption"].strip())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} does not hold COCO's captions ({type(error).__name__}: {error})") from error
        return (found.get(name, []) for name in files)
