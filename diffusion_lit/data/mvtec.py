"""Good and defective images, with masks of the defects, in the layout of MVTec AD."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from diffusion_lit.data.dataset import CorruptImage, Example, ImageDataset, Split
from diffusion_lit.data.decode import EXTENSIONS, square, upright
from diffusion_lit.data.folder import FolderImages, find, several
from diffusion_lit.data.source import Resized

GOOD = "good"


class DefectImages(ImageDataset):
    """Images of which some show defects.

    An example has `image`; `gt_label`, 0 for good and 1 for defective; and `gt_mask`, bool (1, H, W), true where the
    defect is. The names are those of anomalib.

    Attributes:
        names: Path of each image below the folder of its split, "scratch/003.png".
        defects: Class of each image: "good", or the name of its defect.
        masked: Whether the mask of each image is known, bool, (N,); that of a good image always is.
    """

    names: Sequence[str]
    defects: Sequence[str]
    masked: Tensor

    @abstractmethod
    def mask(self, index: int) -> Tensor:
        """Returns the mask of an image, bool (1, H, W); all false where it is not known."""

    def with_truth(self, index: int, image: Tensor) -> Example:
        """Returns the example of an image: the image, uint8 (C, H, W), with its label and mask."""
        label = int(self.defects[index] != GOOD)
        return cast(Example, {"image": image, "gt_label": torch.tensor(label), "gt_mask": self.mask(index)})


class MVTec(Resized):
    """Images in the layout of MVTec AD: train/good, test/good, test/<defect>, ground_truth/<defect>/<name>_mask.png.

    Training sees train/good alone. There are no validation images, unless there is validation/good as in MVTec AD 2. A
    defect without a folder of masks is scored by image alone. Masks are white where the defect is, any value above 0 in
    any channel, and are cropped and resized as their images are; what is covered by half counts, and of a thin scratch
    what is covered by half as much as the most covered pixel. The frames of a video go into folders likewise, named in
    order.

    Args:
        root: Folder of one category.
        image_size: Height and width in pixels.
        channels: 3 for RGB, 1 for grey.
        in_memory: Whether to decode all training images once. None: if they fit 2 GiB.

    Raises:
        ValueError: If a number is out of range.

    Source: Bergmann et al. 2019, "MVTec AD".
    """

    def __init__(self, root: str, image_size: int, channels: int = 3, in_memory: bool | None = None) -> None:
        super().__init__(image_size, channels)
        self.root = Path(root).expanduser()
        self.in_memory = in_memory

    def load(self, split: Split) -> ImageDataset | None:
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not a folder; set --data.source.root to that of a category")
        if split == "test":
            return self._test()
        folder = self.root / ("train" if split == "train" else "validation") / GOOD
        if split == "val" and not folder.is_dir():
            return None
        files = find(folder).images if folder.is_dir() else []
        if not files:
            raise FileNotFoundError(
                f"no good images: {folder} {'holds none' if folder.is_dir() else 'is missing'}; put images without "
                "defects there, or set --data.source.root"
            )
        name = f"{folder} ({split})"
        return FolderImages(name, folder, files, [], self.image_size, self.channels, self.in_memory)

    def _test(self) -> "MVTecTest":
        folder = self.root / "test"
        files = find(folder).images if folder.is_dir() else []
        if not files:
            raise FileNotFoundError(f"no test images: {folder} {'holds none' if folder.is_dir() else 'is missing'}")
        outside = [file for file in files if "/" not in file]
        if outside:
            raise ValueError(
                f"{folder}: {several(outside)} lie in no folder; move them to good/ or one named as a defect"
            )
        files = sorted(files, key=in_order)
        masks, without = find_masks(folder, self.root / "ground_truth", files)
        if without:
            rank_zero_info(f"{folder}: no masks of {', '.join(without)}: image scores only for these")
        return MVTecTest(folder, files, masks, self.image_size, self.channels)

    def remedy(self, split: Split) -> str:
        return f"; put them into {self.root / 'validation' / GOOD}"


class MVTecTest(FolderImages, DefectImages):
    """Test images in a folder for each class, decoded when they are read.

    Args:
        folder: The folder test.
        files: Paths below it.
        masks: File of the mask of each image; None: it is good, or its mask is not known.
        image_size: Height and width to crop and resize to, in pixels.
        channels: 1 or 3.
        good: Name of the sub-folder of the good images.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        masks: Sequence[Path | None],
        image_size: int,
        channels: int,
        good: str = GOOD,
    ) -> None:
        super().__init__(f"{folder} (test)", folder, files, [], image_size, channels)
        self.names = list(files)
        folders = [file.split("/")[0] for file in files]
        self.defects = [GOOD if name == good else name for name in folders]
        self.masks = masks
        known = [defect == GOOD or mask is not None for defect, mask in zip(self.defects, masks, strict=True)]
        self.masked = torch.tensor(known)

    def read(self, index: int) -> Example:
        return self.with_truth(index, super().read(index)["image"])

    def mask(self, index: int) -> Tensor:
        path = self.masks[index]
        if path is None:
            return torch.zeros(1, self.image_size, self.image_size, dtype=torch.bool)
        try:
            with Image.open(path) as image:
                white = Image.fromarray(not_black(image).astype(np.uint8) * 255)
                small = np.asarray(square(upright(white, image), self.image_size))
        except OSError as error:
            raise CorruptImage(f"{path}: {error}", index) from error
        # Half of the most that any pixel is covered by, so that scratches thinner than half a pixel are not lost.
        return torch.from_numpy(small >= max(1, (int(small.max()) + 1) // 2))[None]

    def fingerprint(self) -> str:
        """That of the images, with the size and time of every mask."""
        files = [mask.stat() for mask in self.masks if mask is not None]
        return f"{super().fingerprint()} {[(file.st_size, file.st_mtime_ns) for file in files]}"


def not_black(mask: Image.Image) -> np.ndarray:
    """Where a mask of any colour mode has a value above 0 in any channel but the opacity, bool (H, W)."""
    pixels = np.asarray(mask if mask.mode in ("1", "L", "I", "I;16", "I;16B", "F") else mask.convert("RGB"))
    found: np.ndarray = pixels > 0
    return found if found.ndim == 2 else np.any(found, axis=-1)


def in_order(file: str) -> list[tuple[int, str]]:
    """Sorts numbers within names by their value: frame 2 comes before frame 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file)]


def find_masks(folder: Path, ground_truth: Path, files: Sequence[str]) -> tuple[list[Path | None], list[str]]:
    """Finds the mask of each image.

    Args:
        folder: The folder test.
        ground_truth: The folder of the folders of masks.
        files: Images below `folder`.

    Returns:
        The mask of each image, None if it has none; and the defects without a folder of masks.

    Raises:
        ValueError: If some masks of a defect are missing, or one has not the size of its image.
    """
    masks: list[Path | None] = []
    without: dict[str, None] = {}
    for file in files:
        defect, _, name = file.partition("/")
        masks.append(None)
        if defect == GOOD:
            continue
        if not (ground_truth / defect).is_dir():
            without[defect] = None
            continue
        stem = str(Path(name).with_suffix(""))
        names = [ground_truth / defect / f"{stem}{end}{kind}" for end in ("_mask", "") for kind in EXTENSIONS]
        masks[-1] = next((path for path in names if path.is_file()), None)
        if masks[-1] is None:
            raise ValueError(
                f"{folder / file} has no mask {ground_truth / defect / stem}_mask.png; add it, or remove the folder "
                f"{ground_truth / defect} to score {defect} by image alone"
            )
        check_size(folder / file, masks[-1])
    return masks, list(without)


def check_size(image: Path, mask: Path) -> None:
    """Raises ValueError if a mask is no image or has not the size of its image, which itself is read later."""
    try:
        with Image.open(mask) as opened_mask:
            mask_size = upright(opened_mask, opened_mask).size
    except OSError as error:
        raise ValueError(f"{mask} is not readable as an image ({error}); replace it") from error
    try:
        with Image.open(image) as opened:
            sizes = upright(opened, opened).size, mask_size
    except OSError:
        return
    if sizes[0] != sizes[1]:
        (w, h), (mask_w, mask_h) = sizes
        raise ValueError(f"{mask} is {mask_w} x {mask_h}, but its image {image} is {w} x {h} pixels; make them agree")
