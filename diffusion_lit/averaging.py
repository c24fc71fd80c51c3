"""Averages of a module's weights over training, and one way to put them to use."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HalfLife:
    """The decay of an average whose memory is counted in training images.

    It is 0.5^(batch_size / h) with h = min(images, ramp_up n), n the images seen before the step.

    Attributes:
        images: The half-life, in images.
        batch_size: Images per optimiser step.
        ramp_up: Fraction of the images seen so far; None: no limit.

    Source: Karras et al. 2022 (EDM), appendix F.2 and its code.
    """

    images: float
    batch_size: int
    ramp_up: float | None = 0.05

    def __call__(self, seen: int) -> float:
        """Returns the decay of an update after so many images."""
        images = self.images if self.ramp_up is None else min(self.images, self.ramp_up * seen)
        return 0.0 if images == 0 else float(0.5 ** (self.batch_size / images))

    def __str__(self) -> str:
        return f"{self.images:.12g}_images"


class WeightAverages:
    """Exponential moving averages of trainable parameters, and of nothing else.

    A decay is also the name of its average, as `str(decay)`; the first is the primary one.

    Args:
        module: Has the parameters.
        decays: One average for each: a number in [0, 1), or a `HalfLife`.
        warmup: Whether a decay that is a number starts low, min(decay, (1 + n) / (10 + n)) at the n-th update, so that
            short runs do not keep their random start.
        names: The parameters to average; None: all trainable ones.

    Raises:
        ValueError: If there is no decay, or one outside [0, 1).
    """

    def __init__(
        self,
        module: nn.Module,
        decays: Sequence[float | HalfLife],
        warmup: bool = False,
        names: Iterable[str] | None = None,
    ) -> None:
        numbers = [d for d in decays if not isinstance(d, HalfLife)]
        if not decays or not all(0 <= d < 1 for d in numbers) or len(set(decays)) < len(decays):
            raise ValueError(f"ema.decays={numbers} must be distinct values in [0, 1); DDPM uses [0.9999]")
        self.decays = list(decays)
        self.warmup = warmup
        self.num_updates = 0
        # Where some are counted in images.
        self._batch_size = next((d.batch_size for d in decays if isinstance(d, HalfLife)), 0)
        self._images = 0
        trainable = [name for name, p in module.named_parameters() if p.requires_grad]
        self._names = trainable if names is None else [name for name in trainable if name in set(names)]
        self._averages = {str(d): self._snapshot(module) for d in decays}
        self._raw: list[Tensor] | None = None
        self._active: str | None = None

    @property
    def primary(self) -> str:
        """The name of the average that stands for the model."""
        return str(self.decays[0])

    @property
    def active(self) -> str | None:
        """The name of the average that the module holds at the moment; None while it holds its own weights."""
        return self._active

    def _parameters(self, module: nn.Module) -> list[Tensor]:
        # By `get_parameter`, name by name, this would take milliseconds of every step.
        parameters = dict(module.named_parameters())
        return [parameters[name] for name in self._names]

    def _snapshot(self, module: nn.Module) -> list[Tensor]:
        return [p.detach().clone().float() for p in self._parameters(module)]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves every average towards the module's weights; once per optimiser step."""
        self.num_updates += 1
        parameters = [p.detach().float() for p in self._parameters(module)]
        for decay in self.decays:
            torch._foreach_lerp_(self._averages[str(decay)], parameters, 1 - self._now(decay))
        self._images += self._batch_size

    def _now(self, decay: float | HalfLife) -> float:
        """The decay of the newest update."""
        n = self.num_updates
        if isinstance(decay, HalfLife):
            return decay(self._images)
        return min(decay, (1 + n) / (10 + n)) if self.warmup else decay

    @contextmanager
    def swapped(self, module: nn.Module, name: str | None = None) -> Iterator[None]:
        """The module holds an average inside this context and its own weights after it, whatever happens.

        Args:
            module: The module that is being averaged.
            name: Which average; the primary one by default.

        Raises:
            KeyError: If there is no such average.
            RuntimeError: If an average is active already: contexts do not nest.
        """
        if self._active is not None:
            raise RuntimeError(f"the average {self._active} is active already: leave that context first")
        name = name or self.primary
        average = self._averages[name]
        parameters = self._parameters(module)
        with torch.no_grad():
            self._raw = [p.detach().clone() for p in parameters]
            torch._foreach_copy_(parameters, average)
        self._active = name
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, self._raw)
            self._raw = self._active = None

    def average(self, name: str | None = None) -> dict[str, Tensor]:
        """One average by parameter name, float32."""
        return dict(zip(self._names, self._averages[name or self.primary], strict=True))

    def raw(self, module: nn.Module) -> dict[str, Tensor]:
        """The weights that training goes on from, whatever the module holds at this moment."""
        values = self._parameters(module) if self._raw is None else self._raw
        return {name: value.detach() for name, value in zip(self._names, values, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the primary average, which is its `state_dict`."""
        return {
            "decays": [str(d) if isinstance(d, HalfLife) else d for d in self.decays],
            "warmup": self.warmup,
            "num_updates": self.num_updates,
            "images": self._images,
            "averages": {str(d): self.average(str(d)) for d in self.decays[1:]},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], primary: dict[str, Tensor]) -> None:
        """Takes over the averages of a checkpoint.

        A decay that the checkpoint does not have starts at its primary average.

        Args:
            state: From `state_dict`.
            primary: The primary average by parameter name.
        """
        self.num_updates = state["num_updates"]
        self._images = state.get("images") or self.num_updates * self._batch_size
        stored = {str(state["decays"][0]): primary, **state["averages"]}
        for decay in self.decays:
            source = stored.get(str(decay), primary)
            for name, average in zip(self._names, self._averages[str(decay)], strict=True):
                average.copy_(source[name])
