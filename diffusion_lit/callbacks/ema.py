"""Exponential moving averages of the weights."""

from collections.abc import Sequence

import lightning.pytorch as L

from diffusion_lit.averaging import WeightAverages
from diffusion_lit.module import AVERAGED, DiffusionModule


class EMA(L.Callback):
    """Averages the trainable parameters after every optimiser step.

    Everything that looks at the model, `DiffusionModule.averaged_weights` apart, sees the raw weights; checkpoints
    hold both.

    Args:
        decays: One average each; the first stands for the model in samples, scores and checkpoints.
        warmup: Whether the decay starts low, for short runs.

    Source: Ho et al. 2020, appendix B (decay 0.9999, no warm-up).
    """

    def __init__(self, decays: Sequence[float] = (0.9999,), warmup: bool = False) -> None:
        self.decays = list(decays)
        self.warmup = warmup

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, DiffusionModule):
            return
        pl_module.load_weights = AVERAGED
        pl_module.averages = WeightAverages(pl_module, self.decays, self.warmup)
        if pl_module.restored_averages is not None:
            pl_module.averages.load_state_dict(**pl_module.restored_averages)
            pl_module.restored_averages = None
