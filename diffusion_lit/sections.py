"""The sections of a configuration that a checkpoint carries."""

from lightning.pytorch import Callback, LightningDataModule

from diffusion_lit.callbacks import EMA, Checkpoints, SampleGrid
from diffusion_lit.data import ImageData
from diffusion_lit.evaluation import Evaluation, Likelihood
from diffusion_lit.module import DiffusionModule
from diffusion_lit.parts import Slot
from diffusion_lit.system import System
from diffusion_lit.weights import SEED

__all__ = ["CARRIED", "SECTIONS", "SEED", "WRITTEN"]

SECTIONS: dict[str, type[Callback]] = {
    "ema": EMA,
    "sample_grid": SampleGrid,
    "evaluation": Evaluation,
    "likelihood": Likelihood,
    "checkpoints": Checkpoints,
}
"""Our callbacks, each a section of the configuration; `--ema null` switches one off."""
CARRIED: dict[str, Slot] = {
    SEED: Slot(int),
    "model": Slot(System, implied=DiffusionModule),
    "data": Slot(LightningDataModule, implied=ImageData),
    **{section: Slot(callback, fixed=True) for section, callback in SECTIONS.items()},
}
"""All sections that a checkpoint carries, and what each takes."""
WRITTEN: dict[str, tuple[str, ...]] = {"evaluation": ("cache_dir",)}
"""Arguments, by section, that say where files are written: a checkpoint that somebody else made has no say in that."""
