"""The real images' side of a Fréchet distance: a Gaussian, computed once and kept, or got from elsewhere."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from diffusion_lit.files import default_cache_dir, whole_file
from diffusion_lit.metrics.features import FeatureExtractor, outputs_in_memory
from diffusion_lit.metrics.frechet import FeatureMoments, ReduceSum, check_gaussian, one_process


class WrongImageCount(ValueError):
    """Reference statistics saw more or fewer images than the data set has."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A Gaussian fitted to the features of real images.

    Attributes:
        mu: Mean, float64, (D,).
        sigma: Unbiased covariance, float64, (D, D).
        count: Number of images, None where a file from elsewhere does not say.
        name: What the images are, for logs.
        extractor: `FeatureExtractor.fingerprint` of the features, None where unknown.

    Raises:
        ValueError: If `mu` and `sigma` are not finite, disagree in shape, or `sigma` is not symmetric.
    """

    mu: Tensor
    sigma: Tensor
    count: int | None
    name: str
    extractor: str | None = None

    def __post_init__(self) -> None:
        check_gaussian(self.mu, self.sigma)

    def save(self, path: Path | str) -> None:
        """Writes an .npz with mu, sigma and what is known besides; whole or not at all.

        pytorch-fid and clean-fid read such a file too.
        """
        arrays: dict[str, Any] = {
            "mu": self.mu.numpy(),
            "sigma": self.sigma.numpy(),
            "name": np.array(self.name),
        }
        if self.count is not None:
            arrays["count"] = np.array(self.count, dtype=np.int64)
        if self.extractor is not None:
            arrays["extractor"] = np.array(self.extractor)
        with whole_file(Path(path)) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path | str, extractor: FeatureExtractor | None = None) -> Self:
        """Reads statistics: any .npz with mu and sigma, without unpickling anything.

        `save` writes such files, and so do pytorch-fid, clean-fid, EDM and OpenAI's evaluator.

        Args:
            path: The file.
            extractor: The features it is meant for. Where given, their dimension must agree, and so must
                their fingerprint if the file has one.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not such an .npz, lacks something, or is for other features.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of reference statistics")
        arrays = _read(path)
        try:
            reference = cls(
                mu=torch.from_numpy(arrays["mu"].astype(np.float64)),
                sigma=torch.from_numpy(arrays["sigma"].astype(np.float64)),
                count=int(arrays["count"]) if "count" in arrays else None,
                name=str(arrays.get("name", path.stem)),
                extractor=str(arrays["extractor"]) if "extractor" in arrays else None,
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        if extractor is not None:
            reference._check_features(path, extractor)
        return reference

    def _check_features(self, path: Path, extractor: FeatureExtractor) -> None:
        if len(self.mu) != extractor.num_features:
            raise ValueError(
                f"{path} describes {len(self.mu)} features, but {extractor.name} has {extractor.num_features}"
            )
        if self.extractor is not None and self.extractor != extractor.fingerprint():
            raise ValueError(
                f"{path} was computed with the extractor {self.extractor}, but this one is {extractor.fingerprint()}"
            )


def _read(path: Path) -> dict[str, Any]:
    """The entries of an .npz that a `Reference` is made of; OpenAI's images beside them are not touched."""
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            keys = set(file.files)
            arrays: dict[str, Any] = {
                key: file[key] for key in ("mu", "sigma", "count", "name", "extractor") if key in keys
            }
    except Exception as error:  # Damaged bytes raise nearly anything.
        raise ValueError(f"{path} is not a readable .npz of reference statistics ({type(error).__name__})") from error
    missing = [key for key in ("mu", "sigma") if key not in arrays]
    if missing:
        found = ", ".join(sorted(keys)) or "nothing"
        raise ValueError(f"{path} has no {' and no '.join(missing)}: it holds {found}")
    return arrays


def cache_path(
    cache_dir: Path | str | None,
    dataset_fingerprint: str,
    extractor_fingerprint: str,
    resolution: int,
) -> Path:
    """Where the statistics of a data set are kept: one file for each combination of the arguments.

    Args:
        cache_dir: None for `default_cache_dir`.
        dataset_fingerprint: Tells data sets and their splits apart.
        extractor_fingerprint: `FeatureExtractor.fingerprint()`.
        resolution: Height and width of the images, in pixels.
    """
    key = json.dumps([1, dataset_fingerprint, resolution, "", extractor_fingerprint])
    directory = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    return directory / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


def compute_reference(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    device: torch.device | str,
    reduce_sum: ReduceSum = one_process,
    expected: Callable[[], int] | None = None,
    name: str = "",
) -> Reference:
    """Fits the Gaussian to all images of all processes; collective.

    Args:
        batches: This process's share of the images, uint8, (B, C, H, W): each image once and on one process
            only, unflipped.
        extractor: Moved to `device`.
        device: Where features are computed and summed.
        reduce_sum: Sums a tensor over the processes.
        expected: Returns the number of images in this process's share; called after the pass. None: it is not checked.
        name: What the images are, for logs.

    Returns:
        The same statistics on every process, on the CPU.

    Raises:
        WrongImageCount: On every process, if not as many images were counted as expected.
        ValueError: If there are fewer than two images.
        WeightsUnavailable: If the extractor's weights cannot be had.
    """
    extractor.prepare()
    extractor.to(device).eval()
    moments = FeatureMoments(extractor.num_features, device)
    for images in batches:
        moments.update(outputs_in_memory(extractor, images.to(device))["features"])
    moments = moments.reduce(reduce_sum)
    if expected is not None:
        total = int(reduce_sum(torch.tensor(expected(), device=device)))
        if moments.count != total:
            raise WrongImageCount(
                f"reference statistics counted {moments.count} images, but {name} has {total}: a loader drops, repeats "
                "or pads some"
            )
    mu, sigma = moments.mean_and_covariance()
    return Reference(mu.cpu(), sigma.cpu(), moments.count, name, extractor.fingerprint())


def cached_reference(
    path: Path,
    compute: Callable[[], Reference],
    extractor: FeatureExtractor,
    device: torch.device | str = "cpu",
    reduce_sum: ReduceSum = one_process,
    write: bool = True,
) -> Reference:
    """Reads the statistics from `path`; if any process cannot, all compute them anew. Collective.

    A damaged file is computed anew with a warning; so is the loss of a file that cannot be written.

    Args:
        path: From `cache_path`.
        compute: `compute_reference`, bound to its arguments.
        extractor: The features that the file must be for.
        device: Where `reduce_sum` wants its tensors.
        reduce_sum: Sums a tensor over the processes.
        write: Whether this process writes the file: true on one process of each machine.
    """
    reference: Reference | None = None
    try:
        reference = Reference.load(path, extractor)
    except FileNotFoundError:
        pass
    except ValueError as error:
        warnings.warn(f"{error}; computing it anew", stacklevel=2)
    # One process without the file must not compute alone: `compute` is collective.
    failures = reduce_sum(torch.tensor(int(reference is None), dtype=torch.int64, device=device))
    if reference is not None and int(failures.item()) == 0:
        return reference
    reference = compute()
    if write:
        try:
            reference.save(path)
        except OSError as error:
            warnings.warn(f"reference statistics were not kept in {path}: {error}", stacklevel=2)
    return reference
