"""A small convolutional classifier of clean images, for its features."""

import torch
from torch import Tensor, nn


class ConvClassifier(nn.Module):
    """Three stages of two 3x3 convolutions with batch normalisation, each at half the size of the one before.

    Args:
        image_size: Height and width, pixels, at least 4.
        in_channels: Of the images.
        num_classes: Of the logits.
        width: Channels of the first stage; the others have twice and four times as many.
        dropout: On the features, while training.

    Raises:
        ValueError: If the image is smaller than 4 pixels.
    """

    def __init__(
        self, image_size: int, in_channels: int = 3, num_classes: int = 10, width: int = 32, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"network.image_size={image_size} must be at least 4: the network halves it twice")
        self.image_size = image_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.num_features = 4 * width
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, out in enumerate((width, 2 * width, 4 * width)):
            for half in range(2):
                stride = 2 if stage > 0 and half == 0 else 1
                layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
        self.trunk = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The last stage, averaged over places, (B, 4 width), of images in [-1, 1], (B, C, H, W)."""
        return torch.mean(self.trunk(x), dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, num_classes), of images in [-1, 1], (B, C, H, W)."""
        logits: Tensor = self.head(self.dropout(self.features(x)))
        return logits
