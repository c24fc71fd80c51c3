"""The variational bound in `test`: bits per dimension of real images, over all processes."""

import csv
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from diffusion_lit.data import ImageData
from diffusion_lit.data.dataset import Split
from diffusion_lit.diffusion import DiscreteProcess, FixedLarge, Process, ReverseVariance
from diffusion_lit.diffusion.likelihood import Bound, bits_per_dim
from diffusion_lit.evaluation.measure import Record, measure
from diffusion_lit.images import from_uint8
from diffusion_lit.lightning import log_gathered
from diffusion_lit.memory import in_memory, shift_steps
from diffusion_lit.module import DiffusionModule
from diffusion_lit.records import NonFinite, describe
from diffusion_lit.requests import Requests
from diffusion_lit.types import StepFn


class Likelihood(L.Callback):
    """Bounds -log2 p(x_0) / D of real images in `test`, with its parts and its curve over t.

    The parts: `prior` L_T, `terms` L_1 + ... + L_{T-1}, `decoder` L_0. The curve goes to <run>/bits_per_dim_<split>.csv
    and .png, everything else to a line of <run>/results.jsonl. Images are not flipped; the noise of image i depends on
    (seed, i) alone; what was done when a run stopped is not done again.

    Args:
        split: "test" or "train"; null: the bound is not computed.
        num_images: The first so many images; null: all.
        num_terms: Terms evaluated for each image, of the T - 1 there are: an unbiased estimate for long chains; null:
            all.
        batch_size: Images at once by each process.
        variance: The reverse variance; null: the sampler's own if it has one, else `FixedLarge`.
        clip: Whether predictions of x_0 are clipped to [-1, 1]; the paper's code does.
        seed: Decides the noise.

    Raises:
        ValueError: If a number is out of range, or there is no such split.

    Source: Ho et al. 2020, eqs. 5 and 13.
    """

    def __init__(
        self,
        split: Split | None = None,
        num_images: int | None = None,
        num_terms: int | None = None,
        batch_size: int = 64,
        variance: ReverseVariance | None = None,
        clip: bool = True,
        seed: int = 0,
    ) -> None:
        for name, value in (("num_images", num_images), ("num_terms", num_terms)):
            if value is not None and value < 1:
                raise ValueError(f"likelihood.{name}={value} must be at least 1")
        Requests(1, batch_size, seed=seed, section="likelihood")
        self.split = split
        self.num_images = num_images
        self.num_terms = num_terms
        self.batch_size = batch_size
        self.variance = variance
        self.clip = clip
        self.seed = seed
        self._at_once = batch_size

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raises ValueError if there are no such images, or the process has no such terms."""
        if stage != "test" or self.split is None:
            return
        if not isinstance(pl_module, DiffusionModule):
            raise ValueError(f"likelihood: a {type(pl_module).__name__} has no likelihood; leave likelihood.split out")
        image_data(trainer).dataset(self.split)
        terms = chain(pl_module.process).num_steps - 1
        if not pl_module.codec.bounded:
            raise ValueError("likelihood: the bound is of pixels, and the model diffuses latents")
        if self.num_terms is not None and self.num_terms > terms:
            raise ValueError(f"likelihood.num_terms={self.num_terms} exceeds the {terms} terms of the process")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.split is not None and isinstance(pl_module, DiffusionModule):
            for name, value in self.evaluate(trainer, pl_module, self.split)["scores"].items():
                log_gathered(pl_module, name, value)

    def evaluate(self, trainer: L.Trainer, module: DiffusionModule, split: Split) -> Record:
        """Computes the bound and puts it on record; collective.

        Returns:
            The record, the same on every process; its "scores" are the values by name.
        """
        data = image_data(trainer)
        images = data.dataset(split)
        count = min(self.num_images or len(images), len(images))
        requests = Requests(count, min(self.batch_size, count), seed=self.seed)
        variance = self.variance or getattr(module.sampler, "variance", None) or FixedLarge()
        num_steps = chain(module.process).num_steps
        described = {name: value for name, value in module.described(module.sampler).items() if name != "sampler"}
        key = {
            **described,
            "variance": describe(variance),
            "clip": self.clip,
            "num_terms": self.num_terms,
            "images": [images.name, images.fingerprint()],
            # The last batch is not filled up, so that what is kept of it depends on the number of images.
            "num_images": count,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "precision": str(trainer.precision),
        }

        def work(batch: int, on_step: StepFn) -> dict[str, Tensor]:
            indices = range(batch * requests.batch_size, min((batch + 1) * requests.batch_size, count))
            return self._bound(module, data, split, list(indices), variance, on_step)

        def finish(columns: Mapping[str, Tensor]) -> Record:
            path = Path(trainer.default_root_dir) / f"bits_per_dim_{split}"
            write_curve(curve_of(columns["sums"].sum(0), columns["counts"].sum(0)), num_steps, path)
            return {
                "scores": {f"{split}/{part}": value for part, value in parts_of(columns).items()},
                "num_images": len(columns["total"]),
                "evaluations": (num_steps - 1 if self.num_terms is None else self.num_terms) + 1,
                "curve": f"{path.name}.csv",
            }

        with module.averaged_weights():
            record = measure(trainer, module, "likelihood", key, {}, requests, work, finish)
        value = record["scores"][f"{split}/bits_per_dim"]
        rank_zero_info(f"{split}: {value:.4f} bits/dim over {record['num_images']:,} images")
        return record

    def _bound(
        self,
        module: DiffusionModule,
        data: ImageData,
        split: Split,
        indices: list[int],
        variance: ReverseVariance,
        on_step: StepFn,
    ) -> dict[str, Tensor]:
        batch = data.some(indices, split)
        x0 = from_uint8(batch["image"].to(module.device))
        condition = {"label": batch["label"]} if "label" in batch and module.num_classes is not None else {}
        process = chain(module.process)

        def work(chosen: slice, part: int, num_parts: int) -> dict[str, Tensor]:
            bound = bits_per_dim(
                module.bind({name: value[chosen] for name, value in condition.items()}),
                x0[chosen],
                process,
                variance,
                module.noise(indices[: len(x0)][chosen], self.seed).draw,
                self.num_terms,
                self.clip,
                shift_steps(on_step, part, num_parts),
            )
            values = {"total": bound.total, "prior": bound.prior, "decoder": bound.decoder}
            return {**values, **sums_by_entry(bound, process.num_steps)}

        with module.evaluating():
            parts, self._at_once = in_memory(work, len(x0), self._at_once, "in the likelihood")
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        wrong = [
            str(index) for index, value in zip(indices, found["total"].tolist(), strict=False) if not isfinite(value)
        ]
        if wrong:
            raise NonFinite(
                f"the bits per dimension of {len(wrong)} {split} images are not finite, first of image {wrong[0]}: the "
                "model has diverged, or its variance has"
            )
        return found


def image_data(trainer: L.Trainer) -> ImageData:
    """The trainer's data; raises ValueError if they are no images of ours."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageData):
        raise ValueError("bits per dimension are of real images: give --data")
    return data


