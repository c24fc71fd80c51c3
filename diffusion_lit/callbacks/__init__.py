"""What happens beside the training step."""

from diffusion_lit.callbacks.changes import ChangedOptions
from diffusion_lit.callbacks.checkpoints import Checkpoints
from diffusion_lit.callbacks.ema import EMA
from diffusion_lit.callbacks.image_writer import ImageWriter
from diffusion_lit.callbacks.plots import Plots
from diffusion_lit.callbacks.progress import ProgressBar, Report, counting_bar, sampling_bar
from diffusion_lit.callbacks.sample_grid import SampleGrid
from diffusion_lit.callbacks.scalars import Scalars

__all__ = [
    "EMA",
    "ChangedOptions",
    "Checkpoints",
    "ImageWriter",
    "Plots",
    "ProgressBar",
    "Report",
    "SampleGrid",
    "Scalars",
    "counting_bar",
    "sampling_bar",
]
