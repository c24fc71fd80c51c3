"""25 Gaussians on a grid in the plane: a denoising diffusion GAN, a one-step GAN and DDPM, with one network and budget.

    python -m benchmarks.modes                  four minutes or so on one core; writes a picture and a table

Xiao et al. 2022, section 5.3, has the same data with a standard deviation of 0.05 and longer training.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from diffusion_lit.callbacks import EMA
from diffusion_lit.diffusion import Ancestral, DiscreteProcess, FixedSmall, IntegratedLinear
from diffusion_lit.generator import Generator
from diffusion_lit.methods.ddgan import DDGAN
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import Discriminator
from diffusion_lit.networks.layers import sinusoidal_embedding
from diffusion_lit.networks.ncsnpp import LATENT
from diffusion_lit.trainer import Trainer
from diffusion_lit.types import Condition, Network

SPACING, STD, BATCH, WIDTH = 2.0, 0.2, 256, 128
SAMPLES = 10_000
TIMES = 16
"""Length of the embedding of the time."""
FEATURES = 14
COVERED = SAMPLES // 50
"""Samples near a mode from which on it counts as covered: half of its share; points spread evenly have a quarter."""


def centers() -> Tensor:
    """The 25 means, (25, 2)."""
    ticks = SPACING * torch.arange(-2.0, 3.0)
    return torch.cartesian_prod(ticks, ticks)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Three hidden layers of one width."""
    layers: list[nn.Module] = []
    for width in (inputs, WIDTH, WIDTH):
        layers += [nn.Linear(width, WIDTH), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs))


def features(x: Tensor) -> Tensor:
    """Points, (B, 2, 1, 1), and waves of them, (B, 14): plain coordinates make small networks learn slowly."""
    flat = x.flatten(1)
    waves = torch.cat([frequency * flat for frequency in (1.0, 2.0, 4.0)], dim=1)
    return torch.cat([flat, waves.sin(), waves.cos()], dim=1)


class PointNetwork(Network):
    """The network of all three methods: x_t, the time and, if there is any, a latent variable, in; two numbers out.

    Args:
        latent_size: Length of the latent variable, which DDPM does not have.
    """

    def __init__(self, latent_size: int = 0) -> None:
        super().__init__()
        self.image_size, self.in_channels, self.latent_size = 1, 2, latent_size
        self.layers = mlp(FEATURES + TIMES + latent_size, 2)

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        """x: (B, 2, 1, 1). Returns the same shape."""
        inputs = [features(x), sinusoidal_embedding(time, TIMES)]
        if self.latent_size:
            inputs.append((condition or {})[LATENT])
        return cast(Tensor, self.layers(torch.cat(inputs, dim=1))[:, :, None, None])


class PointDiscriminator(Discriminator):
    """The discriminator of the GANs."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.in_channels = 1, 2
        self.layers = mlp(2 * FEATURES + TIMES, 1)

    def forward(self, x_s: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """See `Discriminator.forward`."""
        inputs = [features(x_s), features(x_t), sinusoidal_embedding(time, TIMES)]
        return cast(Tensor, self.layers(torch.cat(inputs, dim=1)).squeeze(1))


class Points(IterableDataset[dict[str, Tensor]]):
    """Endless batches of points, {"image": (B, 2, 1, 1)}."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            mode = torch.randint(25, (BATCH,), generator=generator)
            points = centers()[mode] + STD * torch.randn(BATCH, 2, generator=generator)
            yield {"image": points[:, :, None, None]}


