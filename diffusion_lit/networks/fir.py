"""Changes of resolution by a factor of 2 with the smoothing filter [1, 3, 3, 1] / 8 in both directions."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def smoothing_filter() -> Tensor:
    """The filter [1, 3, 3, 1] in both directions, of sum 1, (1, 1, 4, 4)."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return torch.outer(row, row)[None, None]


class Smooth(nn.Module):
    """Base of the layers that smooth every channel by itself; they have no parameters."""

    def __init__(self) -> None:
        super().__init__()
        # Not persistent: it is a constant, and no part of the weights.
        self.register_buffer("filter", smoothing_filter(), persistent=False)

    def each_channel(self, x: Tensor) -> Tensor:
        """The filter for each channel of x, (C, 1, 4, 4), in the dtype of x."""
        return cast(Tensor, self.filter).to(x.dtype).expand(x.shape[1], 1, 4, 4)


class SmoothDownsample(Smooth):
    """Halves the resolution of x, (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C, H/2, W/2)."""
        return F.conv2d(x, self.each_channel(x), stride=2, padding=1, groups=x.shape[1])


class SmoothUpsample(Smooth):
    """Doubles the resolution of x, (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C, 2H, 2W)."""
        return F.conv_transpose2d(x, 4 * self.each_channel(x), stride=2, padding=1, groups=x.shape[1])


class SmoothStridedConv(Smooth):
    """Halves the resolution by a 3x3 convolution with stride 2 after smoothing.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in, H, W). Returns (B, out, H/2, W/2)."""
        return cast(Tensor, self.conv(F.conv2d(x, self.each_channel(x), padding=2, groups=x.shape[1])))
