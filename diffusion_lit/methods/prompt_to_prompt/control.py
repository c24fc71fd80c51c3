"""Attention under control: maps of one text's images go into those of another, and are kept for later."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lit.methods.prompt_to_prompt.alignment import Alignment
from diffusion_lit.networks.attention import Attention, ControlFn
from diffusion_lit.types import DenoiseFn, Prediction


def cross_layers(network: nn.Module) -> frozenset[str]:
    """The names of the layers of a network that attend to a context."""
    layers = network.named_modules()
    return frozenset(name for name, layer in layers if isinstance(layer, Attention) and getattr(layer, "cross", False))


def steps_of(window: Sequence[float], total: int) -> tuple[int, int]:
    """The steps [first, end) of a window given as fractions of so many."""
    first, end = (math.floor(edge * total + 1e-9) for edge in window)
    return first, end


class Clock:
    """Tells the number of a sampler's step from the time at which the network is evaluated.

    Args:
        times: Of the sampler, falling, with the grid's end, to which the last step leads.
    """

    def __init__(self, times: Tensor) -> None:
        self.times = times[:-1]
        self.step = 0

    def watch(self, denoise: DenoiseFn) -> DenoiseFn:
        """The same function, which sets `step` whenever it is called."""

        def watched(x_t: Tensor, t: Tensor) -> Prediction:
            self.step = int((self.times > t.max().cpu().double() + 1e-9).sum())
            return denoise(x_t, t)

        return watched


class Maps:
    """Keeps the mean cross-attention of images, over heads, layers and steps so far.

    Layers of one resolution are kept: the finest that has at most so many positions, or else the coarsest.

    Args:
        layers: Names of the layers with cross-attention.
        num_images: How many images the batch starts with whose maps are kept, B; what follows, such as unconditional
            predictions, is ignored.
        most: Greatest number of positions.
    """

    def __init__(self, layers: frozenset[str], num_images: int, most: int = 256) -> None:
        self.layers = layers
        self.num_images = num_images
        self.most = most
        self._sums: dict[int, Tensor] = {}

    def add(self, name: str, weights: Tensor) -> Tensor:
        """Takes note of a layer's weights, (B', heads, positions, tokens), B' >= B; returns them."""
        if name in self.layers:
            seen = weights[: self.num_images].float().mean(1)
            positions = seen.shape[1]
            self._sums[positions] = self._sums[positions] + seen if positions in self._sums else seen.clone()
        return weights

    def of(self, places: Tensor) -> Tensor:
        """The map of some tokens, up to a factor that all have in common.

        Args:
            places: Which tokens count, bool or float (B, tokens).

        Returns:
            Sums over these tokens, (B, side, side).
        """
        fine = [positions for positions in self._sums if positions <= self.most]
        sums = self._sums[max(fine) if fine else min(self._sums)]
        side = math.isqrt(sums.shape[1])
        return (sums @ places.to(sums)[:, :, None]).reshape(-1, side, side)


@dataclass(frozen=True)
class Change:
    """What is done to the cross-attention of B images, in tokens of their target texts.

    Attributes:
        matrix: (B, K, K), see `Alignment`.
        taken: Bool (B, K).
        factors: Of the attention to each token, (B, K).
        first: First step in which the attention to each token is changed, (B, K).
        end: First step in which it is no more, (B, K).
    """

    matrix: Tensor
    taken: Tensor
    factors: Tensor
    first: Tensor
    end: Tensor

    @classmethod
    def of(cls, alignments: Sequence[Alignment], factors: Tensor, windows: Tensor) -> "Change":
        """From the alignment of each image, the factors, and the windows [first, end), int64 (B, K, 2)."""
        matrix, taken = (torch.stack(parts) for parts in zip(*alignments, strict=True))
        return cls(matrix, taken, factors, windows[..., 0], windows[..., 1])

    def to(self, device: torch.device) -> "Change":
        """The same on another device."""
        return Change(*(getattr(self, name).to(device) for name in vars(self)))

    def __call__(self, source: Tensor, target: Tensor, step: int) -> Tensor:
        """The new map of the targets, from the maps of sources and targets, (B, heads, positions, K) each.

        The rows are not normalized anew.

        Source: Hertz et al. 2022, section 3.2 and its code.
        """
        columns = (len(self.taken), 1, 1, -1)
        moved = torch.where(self.taken.view(columns), source @ self.matrix.to(source)[:, None], target)
        active = (self.first <= step) & (step < self.end)
        return torch.where(active.view(columns), moved * self.factors.to(source).view(columns), target)


def steer(
    layers: frozenset[str],
    change: Change,
    clock: Clock,
    self_steps: tuple[int, int],
    self_positions: int,
    note: Callable[[str, Tensor], Tensor] | None = None,
) -> ControlFn:
    """Attention control for a batch of B sources, B targets, and anything else, such as unconditional predictions.

    Args:
        layers: Names of the layers with cross-attention.
        change: Of their maps.
        clock: Tells the step.
        self_steps: Steps [first, end) in which targets get the self-attention of their sources.
        self_positions: Greatest number of positions at which they do.
        note: Is shown the new weights.
    """
    count = len(change.taken)

    def control(name: str, weights: Tensor) -> Tensor:
        source, target = weights[:count], weights[count : 2 * count]
        if name in layers:
            new = change(source, target, clock.step)
        elif self_steps[0] <= clock.step < self_steps[1] and weights.shape[2] <= self_positions:
            new = source
        else:
            new = target
        weights = torch.cat([source, new, weights[2 * count :]])
        return weights if note is None else note(name, weights)

    return control


def blend_mask(maps: Tensor, size: Sequence[int], threshold: float) -> Tensor:
    """Where at least one of two images shows a word.

    Args:
        maps: Of the word in B sources, then in B targets, (2 B, side, side).
        size: Height and width of the mask.
        threshold: Share of a map's maximum above which the word is there.

    Returns:
        Bool, (B, 1, H, W).

    Source: Hertz et al. 2022, section 3.2, "local editing", and its code.
    """
    wide = F.max_pool2d(maps[:, None], 3, stride=1, padding=1)
    resized = F.interpolate(wide, size=tuple(size))
    largest = resized.amax((2, 3), keepdim=True)
    source, target = ((resized > threshold * largest) & (largest > 0)).chunk(2)
    return source | target
