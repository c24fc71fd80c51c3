"""Image features: what a Fréchet distance compares.

An extractor maps 8-bit images to float32 vectors. `Inception` gives the published FID; `Pixels` needs no
weights and serves tests and machines without a network.
"""

import hashlib
import io
import logging
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlparse
from urllib.request import urlopen

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from diffusion_lit.files import whole_file
from diffusion_lit.memory import in_memory
from diffusion_lit.records import digest
from diffusion_lit.types import Part

_log = logging.getLogger(__name__)


class WeightsUnavailable(RuntimeError):
    """An extractor's weights are missing, unreadable or not its own; one line with the remedy."""


class FeatureExtractor(nn.Module, Part):
    """A fixed map from 8-bit images to feature vectors; always in evaluation mode.

    Attributes:
        name: Lower-case word for logs and file names.
        num_features: Dimension D of a feature vector.
        classifies: Whether `outputs` has logits too.
    """

    name: str
    num_features: int
    classifies: bool = False

    @property
    def metric_name(self) -> str:
        """What the Fréchet distance in these features is called in logs; "fid" is Inception's alone."""
        return self.scalar("frechet")

    def scalar(self, score: str) -> str:
        """What a score in these features is called in logs; the bare name, as published, is Inception's alone."""
        return f"{score}/{self.name}"

    def prepare(self) -> None:
        """Loads what the extractor needs, once; nothing by default.

        Call it before anything long, so that missing weights end a run at its start, and on one process of
        each machine before the others: then at most one of them downloads.

        Raises:
            WeightsUnavailable: If weights are needed and cannot be had.
        """

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features of 8-bit images.

        Args:
            images: uint8, (B, C, H, W).

        Returns:
            float32, (B, D), without gradient.
        """

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """All that the extractor says of 8-bit images, (B, C, H, W), in one pass.

        Returns:
            float32: "features", (B, D), and, of an extractor that is a classifier, "logits", (B, classes).
        """
        return {"features": self(images)}

    def fingerprint(self) -> str:
        """The name and a hash of weights, buffers, classes and plain public attributes, for cache keys."""
        self.prepare()
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return f"{self.name}-{digest(tensors, _settings(self))}"

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode whatever `mode` says."""
        return super().train(False)


class Inception(FeatureExtractor):
    """The 2048 pooled features of the Inception v3 that FID is defined by (Heusel et al. 2017), and its logits without
    the bias, which the Inception score is defined by.

    The network, its TensorFlow 1 bilinear resize to 299 x 299 without antialiasing and its weights are
    torch-fidelity's, ported from the reference. Grey images are repeated to three channels. It runs in
    float32 without TF32 and autocast, whatever the caller's precision.

    Construction is cheap. `prepare` loads the weights: from `weights`, if given; else from
    `weights-inception-2015-12-05-6726825d.pth` in torch.hub's folder of checkpoints, where torch-fidelity
    keeps them too; else by a download to there, checked against the hash in its name. Only tensors are read
    from any of them (`weights_only=True`).

    Args:
        weights: A file with torch-fidelity's weights; pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` is
            the same file.
    """

    name = "inception"
    num_features = 2048
    classifies = True

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self._weights = weights
        self._network: nn.Module | None = None

    @property
    def metric_name(self) -> str:
        return "fid"

    def scalar(self, score: str) -> str:
        return score

    def prepare(self) -> None:
        self._prepared()

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images)["features"]

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        network = self._prepared()
        images = as_rgb(images, self.name)
        if next(network.parameters()).device != images.device:
            network.to(images.device)
        with exact_float32(images.device):
            features, logits = network(images)
        return {"features": features, "logits": logits}

    def fingerprint(self) -> str:
        """The name and a hash of the weights alone, so that it outlives changes of library versions."""
        weights = self._prepared().state_dict().items()
        used = [(name, tensor) for name, tensor in weights if not name.endswith("num_batches_tracked")]
        return f"{self.name}-{digest(used, 'inception-v3-compat 2048')}"

    def _prepared(self) -> nn.Module:
        if self._network is None:
            self._network = _inception(find_weights("Inception weights", self._weights, URL_INCEPTION_V3, _remedy()))
        return self._network


class Pixels(FeatureExtractor):
    """Pixel values in [0, 1], averaged over areas to `size` x `size`: a distance that needs no weights.

    It sees colour and coarse layout only, and its values compare with no published number. Grey images are
    repeated to three channels, as `Inception` does, so D = 3 size^2 for every data set; smaller images are
    enlarged by repetition.

    Args:
        size: Height and width of what is compared, in pixels.

    Raises:
        ValueError: If `size` is not positive.
    """

    name = "pixels"

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        self.size = size
        self.num_features = 3 * size**2

    def forward(self, images: Tensor) -> Tensor:
        images = as_rgb(images, self.name)
        with exact_float32(images.device):
            return nn.functional.adaptive_avg_pool2d(images.float() / 255, self.size).flatten(1)


