"""What keeps the latents of an autoencoder simple: a normal distribution in each position, or a codebook."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lit.types import Part

LEAST_LOG_VARIANCE, GREATEST_LOG_VARIANCE = -30.0, 20.0
MOST_DISTANCES = 2**26
"""Distances between positions and codes that are held at once."""


@dataclass(frozen=True)
class Regularized:
    """What a regularizer makes of an encoder's output in training.

    Attributes:
        latents: What the decoder gets, (B, z, h, w), with gradient.
        terms: Losses per image by name, (B,) each, with gradient.
        codes: Which code each position has, int64, (B, h, w); None: there are none.
    """

    latents: Tensor
    terms: dict[str, Tensor]
    codes: Tensor | None = None


class Regularizer(nn.Module, Part):
    """Stands between encoder and decoder."""

    num_codes: int | None = None
    """Number of codes; None: the latents are continuous."""

    def build(self, latent_channels: int) -> None:
        """Makes what depends on the number of latent channels z; called once, by the autoencoder.

        Raises:
            ValueError: If the regularizer belongs to an autoencoder already.
        """

    @abstractmethod
    def channels(self, latent_channels: int) -> int:
        """Channels of the encoder's output, the moments, for latents of `latent_channels` channels."""

    @abstractmethod
    def forward(self, moments: Tensor) -> Regularized:
        """The training pass: `moments`, (B, channels(z), h, w), to the decoder's input and losses."""

    @abstractmethod
    def sample(self, moments: Tensor) -> Tensor:
        """Latents that a diffusion model sees, (B, z, h, w), drawn from the global generator where there is chance."""

    @abstractmethod
    def mode(self, moments: Tensor) -> Tensor:
        """The likeliest latents, (B, z, h, w)."""

    @abstractmethod
    def decoded(self, latents: Tensor) -> Tensor:
        """What the decoder gets for latents, (B, z, h, w), in the same shape."""

    def codes(self, latents: Tensor) -> Tensor | None:
        """Which code each position of latents, (B, z, h, w), has: int64, (B, h, w); None: there are no codes."""
        return None


class DiagonalGaussian(Regularizer):
    """A normal distribution of independent latents: the encoder gives means and log-variances.

    Its term "kl" is the divergence from the standard normal distribution, in nats, summed over an image's latents.

    Source: Rombach et al. 2022, section 3.1 and its code: log-variances are clamped to [-30, 20].
    """

    def channels(self, latent_channels: int) -> int:
        return 2 * latent_channels

    def forward(self, moments: Tensor) -> Regularized:
        mean, log_variance = split(moments)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return Regularized(self.sample(moments), {"kl": kl.flatten(1).sum(1)})

    def sample(self, moments: Tensor) -> Tensor:
        mean, log_variance = split(moments)
        return mean + (0.5 * log_variance).exp() * torch.randn_like(mean)

    def mode(self, moments: Tensor) -> Tensor:
        return split(moments)[0]

    def decoded(self, latents: Tensor) -> Tensor:
        return latents


def split(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and clamped log-variance, (B, z, h, w) each, of moments, (B, 2z, h, w); at least float32."""
    mean, log_variance = at_least_float32(moments).chunk(2, dim=1)
    return mean, log_variance.clamp(LEAST_LOG_VARIANCE, GREATEST_LOG_VARIANCE)


def at_least_float32(x: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class VectorQuantizer(Regularizer):
    """A codebook: every position takes the nearest code, and gradients pass straight through.

    Its term "codebook" is the mean over an image's latents of |sg(z) - q|^2 + |z - sg(q)|^2, q the nearest codes, of
    which `beta` multiplies one. Codes start uniformly in +-1 / num_codes.

    Args:
        num_codes: Number of codes, at least 1.
        beta: Factor of one of the two terms, above 0.
        on: Which: "codebook" slows down the codes, as all published models of latent diffusion have it; "commitment"
            slows down the encoder, as in the paper. The loss has the same value, its gradients do not.

    Attributes:
        embedding: The codes, (num_codes, z); made by `build`.

    Raises:
        ValueError: If a number is out of range.

    Source: van den Oord et al. 2017, eq. 3; Esser et al. 2021, eq. 4, and the code of both papers' successors.
    """

    embedding: nn.Embedding

    def __init__(self, num_codes: int, beta: float = 0.25, on: Literal["codebook", "commitment"] = "codebook") -> None:
        super().__init__()
        if num_codes < 1 or beta <= 0:
            raise ValueError(
                f"VectorQuantizer: num_codes={num_codes} must be at least 1 and beta={beta} above 0; the published "
                "models have 256 to 16384 codes and 0.25"
            )
        if on not in ("codebook", "commitment"):
            raise ValueError(f"VectorQuantizer: on={on!r} must be 'codebook' or 'commitment'")
        self.num_codes: int = num_codes
        self.beta = beta
        self.on = on

    def build(self, latent_channels: int) -> None:
        if hasattr(self, "embedding"):
            raise ValueError("VectorQuantizer: it belongs to an autoencoder already; make one for each autoencoder")
        self.embedding = nn.Embedding(self.num_codes, latent_channels)
        nn.init.uniform_(self.embedding.weight, -1 / self.num_codes, 1 / self.num_codes)

    def channels(self, latent_channels: int) -> int:
        return latent_channels

    def forward(self, moments: Tensor) -> Regularized:
        z = at_least_float32(moments)
        codes = self.codes(z)
        q = self.lookup(codes)
        to_codes, to_latents = mean_square(z.detach() - q), mean_square(z - q.detach())
        loss = self.beta * to_codes + to_latents if self.on == "codebook" else to_codes + self.beta * to_latents
        return Regularized(z + (q - z).detach(), {"codebook": loss}, codes)

    def sample(self, moments: Tensor) -> Tensor:
        return moments

    def mode(self, moments: Tensor) -> Tensor:
        return moments

    def decoded(self, latents: Tensor) -> Tensor:
        return self.lookup(self.codes(latents))

    @torch.no_grad()
    def codes(self, latents: Tensor) -> Tensor:
        weight = self.embedding.weight
        # Autocast would round the distances to 8 bits.
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.to(weight.dtype).movedim(1, -1)
            squares = weight.square().sum(1)
            rows_at_once = max(1, MOST_DISTANCES // self.num_codes)
            chunks = torch.split(z.reshape(-1, z.shape[-1]), rows_at_once)
            found = [torch.addmm(squares, rows, weight.T, alpha=-2).argmin(1) for rows in chunks]
        return torch.cat(found).reshape(z.shape[:-1])

    def lookup(self, codes: Tensor) -> Tensor:
        """The codes themselves, (B, z, h, w), by their numbers, (B, h, w)."""
        return F.embedding(codes, self.embedding.weight).movedim(-1, 1)


def mean_square(x: Tensor) -> Tensor:
    """The mean of the squares of each image, (B,)."""
    return x.square().flatten(1).mean(1)
