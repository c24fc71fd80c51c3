"""Exponential moving averages of the weights."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info

from diffusion_lit.averaging import HalfLife, WeightAverages
from diffusion_lit.system import System

NOTABLE = 0.1
"""Share of the first weights in an average above which a run says so."""


class EMA(L.Callback):
    """Averages the parameters that `System.averaged_names` names, after every optimiser step.

    Only what runs inside `System.averaged_weights` sees an average; checkpoints hold raw and averaged weights.

    Args:
        decays: One average each; the first average stands for the model in samples, scores and checkpoints.
        warmup: Whether these decays start low, for short runs.
        half_lives: Further averages, by the half-life of their memory in training images; with `decays` empty the first
            of these stands for the model. Their names are such as 500000_images.
        ramp_up: The most that a half-life may be of the images seen so far, above 0; null: no limit.

    Raises:
        ValueError: If a half-life or `ramp_up` is not above 0; while training, if there are no averages at all, or
            half-lives with data of unknown batch size.

    Source: Ho et al. 2020, appendix B (decay 0.9999, no warm-up); Karras et al. 2022 (EDM), for half-lives.
    """

    def __init__(
        self,
        decays: Sequence[float] = (0.9999,),
        warmup: bool = False,
        half_lives: Sequence[float] = (),
        ramp_up: float | None = 0.05,
    ) -> None:
        if not all(h > 0 for h in half_lives) or (ramp_up is not None and not ramp_up > 0):
            raise ValueError(
                f"ema: half_lives={list(half_lives)}, in images, and ramp_up={ramp_up} must be above 0; EDM uses "
                "[500000] and 0.05 for CIFAR-10"
            )
        self.decays = list(decays)
        self.warmup = warmup
        self.half_lives = list(half_lives)
        self.ramp_up = ramp_up
        self._restored: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get("averages")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not earlier: now the module is on its device.
        if not isinstance(pl_module, System):
            return
        decays: list[float | HalfLife] = [*self.decays, *self._by_images(trainer)]
        pl_module.averages = WeightAverages(pl_module, decays, self.warmup, pl_module.averaged_names())
        share = self.start_share(trainer.max_steps)
        if share > NOTABLE:
            rank_zero_info(
                f"ema: after the {trainer.max_steps} steps of this run the average of decay {self.decays[0]}, which "
                f"stands for the model, still holds {share:.0%} of the weights that it starts from; lower "
                "--ema.decays, set --ema.warmup true, or --ema null"
            )
        if self._restored is not None:
            pl_module.averages.load_state_dict(self._restored, self._restored["primary"])
            self._restored = None

    def start_share(self, steps: int) -> float:
        """How much of the first weights the primary average holds after so many steps; -1: of a run without end."""
        if steps < 0 or self.warmup or not self.decays:
            return 0.0
        return float(self.decays[0] ** steps)

    def _by_images(self, trainer: L.Trainer) -> list[HalfLife]:
        if not self.half_lives:
            return []
        batch_size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        if batch_size is None:
            raise ValueError(
                "ema.half_lives are counted in images, but the data have no batch_size, the images of one optimiser "
                "step; give ema.decays instead"
            )
        return [HalfLife(images, batch_size, self.ramp_up) for images in self.half_lives]