class PointData(L.LightningDataModule):
    """The data set of `Points`."""

    image_shape = (2, 1, 1)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless, without epochs."""
        return DataLoader(Points(), batch_size=None)


def adam(parameters: Any) -> torch.optim.Optimizer:
    """The optimiser of both networks of a GAN."""
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.9))


def gan(steps: int, training_steps: int) -> DDGAN:
    """A denoising diffusion GAN; of one step it is a plain GAN."""
    torch.manual_seed(0)

    def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training_steps, eta_min=1e-5)

    process = DiscreteProcess(steps, IntegratedLinear())
    return DDGAN(
        PointNetwork(latent_size=2),
        PointDiscriminator(),
        process,
        r1_gamma=0.1,
        r1_every=1,
        optimizer=adam,
        lr_scheduler=cosine,
        discriminator_optimizer=adam,
        discriminator_lr_scheduler=cosine,
    )


def ddpm() -> DiffusionModule:
    """DDPM, with the paper's chain of 1,000 steps."""
    torch.manual_seed(0)
    return DiffusionModule(PointNetwork(), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3), sampler=ancestral(None))


def ancestral(steps: int | None) -> Ancestral:
    """Ancestral sampling in so many steps; None: all of the chain."""
    return Ancestral(steps, FixedSmall(), clip=False)


def train(system: Generator, steps: int, place: Path) -> float:
    """Trains a system; returns seconds."""
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[EMA([0.998])],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=str(place),
    )
    start = time.perf_counter()
    trainer.fit(system, PointData())
    return time.perf_counter() - start


def measure(points: Tensor) -> dict[str, float]:
    """What is reported of samples, (N, 2).

    A mode counts as covered if at least half of its share of the samples lie within 3 standard deviations of it. Of the
    data themselves 98.9 % lie within 3 standard deviations of a mode.
    """
    distance, mode = torch.cdist(points, centers()).min(1)
    near = distance < 3 * STD
    count = torch.bincount(mode[near], minlength=25)
    inside = points[near] - centers()[mode[near]]
    return {
        "modes": int((count >= COVERED).sum()),
        "within 3 std": float(near.float().mean()),
        "std": float(inside.std()) if len(inside) > 1 else float("nan"),
    }


def draw(found: dict[str, Tensor], path: Path) -> None:
    """Draws each set of samples beside the data."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(3 * len(found), 3.5), sharex=True, sharey=True)
    for axis, (name, points) in zip(np.atleast_1d(axes), found.items(), strict=True):
        x, y = points[:4000].unbind(1)
        axis.scatter(x, y, s=1, alpha=0.3, linewidths=0)
        axis.set(title=name, xlim=(-6, 6), ylim=(-6, 6), aspect="equal", xticks=[], yticks=[])
    figure.tight_layout(pad=1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def samples(system: Generator, sampler: Ancestral | None = None) -> Tensor:
    """Samples with the averaged weights, (N, 2)."""
    with system.averaged_weights():
        return system.sample(range(SAMPLES), sampler=sampler).flatten(1).cpu()


def main() -> None:
    """Trains, samples, measures and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000, help="training steps of each method")
    parser.add_argument("--out", type=Path, default=Path("runs/modes"))
    options = parser.parse_args()
    batches = iter(Points())
    found: dict[str, Tensor] = {}
    found["data"] = torch.cat([next(batches)["image"].flatten(1) for _ in range(40)])[:SAMPLES]
    seconds: dict[str, float] = {}
    for name, system in (("DDGAN, 4 steps", gan(4, options.steps)), ("GAN, 1 step", gan(1, options.steps))):
        seconds[name] = train(system, options.steps, options.out)
        found[name] = samples(system)
    plain = ddpm()
    spent = train(plain, options.steps, options.out)
    for count in (4, 50, 1000):
        seconds[f"DDPM, {count} steps"] = spent
        found[f"DDPM, {count} steps"] = samples(plain, ancestral(count))
    rows = {name: {**measure(points), "seconds": seconds.get(name)} for name, points in found.items()}
    draw(found, options.out / "modes.png")
    (options.out / "modes.json").write_text(json.dumps({"training_steps": options.steps, "rows": rows}, indent=1))
    for name, row in rows.items():
        print(f"{name:18} {row['modes']:3} of 25 modes, {row['within 3 std']:.1%} within 3 std, std {row['std']:.3f}")


if __name__ == "__main__":
    main()
