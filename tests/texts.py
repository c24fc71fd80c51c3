"""A small model of texts on the captioned digits: what tests of texts share."""

from pathlib import Path
from typing import Any

import torch

from diffusion_lit.callbacks import EMA, Checkpoints, SampleGrid, Scalars
from diffusion_lit.conditioners import Text
from diffusion_lit.data import CaptionedDigits, ImageData
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet, TextEncoder
from tests import tiny

STEPS = 6
LENGTH = 16
PROMPTS = ["a bold three", "the digit 7", ""]


def network(context_width: int = 16) -> ADMUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ADMUNet(
            image_size=8,
            in_channels=1,
            width=16,
            multipliers=[1, 2],
            num_blocks=1,
            attention=[4],
            head_channels=8,
            num_groups=8,
            context_width=context_width,
        )


def conditioner(**kwargs: Any) -> Text:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = TextEncoder(vocabulary=250, length=LENGTH, width=16, depth=1, num_heads=2, head_channels=8)
        return Text(encoder, **{"dropout": 0.3, **kwargs})


def module(**kwargs: Any) -> DiffusionModule:
    return tiny.module(**{"network": network(), "conditioner": conditioner(), **kwargs})


def data(**kwargs: Any) -> ImageData:
    return ImageData(CaptionedDigits(), **{"batch_size": 32, "eval_batch_size": 600, **kwargs})


def learned() -> Text:
    found = conditioner()
    found.start(data(), torch.device("cpu"))
    return found.eval()


def run(place: Path, max_steps: int = STEPS, **kwargs: Any) -> DiffusionModule:
    """Trains with averages and a grid, or continues the run that is there."""
    system = module()
    callbacks = [
        EMA([0.9, 0.5]),
        Scalars(),
        SampleGrid(3, num_images=4, batch_size=4, sampler=None),
        Checkpoints(every_n_steps=2),
    ]
    tiny.trainer(place, max_steps, callbacks, **kwargs).fit(system, data(), ckpt_path="last")
    return system


def loaded(trained: Path, **kwargs: Any) -> DiffusionModule:
    system = module(**kwargs)
    system.load(tiny.load(tiny.last(trained)))
    return system
