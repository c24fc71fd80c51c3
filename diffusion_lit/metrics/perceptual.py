"""How different two images look: distances in the features of a trained network, with gradients."""

import inspect
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import lpips

from diffusion_lit.frozen import Frozen
from diffusion_lit.metrics.features import WeightsUnavailable, find_weights, first_line
from diffusion_lit.types import Part

URLS = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}


class Perceptual(nn.Module, Part):
    """A distance between images that has gradients; its network is not trained and in no checkpoint.

    Attributes:
        name: Lower-case word for logs.
    """

    name: str

    def prepare(self) -> None:
        """Loads what the distance needs, once; nothing by default.

        Raises:
            WeightsUnavailable: If weights are needed and cannot be had.
        """

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raises ValueError if images of shape (C, H, W) cannot be compared; called after `prepare`."""

    @abstractmethod
    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distances of images from others, (B, C, H, W) each, nominally in [-1, 1]: (B,), at least 0."""


class LPIPS(Perceptual):
    """Learned perceptual image patch similarity; grey images are repeated to three channels.

    The network is torchmetrics', which has the weights of the comparison; the backbone's are a file of torchvision's:
    `backbone` if it is given, else one in torch.hub's folder of checkpoints, else a download to there.

    Args:
        net: The backbone: "vgg", which is meant by a loss; "alex", which is usual for scores; or "squeeze".
        backbone: A file with torchvision's weights for it, such as vgg16-397923af.pth.

    Raises:
        ValueError: If there is no such backbone.

    Source: Zhang et al. 2018.
    """

    name = "lpips"

    def __init__(self, net: Literal["vgg", "alex", "squeeze"] = "vgg", backbone: str | None = None) -> None:
        super().__init__()
        if net not in URLS:
            raise ValueError(f"LPIPS: net={net!r} must be one of {', '.join(URLS)}")
        self.net = net
        self._backbone = backbone
        self._network: Frozen | None = None

    def prepare(self) -> None:
        self._prepared()

    def check(self, image_shape: tuple[int, int, int]) -> None:
        channels, *size = image_shape
        # The last feature map of VGG and AlexNet is the sixteenth of the image; AlexNet's first filter has 11 pixels.
        if channels not in (1, 3) or min(size) < 32:
            raise ValueError(
                f"LPIPS takes images of 1 or 3 channels and at least 32 pixels, not {image_shape}; take the features "
                "of a network of your own (TrainedPerceptual), or leave the perceptual loss out by null"
            )

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        network = self._prepared()
        if next(network.network.parameters()).device != images.device:
            network.to(images.device)
        shape = (-1, 3, -1, -1)
        distances: Tensor = network(images.expand(shape), targets.expand(shape))
        return distances.flatten()

    def _prepared(self) -> Frozen:
        if self._network is None:
            url = URLS[self.net]
            remedy = (
                f"give torchvision's {Path(url).name} as `backbone` of LPIPS or put it into $TORCH_HOME/hub/"
                "checkpoints; or take TrainedPerceptual, or null, instead of LPIPS"
            )
            backbone = find_weights(f"weights of {self.net} for LPIPS", self._backbone, url, remedy)
            self._network = Frozen(lpips_network(self.net, backbone))
        return self._network


def lpips_network(net: Literal["vgg", "alex", "squeeze"], backbone: Path) -> nn.Module:
    """The network of torchmetrics for LPIPS with the weights of the comparison and of a backbone.

    Raises:
        WeightsUnavailable: If the file does not hold the backbone's weights.
    """
    # On the meta device, so that no random weights are drawn.
    with torch.device("meta"):
        network = lpips._LPIPS(pretrained=False, net=net, pnet_rand=True)
    network.scaling_layer = lpips.ScalingLayer()
    given = _read(backbone)
    state = {}
    for name in network.net.state_dict():
        # "slice1.0.weight" and "slices.0.0.weight" are the backbone's "features.0.weight".
        source = re.sub(r"^(slice\d+|slices\.\d+)\.", "features.", name)
        if source not in given:
            raise WeightsUnavailable(f"LPIPS: {backbone} has no {source}: it does not hold the weights of {net}")
        state[f"net.{name}"] = given[source]
    comparison = Path(inspect.getfile(lpips)).parent / "lpips_models" / f"{net}.pth"
    for name, tensor in _read(comparison).items():
        state[name] = tensor
        state[re.sub(r"^lin(\d)\.", r"lins.\1.", name)] = tensor
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise WeightsUnavailable(f"LPIPS: {backbone} does not fit {net} ({first_line(error)})") from error
    return network


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float() for name, tensor in state.items()}
    except Exception as error:  # Damaged bytes raise nearly anything.
        raise WeightsUnavailable(f"LPIPS: {path} is not a file of tensors ({type(error).__name__})") from error


def feature_distance(features: Iterable[Tensor], targets: Iterable[Tensor]) -> Tensor:
    """The mean over layers and positions of the squared distance of features that are scaled to length 1.

    Args:
        features: Of the images, (B, C, H, W) for each layer.
        targets: Of what they are compared with.

    Returns:
        (B,), in [0, 4].

    Source: Zhang et al. 2018, eq. 1, with all weights 1.
    """
    distances = [
        (unit_length(a) - unit_length(b)).square().sum(1).mean((1, 2)) for a, b in zip(features, targets, strict=True)
    ]
    return torch.stack(distances).mean(0)


def unit_length(features: Tensor) -> Tensor:
    """Features, (B, C, H, W), scaled to length 1 at every position; with a gradient where all are 0."""
    return features * (features.square().sum(1, keepdim=True) + 1e-8).rsqrt()