def outputs_in_memory(extractor: FeatureExtractor, images: Tensor) -> dict[str, Tensor]:
    """What an extractor says of 8-bit images, (B, C, H, W), as `outputs`; out of memory, in halves, quarters and so on.

    Raises:
        torch.OutOfMemoryError: If memory does not suffice for a single image.
    """
    parts, _ = in_memory(
        lambda some, *_: extractor.outputs(images[some]), len(images), len(images), f"in {extractor.name}"
    )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Plain float32 arithmetic without gradients: no autocast, TF32 or bfloat16 kernels.

    The caller's settings come back afterwards. Without this, a score depends on the precision of training.
    """
    backends: Any = torch.backends
    kernels = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
    )
    precisions = [kernel.fp32_precision for kernel in kernels]
    dtype = torch.get_default_dtype()
    try:
        for kernel in kernels:
            kernel.fp32_precision = "ieee"
        torch.set_default_dtype(torch.float32)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)
        for kernel, precision in zip(kernels, precisions, strict=True):
            kernel.fp32_precision = precision


def as_rgb(images: Tensor, name: str) -> Tensor:
    """8-bit images, (B, 1 or 3, H, W), with three channels; raises ValueError, naming the extractor, for others."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{name} takes uint8 images, (B, 1 or 3, H, W), not {images.dtype} of shape {tuple(images.shape)}"
        )
    return images.expand(-1, 3, -1, -1)


def _inception(path: Path) -> nn.Module:
    """Builds the network from a file of tensors, leaving the global random state as it was.

    torch-fidelity unpickles without restriction what it is given, so it is given a copy in memory of what the
    restricted loader let through.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged bytes raise nearly anything.
        raise WeightsUnavailable(
            f"{path} is not a file of tensors ({type(error).__name__}) and was not loaded; {_remedy()}"
        ) from error
    if not isinstance(state, Mapping) or "Mixed_7c.branch1x1.conv.weight" not in state:
        raise WeightsUnavailable(f"{path} does not hold the weights of FID's Inception; {_remedy()}")
    checked = io.BytesIO()
    torch.save(state, checked)
    checked.seek(0)
    cpu = torch.device("cpu")
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), cpu, exact_float32(cpu):
            network: nn.Module = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], checked
            )
    except (RuntimeError, TypeError, AttributeError) as error:
        raise WeightsUnavailable(f"{path} does not fit FID's Inception ({first_line(error)}); {_remedy()}") from error
    return network


def _remedy() -> str:
    return (
        f"pass torch-fidelity's {_file_name(URL_INCEPTION_V3)} by "
        "--evaluation.extractor.weights PATH, or do without by --evaluation.extractor Pixels"
    )


def _file_name(url: str) -> str:
    return Path(urlparse(url).path).name


def first_line(error: Exception) -> str:
    """An error's class and the first line of what it says."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def find_weights(what: str, given: str | None, url: str, remedy: str) -> Path:
    """A file of weights: the one that was given, or in torch.hub's folder of checkpoints, perhaps downloaded to there.

    Args:
        what: Such as "weights of vgg", for messages.
        given: Path of a file; None: there is none.
        url: Of the download; its name is the file's.
        remedy: For messages.

    Raises:
        WeightsUnavailable: If there is no such file, or no download.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / _file_name(url) if given is None else Path(given).expanduser()
    if given is not None and not path.is_file():
        raise WeightsUnavailable(f"{path}: no such file; {remedy}")
    if not path.is_file():
        try:
            download(url, path)
        except (OSError, HTTPException, ValueError) as error:
            raise WeightsUnavailable(
                f"no {what}: not in {path.parent}, and no download ({first_line(error)}); {remedy}"
            ) from error
    return path


def download(url: str, path: Path) -> None:
    """Fetches `url` to `path`, whole or not at all; its name ends with the start of its SHA-256."""
    _log.info("downloading %s to %s", path.name, path.parent)
    expected = re.search(r"-([0-9a-f]{8,})\.", path.name)
    sha = hashlib.sha256()
    with whole_file(path) as file, urlopen(url, timeout=20) as response:
        while block := response.read(1 << 20):
            sha.update(block)
            file.write(block)
        if expected and not sha.hexdigest().startswith(expected[1]):
            raise ValueError("what was sent is damaged or another file")


def _settings(module: nn.Module) -> str:
    """Classes and plain public attributes of a module and its parts: what matters beside tensors."""
    return repr(
        [
            (
                path,
                type(part).__module__,
                type(part).__qualname__,
                sorted(filter(_is_setting, vars(part).items())),
            )
            for path, part in module.named_modules()
        ]
    )


def _is_setting(attribute: tuple[str, object]) -> bool:
    name, value = attribute
    return not name.startswith("_") and name != "training" and _is_plain(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
