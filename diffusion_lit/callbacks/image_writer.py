"""Writes what `predict` generates."""

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, PngImagePlugin

from diffusion_lit.callbacks.progress import sampling_bar
from diffusion_lit.generation import Requests
from diffusion_lit.images import save_png, tile, to_pil
from diffusion_lit.module import DiffusionModule, Generated

GRID = 100


class ImageWriter(L.Callback):
    """Image i becomes <directory>/<i>.png, written by the process that made it; a label is kept inside the file.

    At the end the first process gathers them: `images.npz` in the form that OpenAI's evaluator reads (arr_0 uint8
    (N, H, W, C), arr_1 labels where there are any) and `grid.png` of the first 100.

    Args:
        directory: Where to; made if it is not there.
        requests: What is generated.
        npz: Whether to write the .npz file.
        columns: Of the grid; as square as may be by default.
    """

    def __init__(self, directory: Path, requests: Requests, npz: bool = True, columns: int | None = None) -> None:
        self.directory = directory
        self.requests = requests
        self.npz = npz
        self.columns = columns
        self._bar: Any = None

    def path(self, index: int) -> Path:
        """Where an image goes."""
        return self.directory / f"{index:06d}.png"

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._bar = sampling_bar(trainer, cast(DiffusionModule, pl_module), self.requests, "images")
        self._bar.__enter__()

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: object) -> None:
        generated = cast(Generated, outputs)
        labels = generated["condition"].get("label")
        for row, index in enumerate(generated["index"].tolist()):
            if index < self.requests.num_images:
                text = PngImagePlugin.PngInfo()
                if labels is not None:
                    text.add_text("label", str(int(labels[row])))
                to_pil(generated["image"][row]).save(self.path(index), pnginfo=text)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close_bar()
        trainer.strategy.barrier("image_writer")
        if trainer.is_global_zero:
            self._gather()

    def _gather(self) -> None:
        images, labels = [], []
        for index in range(self.requests.num_images):
            with Image.open(self.path(index)) as image:
                images.append(np.atleast_3d(np.asarray(image)))
                labels.append(image.info.get("label"))
                if not self.npz and len(images) == GRID:
                    break
        stacked = np.stack(images)
        shown = torch.from_numpy(stacked[:GRID].transpose(0, 3, 1, 2).copy())
        save_png(tile(shown, self.columns), self.directory / "grid.png")
        made = f"{self.requests.num_images} images and grid.png"
        if self.npz:
            arrays = {"arr_0": stacked}
            if None not in labels:
                arrays["arr_1"] = np.array([int(label) for label in labels if label is not None])
            np.savez(self.directory / "images.npz", **arrays)  # type: ignore[arg-type]
            made += ", images.npz"
        rank_zero_info(f"{self.directory}: {made}")
