"""Writes what `predict` generates."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, PngImagePlugin

from diffusion_lit.callbacks.progress import ProgressBar, sampling_bar
from diffusion_lit.files import whole_file
from diffusion_lit.generator import Generated, Generator
from diffusion_lit.images import save_animation, save_png, tile, to_pil, to_uint8
from diffusion_lit.requests import Requests
from diffusion_lit.text import decode_text

GRID = 100
ANIMATED = 16
LONGEST = 24
"""Characters of a class's name beside the grid."""


class ImageWriter(L.Callback):
    """Writes image i to <directory>/<i>.png, on the process that made it; a label or caption is kept inside the file.

    The folder holds nothing else, but for captions as <i>.txt, so that other programs can score it. At the end the
    first process gathers the images beside it: <directory>.npz in the form that OpenAI's evaluator reads (arr_0 uint8
    (N, H, W, C), arr_1 labels where there are any) and <directory>_grid.png of the first 100.

    Args:
        directory: Where to; made if it is not there.
        requests: What is generated.
        npz: Whether to write the .npz file.
        columns: Of the grid, whose rows are then classes, and named; as square as may be by default.
        animate: Whether to write <directory>_animation.png too, in which the first 16 images come about: as predicted
            at each step ("x0"), or with their noise ("x_t").
    """

    def __init__(
        self,
        directory: Path,
        requests: Requests,
        npz: bool = True,
        columns: int | None = None,
        animate: Literal["x0", "x_t"] | None = None,
    ) -> None:
        self.directory = directory
        self.requests = requests
        self.npz = npz
        self.columns = columns
        self.animate = animate
        self._stack = ExitStack()

    def path(self, index: int) -> Path:
        """Where an image goes."""
        return self.directory / f"{index:06d}.png"

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        can = isinstance(pl_module, Generator) and type(pl_module).trajectory is not Generator.trajectory
        if self.animate is not None and not can:
            raise ValueError(f"animate={self.animate}: a {type(pl_module).__name__} has no intermediate steps to show")
        self.directory.mkdir(parents=True, exist_ok=True)
        bar = trainer.progress_bar_callback
        if isinstance(bar, ProgressBar):
            bar.on_sampling_step = self._stack.enter_context(sampling_bar(trainer, self.requests, "images"))

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: object) -> None:
        generated = cast(Generated, outputs)
        labels, captions = (generated["condition"].get(name) for name in ("label", "caption"))
        texts = None if captions is None else decode_text(captions)
        for row, index in enumerate(generated["index"].tolist()):
            if index < self.requests.num_images:
                text = PngImagePlugin.PngInfo()
                if labels is not None:
                    text.add_text("label", str(int(labels[row])))
                if texts is not None:
                    text.add_itxt("caption", texts[row])
                    self.path(index).with_suffix(".txt").write_text(texts[row] + "\n")
                to_pil(generated["image"][row]).save(self.path(index), pnginfo=text)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stack.close()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stack.close()
        trainer.strategy.barrier("image_writer")
        if trainer.is_global_zero:
            self._gather(getattr(pl_module, "class_names", None))
            if self.animate is not None and isinstance(pl_module, Generator):
                self._animate(pl_module, self.animate)

    def _animate(self, generator: Generator, show: Literal["x0", "x_t"]) -> None:
        request = self.requests[0]
        count = min(self.requests.num_images, ANIMATED, len(request["index"]))
        condition = {name: value[:count] for name, value in request["condition"].items()}
        with generator.averaged_weights():
            frames = generator.trajectory(
                request["index"][:count].tolist(), request["seed"], show, condition=condition or None
            )
        path = self.directory.with_name(f"{self.directory.name}_animation.png")
        save_animation([tile(to_uint8(frame)) for frame in frames], path)
        rank_zero_info(str(path))

    def _gather(self, class_names: Sequence[str] | None) -> None:
        images, labels = [], []
        for index in range(self.requests.num_images):
            with Image.open(self.path(index)) as image:
                images.append(np.atleast_3d(np.asarray(image)))
                labels.append(image.info.get("label"))
                if not self.npz and len(images) == GRID:
                    break
        stacked = np.stack(images)
        shown = torch.from_numpy(stacked[:GRID].transpose(0, 3, 1, 2).copy())
        grid, npz = (self.directory.with_name(self.directory.name + end) for end in ("_grid.png", ".npz"))
        classes = [] if self.columns is None else [int(label) for label in labels[: GRID : self.columns] if label]
        names = dict(enumerate(class_names or ()))
        rows = [names.get(label, str(label)) for label in classes]
        save_png(tile(shown, self.columns, rows=[row[:LONGEST] for row in rows]), grid)
        made = f"{self.requests.num_images} images; {grid}"
        if self.npz:
            arrays = {"arr_0": stacked}
            if None not in labels:
                arrays["arr_1"] = np.array([int(label) for label in labels if label is not None])
            with whole_file(npz) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            made += f"; {npz}"
        rank_zero_info(f"{self.directory}: {made}")
