import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Ten different 340 x 300 pieces of scikit-learn's two photographs."""
    corners = [(0, 0), (300, 0), (0, 127), (300, 127), (150, 60)]
    return [
        Image.fromarray(array).crop((left, top, left + 340, top + 300))
        for array in load_sample_images().images
        for left, top in corners
    ]


@pytest.fixture(scope="session")
def encoded(photographs: list[Image.Image]) -> list[bytes]:
    """The photographs as files: JPEG, the last as WebP, as LSUN mixes them."""
    files = []
    for i, photograph in enumerate(photographs):
        stream = io.BytesIO()
        photograph.save(stream, "WEBP" if i == 9 else "JPEG", quality=90)
        files.append(stream.getvalue())
    return files


@pytest.fixture
def photo_folder(tmp_path: Path, encoded: list[bytes]) -> Callable[..., Path]:
    """Writes the first `count` photographs as 000.jpg, 001.jpg, ..., those in `broken` cut in half."""

    def write(count: int = 6, broken: tuple[int, ...] = (), name: str = "photographs") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for i in range(count):
            data = encoded[i]
            (folder / f"{i:03}.jpg").write_bytes(data[: len(data) // 2] if i in broken else data)
        return folder

    return write
