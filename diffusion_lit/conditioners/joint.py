"""Several conditions together."""

from collections.abc import Sequence

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from diffusion_lit.codec import Codec, Shape
from diffusion_lit.conditioner import Conditioner, DrawFn
from diffusion_lit.types import Condition


class Joint(Conditioner):
    """Several conditioners, each of which makes other inputs of the network.

    Each drops its own in training. For guidance those that have a null condition are null, all at once; the others
    stay, such as an image with holes beside a text.

    Args:
        conditioners: At least one.

    Raises:
        ValueError: If there is none, one does not say which inputs it makes, or two make the same.
    """

    def __init__(self, conditioners: Sequence[Conditioner]) -> None:
        super().__init__()
        roles = [role for conditioner in conditioners for role in conditioner.roles]
        silent = [type(conditioner).__name__ for conditioner in conditioners if not conditioner.roles]
        if silent or not roles:
            raise ValueError(f"conditioner.conditioners: {', '.join(silent) or 'there are none'}: no `roles` to join")
        twice = sorted({role for role in roles if roles.count(role) > 1})
        if twice:
            raise ValueError(f"conditioner.conditioners: two make {twice[0]}; leave one of them out")
        self.conditioners = nn.ModuleList(conditioners)
        self.roles = tuple(roles)
        # Whether each has a null condition, which the network may decide: known once it has been checked.
        self._has_null = [True] * len(conditioners)
        self.entries = tuple(dict.fromkeys(entry for c in conditioners for entry in c.entries))
        self.num_classes = next((c.num_classes for c in conditioners if c.num_classes is not None), None)

    def _parts(self) -> list[Conditioner]:
        return [part for part in self.conditioners if isinstance(part, Conditioner)]

    def forward(self, given: Condition, codec: Codec) -> Condition:
        return {name: value for part in self._parts() for name, value in part(given, codec).items()}

    def null(self, condition: Condition) -> Condition:
        found: dict[str, Tensor] = {}
        for part, has_null in zip(self._parts(), self._has_null, strict=True):
            own = {name: value for name, value in condition.items() if name in part.roles}
            found |= part.null(own) if has_null else own
        return found

    def has_null(self, network: nn.Module) -> bool:
        return any(part.has_null(network) for part in self._parts())

    def check(self, network: nn.Module) -> None:
        for part in self._parts():
            part.check(network)
        self._has_null = [part.has_null(network) for part in self._parts()]

    def shape_of(self, entry: str, image_shape: Shape, latent_shape: Shape) -> Shape:
        for part in self._parts():
            if entry in part.entries:
                return part.shape_of(entry, image_shape, latent_shape)
        return super().shape_of(entry, image_shape, latent_shape)

    def vary(self, given: Condition, draw: DrawFn) -> Condition:
        for part in self._parts():
            given = part.vary(given, draw)
        return given

    def start(self, data: L.LightningDataModule | None, device: torch.device) -> None:
        for part in self._parts():
            part.start(data, device)

    def finish(self, images: Tensor, given: Condition) -> Tensor:
        for part in self._parts():
            images = part.finish(images, given)
        return images
