"""DINOv2 by torch-fidelity and torch.hub, whose folder here holds a transformer of our own making."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.metrics import DINOv2, WeightsUnavailable

HUB_CONF = '''
import torch

dependencies = ["torch"]


class Means(torch.nn.Module):
    """Means of the three channels, 128 times each."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return self.scale * x.mean((2, 3)).repeat(1, 128)


def dinov2_vits14(pretrained=True):
    return Means()
'''


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of torch.hub's, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "hub"


def test_a_copy_in_torch_hubs_folder_is_enough(hub: Path) -> None:
    repository = hub / "facebookresearch_dinov2_main"
    repository.mkdir(parents=True)
    (repository / "hubconf.py").write_text(HUB_CONF)
    extractor = DINOv2("s")
    extractor.prepare()
    grey = torch.full((2, 1, 8, 8), 200, dtype=torch.uint8)
    grey[1] = 0
    features = extractor(grey)
    assert features.shape == (2, extractor.num_features)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for image, level in zip(features, (200 / 255, 0.0), strict=True):
        torch.testing.assert_close(image[:3], (level - mean) / deviation, rtol=1e-5, atol=1e-5)
    assert extractor.metric_name == "frechet/dinov2"
    assert extractor.fingerprint() == DINOv2("s").fingerprint()


def test_without_a_network_and_a_copy_the_remedy_is_named_in_one_line(hub: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"no dinov2_vitl14: torch.hub cannot load") as error:
        DINOv2().prepare()
    assert str(hub) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_size_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="size='xl' of DINOv2 must be one of s, b, l, g"):
        DINOv2("xl")


def test_it_never_trains() -> None:
    assert not DINOv2("s").train().training
    assert isinstance(DINOv2("s"), nn.Module)
    assert not [p for p in DINOv2("s").parameters() if isinstance(p, Tensor)]