def chain(process: Process) -> DiscreteProcess:
    """The process, which must be a chain; raises ValueError if it is not."""
    if not isinstance(process, DiscreteProcess):
        raise ValueError(
            f"likelihood: {type(process).__name__} is no chain of steps, over which the bound is a sum; "
            "leave likelihood.split out"
        )
    return process


def parts_of(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """The bound and its parts, bits per dimension, over all images."""
    total = columns["total"]
    parts: dict[str, Any] = {
        "bits_per_dim": total.mean(),
        "bits_per_dim_prior": columns["prior"].mean(),
        "bits_per_dim_terms": (total - columns["prior"] - columns["decoder"]).mean(),
        "bits_per_dim_decoder": columns["decoder"].mean(),
    }
    if len(total) > 1:
        parts["bits_per_dim_standard_error"] = total.std() / len(total) ** 0.5
    return {name: float(value) for name, value in parts.items()}


def sums_by_entry(bound: Bound, num_steps: int) -> dict[str, Tensor]:
    """A batch's terms added up by table entry k, L_0 at 1 and L_{k-1} from 2 on: "sums" and "counts", (1, T + 1)."""
    ks = torch.cat([torch.ones_like(bound.ks[:, :1]), bound.ks], dim=1).flatten()
    terms = torch.cat([bound.decoder[:, None], bound.terms], dim=1).flatten()
    nothing = torch.zeros(num_steps + 1, dtype=terms.dtype, device=terms.device)
    return {
        "sums": nothing.index_add(0, ks, terms)[None],
        "counts": nothing.index_add(0, ks, torch.ones_like(terms))[None],
    }


def curve_of(sums: Tensor, counts: Tensor) -> dict[int, float]:
    """The mean term at each table entry k that was evaluated, bits per dimension."""
    return {int(k): float(sums[k] / counts[k]) for k in counts.nonzero().flatten()}


def write_curve(curve: Mapping[int, float], num_steps: int, path: Path) -> None:
    """Writes the terms over t as <path>.csv and draws them as <path>.png."""
    from matplotlib.figure import Figure

    times = [k / num_steps for k in curve]
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["k", "t", "bits_per_dim"])
        writer.writerows(zip(curve, times, curve.values(), strict=True))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(times, list(curve.values()), marker="." if len(curve) < 100 else None)
    axes.set(xlabel="t", ylabel="bits per dimension of one step", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path.with_suffix(".png"), dpi=110)
