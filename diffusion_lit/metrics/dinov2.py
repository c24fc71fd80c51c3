"""DINOv2's features, in which a Fréchet distance follows human judgement more closely than in Inception's."""

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA, FeatureExtractorDinoV2

from diffusion_lit.metrics.features import FeatureExtractor, WeightsUnavailable, as_rgb, exact_float32, first_line
from diffusion_lit.records import digest

DIMENSIONS = {"s": 384, "b": 768, "l": 1024, "g": 1536}


class DINOv2(FeatureExtractor):
    """The class token of a DINOv2 vision transformer, by torch-fidelity's port of its preprocessing.

    Code and weights come by torch.hub from facebookresearch/dinov2: downloaded at the first use, or found in its folder
    ($TORCH_HOME/hub), so that a machine without a network can be given a copy of it.

    Args:
        size: Of the transformer: s, b, l (the usual choice) or g.

    Raises:
        ValueError: If there is no such size.

    Source: Oquab et al. 2023; as a score: Stein et al. 2023.
    """

    name = "dinov2"

    def __init__(self, size: str = "l") -> None:
        super().__init__()
        if size not in DIMENSIONS:
            raise ValueError(f"size={size!r} of DINOv2 must be one of {', '.join(DIMENSIONS)}")
        self.size = size
        self.num_features = DIMENSIONS[size]
        self._network: nn.Module | None = None

    def prepare(self) -> None:
        self._prepared()

    def forward(self, images: Tensor) -> Tensor:
        network = self._prepared()
        images = as_rgb(images, self.name)
        if next(network.parameters()).device != images.device:
            network.to(images.device)
        with exact_float32(images.device):
            features: Tensor = network(images)[0]
        return features

    def fingerprint(self) -> str:
        """The name and a hash of the weights."""
        return f"{self.name}-{digest(self._prepared().state_dict().items(), self.size)}"

    def _prepared(self) -> nn.Module:
        if self._network is None:
            name = f"dinov2-vit-{self.size}-14"
            try:
                with torch.random.fork_rng(devices=[]):
                    self._network = FeatureExtractorDinoV2(name, ["dinov2"])
            except Exception as error:  # torch.hub runs what it finds there.
                raise WeightsUnavailable(
                    f"no {MODEL_METADATA[name]}: torch.hub cannot load facebookresearch/dinov2 ({first_line(error)}); "
                    f"copy it and its checkpoint to {torch.hub.get_dir()} from where there is one, or leave DINOv2 out"
                ) from error
        return self._network
