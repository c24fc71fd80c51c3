"""Gaussian data, for which everything is known in closed form; in numpy, from the betas alone."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import optimize, stats
from torch import Tensor, nn

from diffusion_lit.diffusion import DiscreteProcess, Process
from diffusion_lit.types import Condition, DenoiseFn, Prediction

Array = npt.NDArray[np.float64]


def linear_betas(num_steps: int, start: float = 1e-4, end: float = 0.02) -> Array:
    k: Array = np.arange(num_steps, dtype=np.float64)
    return start + (end - start) * k / max(num_steps - 1, 1)


def alpha_bars(betas: Array) -> Array:
    """alpha_bar_0 = 1 .. alpha_bar_T."""
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


@dataclass
class GaussianData:
    """N(mean, covariance) over images of shape (1, H, W), and the denoiser that is optimal for it."""

    mean: Array
    covariance: Array
    alpha_bar: Array

    def posterior_mean(self, x: Tensor, k: Tensor) -> Tensor:
        """E[x_0 | x_k], for k of shape (B,)."""
        values, vectors = np.linalg.eigh(self.covariance)
        bar = torch.from_numpy(self.alpha_bar)[k].reshape(-1, 1)
        lam, basis, mean = (torch.from_numpy(np.asarray(a)) for a in (values, vectors, self.mean))
        centred = (x.flatten(1) - bar.sqrt() * mean) @ basis
        return (mean + (centred * bar.sqrt() * lam / (bar * lam + 1 - bar)) @ basis.T).reshape(x.shape)

    def denoise(self, process: DiscreteProcess) -> DenoiseFn:
        def predict(x_t: Tensor, t: Tensor) -> Prediction:
            k = (t * process.num_steps).round().long().expand(len(x_t))
            x0 = self.posterior_mean(x_t, k)
            bar = torch.from_numpy(self.alpha_bar)[k].reshape(-1, 1, 1, 1)
            return Prediction(x0=x0, eps=(x_t - bar.sqrt() * x0) / (1 - bar).sqrt())

        return predict


def scalar_data(mean: float, variance: float, alpha_bar: Array) -> GaussianData:
    return GaussianData(np.array([mean]), np.array([[variance]]), alpha_bar)


@dataclass
class Mixture:
    """A mixture of normals on the line, the denoiser that is optimal for it, and its probability flow."""

    weights: Array
    means: Array
    variances: Array

    def denoise(self, process: Process) -> DenoiseFn:
        def predict(x_t: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = process.alpha_sigma(t)
            weights, means, variances = map(torch.from_numpy, (self.weights, self.means, self.variances))
            spread = alpha**2 * variances + sigma**2
            off = x_t.unsqueeze(-1) - alpha * means
            share = (weights.log() - spread.log() / 2 - off**2 / (2 * spread)).softmax(-1)
            x0 = (share * (means + alpha * variances / spread * off)).sum(-1)
            return Prediction(x0=x0, eps=(x_t - alpha * x0) / sigma)

        return predict

    def distribution(self, x: float, alpha: float, sigma: float) -> float:
        """P(x_t <= x)."""
        spread = np.sqrt(alpha**2 * self.variances + sigma**2)
        return float(self.weights @ stats.norm.cdf((x - alpha * self.means) / spread))

    def flow(self, x_t: Tensor, process: Process, t: Tensor, s: Tensor) -> Tensor:
        """Where the probability flow takes x_t: on a line it keeps what lies below."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ([float(c) for c in process.alpha_sigma(time)] for time in (t, s))
        found, bound = [], 9 * max(alpha_s, sigma_s)
        for x in x_t.flatten().tolist():
            below = self.distribution(x, alpha_t, sigma_t)
            root = optimize.brentq(lambda y: self.distribution(y, alpha_s, sigma_s) - below, -bound, bound, xtol=1e-14)  # noqa: B023
            found.append(root)
        return torch.tensor(found, dtype=torch.float64).reshape(x_t.shape)


class OptimalNetwork(nn.Module):
    """What a perfect network of the given kind puts out for Gaussian data, told k - 1."""

    def __init__(self, data: GaussianData, kind: str) -> None:
        super().__init__()
        self.data = data
        self.kind = kind

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        k = time.long() + 1
        x0 = self.data.posterior_mean(x, k)
        bars = torch.from_numpy(self.data.alpha_bar)
        bar, before = bars[k].reshape(-1, 1, 1, 1), bars[k - 1].reshape(-1, 1, 1, 1)
        eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
        beta = 1 - bar / before
        answers: dict[str, Callable[[], Tensor]] = {
            "Eps": lambda: eps,
            "X0": lambda: x0,
            "V": lambda: bar.sqrt() * eps - (1 - bar).sqrt() * x0,
            # Ho et al. 2020, eq. 7.
            "PosteriorMean": lambda: (
                before.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x
            ),
        }
        return answers[self.kind]()
