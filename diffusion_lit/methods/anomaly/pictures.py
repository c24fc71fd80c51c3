"""Maps of anomalies on disk: for programs, for a person, and all steps side by side."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion_lit.callbacks.collective import on_rank_zero
from diffusion_lit.data import ImageData, ImageDataset
from diffusion_lit.images import save_png, tile, to_pil
from diffusion_lit.requests import Requests

SHOWN = 128
"""Smaller images are enlarged in overlays, by a whole number, to at least this many pixels."""


def in_colour(images: Tensor) -> Tensor:
    """8-bit images, (B, C, H, W), with three channels."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def heat_map(maps: Tensor, hottest: float) -> Tensor:
    """Maps, (B, H, W), as 8-bit colours, (B, 3, H, W): black at 0, and white from `hottest` on."""
    from matplotlib import colormaps

    colours = colormaps["inferno"]((maps.double() / hottest).clamp(0, 1).cpu().numpy(), bytes=True)[..., :3]
    return torch.from_numpy(np.ascontiguousarray(colours.transpose(0, 3, 1, 2)))


def overlay(images: Tensor, maps: Tensor, hottest: float) -> Tensor:
    """Images, uint8 (B, C, H, W), in grey under their maps, uint8 (B, 3, H', W'): a map hides as much as it is hot."""
    grey = images.float().mean(1, keepdim=True).cpu()
    share = (maps / hottest).clamp(0, 1)[:, None].sqrt().cpu()
    mixed = (grey * (1 - share) + heat_map(maps, hottest).float() * share).round().to(torch.uint8)
    factor = math.ceil(SHOWN / min(images.shape[-2:]))
    return mixed.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def save_grid(rows: Sequence[Tensor], hottest: float, path: Path) -> None:
    """Writes a row for each image: itself, noised, reconstructed, its map, and the mask.

    Args:
        rows: Images, noised and reconstructed ones, uint8 (B, C, H, W); maps, (B, H, W); masks, bool (B, H, W).
        hottest: Value of a map in the hottest colour.
        path: Of the picture.
    """
    images, noised, reconstructed, maps, masks = rows
    white = (masks[:, None].to(torch.uint8) * 255).expand(-1, 3, -1, -1)
    columns = [*map(in_colour, (images, noised, reconstructed)), heat_map(maps, hottest), white]
    factor = math.ceil(64 / min(images.shape[-2:]))
    tiles = torch.stack(columns, 1).flatten(0, 1).repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    save_png(tile(tiles, columns=len(columns)), path)


def image_names(images: ImageDataset) -> list[str]:
    """A name for each image, without extension where the names differ without it; may contain slashes."""
    names = images.names
    if names is None and hasattr(images, "path") and hasattr(images, "root"):
        names = [images.path(i).relative_to(images.root).as_posix() for i in range(len(images))]
    if names is None:
        return [f"{i:06d}" for i in range(len(images))]
    stems = [str(Path(name).with_suffix("")) for name in names]
    return stems if len(set(stems)) == len(stems) else list(names)


def stored_images(data: ImageData, indices: Sequence[int]) -> tuple[list[int], Tensor]:
    """The readable test images among `indices`: their indices, and uint8 (B, C, H, W)."""
    rows = [(i, data.some([i], "test")["image"]) for i in indices]
    readable = [(i, image) for i, image in rows if len(image)]
    images = torch.cat([image for _, image in readable] or [torch.empty(0, *data.image_shape, dtype=torch.uint8)])
    return [i for i, _ in readable], images


def below(requests: Requests, batch: int) -> list[int]:
    """The images of a batch that were asked for."""
    return [i for i in requests[batch]["index"].tolist() if i < requests.num_images]


class Inspection(L.LightningDataModule):
    """Gives every process its share of the test images, as stored.

    Args:
        data: Has them.
        requests: Which of them, in batches.
    """

    def __init__(self, data: ImageData, requests: Requests) -> None:
        super().__init__()
        self.data = data
        self.requests = requests

    def predict_dataloader(self) -> DataLoader[Any]:
        trainer = cast(L.Trainer, self.trainer)
        share = self.requests.share(trainer.global_rank, trainer.world_size)
        # Lightning skips its hooks on a process without batches: such a process gets an empty one.
        order: Any = share or [len(self.requests)]
        return DataLoader(Inspected(self.data, self.requests), batch_size=None, sampler=order)


class Inspected(Dataset[Any]):
    """The batches: `image` uint8 (B, C, H, W), `index` int64 (B,), and `seed`; unreadable images are left out.

    Args:
        data: Has the test images.
        requests: Which of them, in batches.
    """

    def __init__(self, data: ImageData, requests: Requests) -> None:
        self.data = data
        self.requests = requests

    def __getitem__(self, batch: int) -> dict[str, Any]:
        wanted = below(self.requests, batch)
        index, images = stored_images(self.data, wanted)
        return {"index": torch.tensor(index, dtype=torch.int64), "image": images, "seed": self.requests.seed}


class AnomalyWriter(L.Callback):
    """Writes <name>_map.tiff (float32), <name>_overlay.png and, for all images, scores.csv.

    Args:
        directory: Where to.
        names: Of the images, in their order.
        hottest: Value of a map in the hottest colour of overlays.
    """

    def __init__(self, directory: Path, names: Sequence[str], hottest: float) -> None:
        self.directory = directory
        self.names = names
        self.hottest = hottest

    def path(self, index: int, end: str) -> Path:
        """Where a file of an image goes."""
        return self.directory / f"{self.names[index]}_{end}"

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            for index in range(len(self.names)):
                self.path(index, "overlay.png").unlink(missing_ok=True)
        trainer.strategy.barrier("anomaly_writer_start")

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: object) -> None:
        maps = outputs["anomaly_map"].float()
        overlays = overlay(outputs["image"], maps, self.hottest)
        for row, index in enumerate(outputs["index"].tolist()):
            self.path(index, "map.tiff").parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(maps[row].numpy()).save(self.path(index, "map.tiff"))
            text = PngImagePlugin.PngInfo()
            text.add_text("pred_score", repr(float(outputs["pred_score"][row])))
            to_pil(overlays[row]).save(self.path(index, "overlay.png"), pnginfo=text)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("anomaly_writer_end")
        count = on_rank_zero(trainer, self._gather)
        rank_zero_info(f"{self.directory}: maps, overlays and scores.csv of {count} images")

    def _gather(self) -> int:
        rows = []
        for index, name in enumerate(self.names):
            if self.path(index, "overlay.png").is_file():
                with Image.open(self.path(index, "overlay.png")) as image:
                    rows.append([name, image.info["pred_score"]])
        with (self.directory / "scores.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "pred_score"])
            writer.writerows(rows)
        return len(rows)
