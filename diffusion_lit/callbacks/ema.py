"""Exponential moving averages of the weights."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L

from diffusion_lit.averaging import WeightAverages
from diffusion_lit.system import System


class EMA(L.Callback):
    """Averages the parameters that `System.averaged_names` names, after every optimiser step.

    Only what runs inside `System.averaged_weights` sees an average; checkpoints hold raw and averaged weights.

    Args:
        decays: One average each; the first stands for the model in samples, scores and checkpoints.
        warmup: Whether the decay starts low, for short runs.

    Source: Ho et al. 2020, appendix B (decay 0.9999, no warm-up).
    """

    def __init__(self, decays: Sequence[float] = (0.9999,), warmup: bool = False) -> None:
        self.decays = list(decays)
        self.warmup = warmup
        self._restored: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get("averages")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not earlier: now the module is on its device.
        if not isinstance(pl_module, System):
            return
        pl_module.averages = WeightAverages(pl_module, self.decays, self.warmup, pl_module.averaged_names())
        if self._restored is not None:
            pl_module.averages.load_state_dict(self._restored, self._restored["primary"])
            self._restored = None
