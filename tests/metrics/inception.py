"""An Inception network with random weights, in a file of torch-fidelity's format."""

import io
from pathlib import Path

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class Untrained(FeatureExtractorInceptionV3):
    """torch-fidelity's network without weights, which it cannot be made without otherwise."""

    def load_state_dict(self, *args: object, **kwargs: object) -> None:
        pass


def random_weights(path: Path) -> Path:
    """Writes random weights, scaled so that features are of order one."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Untrained("inception-v3-compat", ["2048"], nothing)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
    torch.save(network.state_dict(), path)
    return path
