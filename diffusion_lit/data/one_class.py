"""One class of a folder of classes as good images, all others as anomalies."""

from pathlib import Path

from diffusion_lit.data.dataset import ImageDataset, Split
from diffusion_lit.data.folder import FolderImages, find
from diffusion_lit.data.mvtec import GOOD, MVTecTest
from diffusion_lit.data.source import Resized, at_least


class OneClass(Resized):
    """Images of one class to learn, and of all classes to judge: train/<class>/ and test/<class>/.

    Training sees train/<good> alone. Of the test images those of test/<good> are good, and each other class is a class
    of anomalies. There are no masks, so that there are scores of whole images only, and no validation images.

    Args:
        root: Folder with train and test.
        good: The class whose images are good; the name of its folder.
        image_size: Height and width in pixels.
        channels: 3 for RGB, 1 for grey.
        per_class: Most test images of each class, the first by name; null: all.

    Raises:
        ValueError: If a number is out of range, or a class of anomalies is called "good".

    Source: the protocol of Ruff et al. 2018, "Deep one-class classification", section 4.
    """

    def __init__(self, root: str, good: str, image_size: int, channels: int = 3, per_class: int | None = None) -> None:
        super().__init__(image_size, channels)
        if per_class is not None:
            at_least("source.per_class", per_class, 1)
        self.root = Path(root).expanduser()
        self.good = good
        self.per_class = per_class

    def load(self, split: Split) -> ImageDataset | None:
        if split == "val":
            return None
        folder = self.root / split
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; set --data.source.root to one with train and test")
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
        if self.good not in classes:
            listed = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            raise FileNotFoundError(
                f"{folder} has no class {self.good!r}, but {listed or 'none'}; set --data.source.good"
            )
        if GOOD in classes and self.good != GOOD:
            raise ValueError(f"{folder / GOOD}: a class of anomalies cannot be called {GOOD}; rename it")
        if split == "train":
            name = f"{folder / self.good} (train)"
            files = find(folder / self.good).images
            if not files:
                raise FileNotFoundError(f"no good images: {folder / self.good} holds none")
            return FolderImages(name, folder / self.good, files, [], self.image_size, self.channels, in_memory=True)
        files = [f"{name}/{file}" for name in classes for file in find(folder / name).images[: self.per_class]]
        return MVTecTest(folder, files, [None] * len(files), self.image_size, self.channels, self.good)
