"""The Fréchet distance between two Gaussians fitted to features, and the running sums behind them.

    d^2 = |mu1 - mu2|^2 + Tr(Sigma1 + Sigma2 - 2 (Sigma1 Sigma2)^(1/2))

Sources: Dowson & Landau 1982, eq. 4; as a score of generated images (FID): Heusel et al. 2017, eq. 6.
"""

from collections.abc import Callable
from typing import Self, TypeAlias

import torch
from torch import Tensor

ReduceSum: TypeAlias = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes; called on every one of them, in the same order. It may work in place."""


def one_process(tensor: Tensor) -> Tensor:
    """The sum over a single process: the tensor itself."""
    return tensor


class FeatureMoments:
    """Count, sum and sum of outer products of feature vectors, in float64.

    Sums add over batches and processes, so no feature is kept. They are not shifted by a mean: features of
    order one, such as Inception's (0.4 on average), keep about 13 digits of covariance; each factor of ten
    between mean and standard deviation costs two.

    Args:
        num_features: Dimension D of a feature vector.
        device: Where the sums live; Apple's GPUs have no float64, so for those the CPU.

    Attributes:
        count: Number of vectors seen.
        sum: Their sum, (D,).
        outer: Sum of their outer products, (D, D).
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        if device.type == "mps":
            device = torch.device("cpu")
        self.count = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Counts a batch of features, (B, D), B >= 0.

        Raises:
            ValueError: If `features` is not (B, D).
        """
        if features.ndim != 2 or features.shape[1] != len(self.sum):
            raise ValueError(f"features of shape {tuple(features.shape)} are not (B, {len(self.sum)})")
        # Out of place: a sum that was made under inference mode could not be changed outside it.
        features = features.detach().to(self.sum.device).double()
        self.count += len(features)
        self.sum = self.sum + features.sum(0)
        self.outer = self.outer + features.T @ features

    def reduce(self, reduce_sum: ReduceSum) -> Self:
        """The moments of all processes' vectors, the same on each; this process's own stay as they are.

        Collective: every process calls it, also one that saw no vector.
        """
        count = torch.tensor(self.count, dtype=torch.int64, device=self.sum.device)
        moments = type(self)(len(self.sum), self.sum.device)
        moments.count = int(reduce_sum(count).item())
        moments.sum, moments.outer = reduce_sum(self.sum.clone()), reduce_sum(self.outer.clone())
        return moments

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean, (D,), and unbiased covariance, (D, D), float64: divided by count - 1, as `numpy.cov` does.

        Raises:
            ValueError: If fewer than two vectors were counted.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        mean = self.sum / self.count
        covariance = (self.outer - torch.outer(mean, self.sum)) / (self.count - 1)
        return mean, (covariance + covariance.T) / 2


def check_gaussian(mu: Tensor, sigma: Tensor) -> None:
    """Refuses what cannot be the mean, (D,), and covariance, (D, D), of a Gaussian.

    Raises:
        ValueError: If the shapes disagree, a value is not finite, or `sigma` is not symmetric.
    """
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)} are not (D,) and (D, D)")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError("mu or sigma has values that are not finite")
    if not torch.allclose(sigma, sigma.T, rtol=0, atol=1e-4 * float(sigma.abs().amax()) if len(mu) else 0):
        raise ValueError("sigma is not symmetric, so it is no covariance")


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """The squared Fréchet distance between N(mu1, sigma1) and N(mu2, sigma2): FID, in Inception's features.

    Tr (Sigma1 Sigma2)^(1/2) is the sum of the square roots of the eigenvalues of
    Sigma1^(1/2) Sigma2 Sigma1^(1/2), a symmetric matrix; those that rounding made negative count as zero. So
    singular covariances (fewer images than features, constant features) need no special case and no added
    diagonal. Computed on the CPU in float64: a few seconds at D = 2048.

    Args:
        mu1: Mean, (D,).
        sigma1: Covariance, (D, D), symmetric and positive semi-definite.
        mu2: Mean, (D,).
        sigma2: Covariance, (D, D), likewise.

    Returns:
        The distance, in squared units of the features; at least 0.

    Raises:
        ValueError: If the shapes disagree, a value is not finite, or a covariance is not symmetric.
    """
    mu1, sigma1, mu2, sigma2 = (tensor.detach().cpu().double() for tensor in (mu1, sigma1, mu2, sigma2))
    check_gaussian(mu1, sigma1)
    check_gaussian(mu2, sigma2)
    if mu1.shape != mu2.shape:
        raise ValueError(f"Gaussians of {len(mu1)} and {len(mu2)} features cannot be compared")
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ sigma2 @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)
