"""Simplex noise: smooth random fields of several wavelengths, for training and for sampling."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lit.diffusion.noise import ImageNoise, NoiseSource

ENTRIES = 256
DEPTHS = 1000
"""Numbers of parallel slices through the three-dimensional noise, one pixel apart, that images are drawn from."""

STRETCH, SQUISH, NORM, RADIUS = -1 / 6, 1 / 3, 103.0, 2**0.5
GRADIENTS = [
    [sign * size for sign, size in zip(signs, sizes, strict=True)]
    for signs in ((-1, 1, 1), (1, 1, 1), (-1, -1, 1), (1, -1, 1), (-1, 1, -1), (1, 1, -1), (-1, -1, -1), (1, -1, -1))
    for sizes in ((11, 4, 4), (4, 11, 4), (4, 4, 11))
]
"""Directions to the vertices of a rhombicuboctahedron, (24, 3)."""


def neighbours() -> list[tuple[int, int, int]]:
    """Lattice points, from the corner of the cell that a position lies in, that can be nearer to it than `RADIUS`."""
    inside = torch.tensor(list(itertools.product(torch.linspace(0, 1, 9).tolist(), repeat=3)), dtype=torch.float64)
    position = inside + inside.sum(1, keepdim=True) * SQUISH
    offsets = list(itertools.product(range(-1, 3), repeat=3))
    points = torch.tensor(offsets, dtype=torch.float64)
    points = points + points.sum(1, keepdim=True) * SQUISH
    near = torch.cdist(position, points).amin(0) < RADIUS - 1e-9
    return [(i, j, k) for (i, j, k), is_near in zip(offsets, near.tolist(), strict=True) if is_near]


NEIGHBOURS = neighbours()
VARIANCE = 51 / NORM**2 * 2 * math.pi * 2**10 * 2**0.5 * math.gamma(2.5) * math.gamma(9) / math.gamma(11.5) / 2
"""Of the noise at a random position: E[(g d)^2] = 51 |d|^2, times (2 - |d|^2)^8, over the lattice of cell volume 2."""


def simplex(permutation: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Three-dimensional OpenSimplex noise, in about (-1, 1).

    The sum over all lattice points near a position. The published algorithm leaves out some of the farthest: at 4 % of
    positions it differs from the sum, by up to 2e-4, and jumps by as much.

    Args:
        permutation: Of 0 .. 255, int64, (B, 256): chooses the field of each image.
        x: Coordinates, float64, (B, N).
        y: Coordinates, float64, (B, N).
        z: Coordinates, float64, (B, N).

    Returns:
        float32, (B, N).

    Source: Spencer 2014, OpenSimplex noise (public domain), noise3 of the `opensimplex` package.
    """
    stretch = (x + y + z) * STRETCH
    corner = [torch.floor(c + stretch) for c in (x, y, z)]
    squish = (corner[0] + corner[1] + corner[2]) * SQUISH
    inside = [(c - b - squish).float() for c, b in zip((x, y, z), corner, strict=True)]
    first, second, third = (b.long() for b in corner)
    gradients = torch.tensor(GRADIENTS, dtype=torch.float32, device=x.device)[permutation % len(GRADIENTS)]
    hashed_x: dict[int, Tensor] = {}
    hashed_xy: dict[tuple[int, int], Tensor] = {}
    value = torch.zeros_like(inside[0])
    for i, j, k in NEIGHBOURS:
        if i not in hashed_x:
            hashed_x[i] = permutation.gather(1, first + i & 255)
        if (i, j) not in hashed_xy:
            hashed_xy[i, j] = permutation.gather(1, hashed_x[i] + second + j & 255)
        index = hashed_xy[i, j] + third + k & 255
        shift = (i + j + k) * SQUISH
        d = [inside[0] - i - shift, inside[1] - j - shift, inside[2] - k - shift]
        near = (2 - d[0] * d[0] - d[1] * d[1] - d[2] * d[2]).clamp(min=0).square().square()
        slope = sum(gradients[:, :, axis].gather(1, index) * d[axis] for axis in range(3))
        value += near * slope
    return value / NORM


