"""Systems of every kind, small, on the digits: for the tests that all of them pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion_lit.diffusion import DDIM, CosineProcess, DiscreteProcess, IntegratedLinear, LogNormal, Trailing, V
from diffusion_lit.generator import Generator
from diffusion_lit.methods.autoencoder.losses import Adversarial, ReconstructionLoss
from diffusion_lit.methods.autoencoder.module import AutoencoderModule
from diffusion_lit.methods.consistency import (
    Boundary,
    ConsistencyDistillation,
    ConsistencyTraining,
    Doubling,
    Fixed,
    Multistep,
    Neighbors,
)
from diffusion_lit.methods.ddgan import DDGAN
from diffusion_lit.methods.progressive_distillation import LinearByStage, ProgressiveDistillation
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import (
    Autoencoder,
    DiagonalGaussian,
    NCSNpp,
    PairDiscriminator,
    PatchGAN,
    Regularizer,
    VectorQuantizer,
)
from tests import tiny

NETWORK = {
    "image_size": 8,
    "in_channels": 1,
    "width": 16,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention": [4],
    "dropout": 0.1,
    "num_groups": 8,
}
NCSNPP: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 1,
    "width": 8,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention": [],
    "dropout": 0.1,
    "latent_size": 5,
    "latent_width": 8,
}
TEACHER = {
    "class_path": "diffusion_lit.module.DiffusionModule",
    "init_args": {
        "network": {"class_path": "diffusion_lit.networks.UNet", "init_args": NETWORK},
        "process": {"class_path": "diffusion_lit.diffusion.CosineProcess"},
        "parameterization": {"class_path": "diffusion_lit.diffusion.V"},
    },
}
"""The configuration of the module of `teacher`."""


def teacher(place: Path) -> Path:
    """Trains a teacher for two steps; returns its checkpoint, with the configuration that the command line adds."""
    system = tiny.module(process=CosineProcess(), parameterization=V())
    system.config = {"model": TEACHER}
    tiny.trainer(place, 2).fit(system, tiny.data())
    return tiny.last(place)


def student(path: Path, stages: Any = (2, 2, 2), **kwargs: Any) -> DiffusionModule:
    """A student of the teacher at a path, by default of 4, 2 and 1 steps for two training steps each."""
    parts: dict[str, Any] = {
        "process": CosineProcess(),
        "parameterization": V(),
        "sampler": DDIM(1, grid=Trailing()),
        "objective": ProgressiveDistillation(str(path), stages),
        "lr_scheduler": lambda optimizer: LinearByStage(optimizer, stages),
    }
    return tiny.module(**{**parts, **kwargs})


def consistency(objective: ConsistencyTraining, **kwargs: Any) -> DiffusionModule:
    """A consistency model on the process of the teacher."""
    parts: dict[str, Any] = {
        "process": CosineProcess(),
        "parameterization": Boundary(0.75),
        "sampler": Multistep(2),
        "objective": objective,
    }
    return tiny.module(**{**parts, **kwargs})


def adam(parameters: Any) -> torch.optim.Optimizer:
    """The optimiser of both networks of a GAN."""
    return torch.optim.Adam(parameters, lr=2e-3, betas=(0.5, 0.9))


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of both networks of a GAN."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-5)


def ddgan(kind: type[DDGAN] = DDGAN, **kwargs: Any) -> DDGAN:
    """A denoising diffusion GAN of four steps, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "network": NCSNpp(
                8,
                1,
                width=8,
                multipliers=[1, 2],
                num_blocks=1,
                attention=[],
                dropout=0.1,
                latent_size=5,
                latent_width=8,
            ),
            "discriminator": PairDiscriminator(8, 1, widths=[8, 8, 8], time_width=8),
            "process": DiscreteProcess(4, IntegratedLinear()),
            "optimizer": adam,
            "discriminator_optimizer": adam,
            "lr_scheduler": cosine,
            "discriminator_lr_scheduler": cosine,
            "r1_every": 2,
            "seed": 3,
        }
    return kind(**{**parts, **kwargs})


def autoencoder(
    regularizer: Regularizer | None = None,
    normalization: Literal["batch", "group"] = "batch",
    kind: type[AutoencoderModule] = AutoencoderModule,
    **kwargs: Any,
) -> AutoencoderModule:
    """A KL autoencoder with a discriminator from the third step on, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "network": Autoencoder(
                8,
                1,
                latent_channels=2,
                width=8,
                multipliers=[1, 2],
                num_blocks=1,
                num_groups=4,
                dropout=0.1 if normalization == "batch" else 0.0,
                regularizer=regularizer or DiagonalGaussian(),
            ),
            "loss": ReconstructionLoss("sum", 1e-3, perceptual=None),
            "adversarial": Adversarial(PatchGAN(1, 8, 1, normalization, 4), start=2),
            "optimizer": adam,
            "discriminator_optimizer": adam,
            "lr_scheduler": cosine,
            "discriminator_lr_scheduler": cosine,
            "seed": 3,
        }
    return kind(**{**parts, **kwargs})


def vq(**kwargs: Any) -> AutoencoderModule:
    """Like `autoencoder`, with a codebook and losses that are means."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return autoencoder(VectorQuantizer(16), **{"loss": ReconstructionLoss("mean", 1.0, None), **kwargs})


GENERATORS: dict[str, Callable[[Path], Generator]] = {
    "diffusion": lambda path: tiny.module(),
    "progressive distillation": lambda path: student(path),
    "consistency distillation": lambda path: consistency(
        ConsistencyDistillation(str(path), Neighbors(Fixed(6)), decay=0.95)
    ),
    "consistency training": lambda path: consistency(
        ConsistencyTraining(Neighbors(Doubling(2, 8, 6), noise=LogNormal(-1.1, 2.0)))
    ),
    "denoising diffusion GAN": lambda path: ddgan(),
    "KL autoencoder": lambda path: autoencoder(),
    "VQ autoencoder": lambda path: vq(),
}
"""Each makes a system; it is given the path of a teacher, for those that have one."""