class Simplex(NoiseSource):
    """Octaves of simplex noise, as published for AnoDDPM: smooth structures of several sizes instead of single pixels.

    The field of an image is sum over octaves o of persistence^o S(2^o x / wavelength, 2^o y / wavelength, 2^o z /
    wavelength), one field for all channels; the paper's images are grey, and its code came to draw one for each. Each
    draw has its own permutation and its own slice z in 0 .. 999; the published code takes the time step for z. The
    field is not of variance 1: with six octaves its standard deviation is 0.50, and neighbouring pixels are correlated
    by 0.96. The formulas of the process are used with it as they are.

    Args:
        octaves: Number of wavelengths, each half the one before.
        persistence: Ratio of the amplitudes of successive octaves, above 0.
        wavelength: Of the first octave in pixels; the published code calls it the frequency.

    Raises:
        ValueError: If a number is out of range.

    Source: Wyatt et al. 2022 (AnoDDPM), section 3.2.
    """

    def __init__(self, octaves: int = 6, persistence: float = 0.8, wavelength: float = 64.0) -> None:
        if octaves < 1:
            raise ValueError(f"noise.octaves={octaves} must be at least 1; AnoDDPM has 6")
        if not persistence > 0:
            raise ValueError(f"noise.persistence={persistence} must be above 0; AnoDDPM has 0.8")
        if not wavelength > 0:
            raise ValueError(f"noise.wavelength={wavelength} pixels must be above 0; AnoDDPM has 64")
        self.octaves = octaves
        self.persistence = persistence
        self.wavelength = wavelength

    @property
    def std(self) -> float:
        """Standard deviation of the published field at a random position."""
        return math.sqrt(VARIANCE * sum(self.persistence ** (2 * octave) for octave in range(self.octaves)))

    def scale(self) -> float:
        """Factor of the field."""
        return 1.0

    def field(self, permutation: Tensor, depth: Tensor, shape: Sequence[int]) -> Tensor:
        """Computes the field of each image.

        Args:
            permutation: Of 0 .. 255, int64, (B, 256).
            depth: The slice z, (B,).
            shape: (C, H, W).

        Returns:
            float32, (B, C, H, W), the same in all channels.
        """
        channels, height, width = shape
        pixel = torch.arange(height * width, dtype=torch.float64, device=permutation.device).expand(
            len(permutation), -1
        )
        row, column = pixel.div(width, rounding_mode="floor"), pixel % width
        z = depth.to(torch.float64)[:, None].expand(-1, height * width)
        total = torch.zeros(len(permutation), height * width, device=permutation.device)
        for octave in range(self.octaves):
            per_pixel = 2**octave / self.wavelength
            total += self.persistence**octave * simplex(permutation, *(c * per_pixel for c in (column, row, z)))
        return (self.scale() * total).reshape(-1, 1, height, width).expand(-1, channels, -1, -1).contiguous()

    def like(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        keys = torch.rand(len(x), ENTRIES, device=x.device, generator=generator)
        depth = torch.randint(DEPTHS, (len(x),), device=x.device, generator=generator)
        return self.field(keys.argsort(dim=1, stable=True), depth, x.shape[1:]).to(x.dtype)

    def images(
        self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> ImageNoise:
        return SimplexImageNoise(self, seed, indices, shape, device)


class NormalizedSimplex(Simplex):
    """Simplex noise divided by its standard deviation, so that it is of variance 1 as the process assumes.

    This is a choice of ours and not AnoDDPM's.
    """

    def scale(self) -> float:
        return 1 / self.std


class SimplexImageNoise(ImageNoise):
    """Simplex noise of images: draw n of image i is a function of (seed, i, n), the shape and the source's settings.

    Args:
        source: Computes the fields.
        seed: In 0 .. 2^64 - 1.
        indices: Images, (B,), each at least 0.
        shape: (C, H, W).
        device: Device of the noise.

    Raises:
        ValueError: If the seed or an index is out of range.
    """

    def __init__(
        self,
        source: Simplex,
        seed: int,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(seed, indices, shape, device)
        self.source = source

    def draw(self, shape: Sequence[int] | None = None) -> Tensor:
        words = torch.cat(self.words(ENTRIES + 1), dim=1)
        permutations = words[:, :ENTRIES].argsort(dim=1, stable=True)
        shape = self.shape if shape is None else tuple(shape)
        return self.source.field(permutations, words[:, ENTRIES] % DEPTHS, shape)
