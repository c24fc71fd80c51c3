"""The captions of images."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from diffusion_lit.data.decode import spread
from diffusion_lit.text import encode_text


class Captions:
    """The captions of images, of which each has one or more, in arrays that worker processes share.

    Args:
        texts: The captions of each image.

    Raises:
        ValueError: If an image has none.
    """

    def __init__(self, texts: Iterable[Sequence[str]]) -> None:
        first, ends, parts = [0], [0], []
        for image, captions in enumerate(texts):
            if not captions:
                raise ValueError(f"image {image} has no caption")
            for caption in captions:
                parts.append(caption.encode(errors="replace"))
                ends.append(ends[-1] + len(parts[-1]))
            first.append(len(parts))
        # Arrays: worker processes share them, where reference counts make them copy a list of strings.
        self._first = np.array(first, dtype=np.int64)
        self._ends = np.array(ends, dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> "Captions":
        """From what `arrays` returned.

        Raises:
            ValueError: If they are not such arrays, as in a file that something else wrote.
        """
        first, ends, text = arrays
        fit = text.dtype == np.uint8 and text.ndim == 1
        for array, end, step in ((first, len(ends) - 1, 1), (ends, text.size, 0)):
            fit = fit and array.dtype == np.int64 and array.ndim == 1 and array.size > 0
            fit = fit and array[0] == 0 and array[-1] == end and bool((array[1:] - array[:-1] >= step).all())
        if not fit:
            raise ValueError("its captions do not fit together")
        captions = cls(())
        captions._first, captions._ends, captions._bytes = arrays
        return captions

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The number of each image's first caption, and how many there are, int64 (N + 1,); the end of each caption in
        the text and 0 before them, int64; and the text, UTF-8, uint8.
        """
        return self._first, self._ends, self._bytes

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, image: int) -> list[str]:
        """All captions of an image."""
        return [self._text(number) for number in range(self._first[image], self._first[image + 1])]

    def _text(self, number: int) -> str:
        return self._bytes[self._ends[number] : self._ends[number + 1]].tobytes().decode(errors="replace")

    def choose(self, indices: Sequence[int], draws: Sequence[int]) -> Tensor:
        """One caption of each image.

        Args:
            indices: Which images, (B,).
            draws: Decides which of the captions of each, (B,); 0: the first.

        Returns:
            uint8, (B, L), as `encode_text` returns it.
        """
        texts = []
        for image, draw in zip(indices, draws, strict=True):
            first, end = int(self._first[image]), int(self._first[image + 1])
            texts.append(self._text(first + draw % (end - first)))
        return encode_text(texts)

    def some(self, at_most: int) -> Iterator[str]:
        """Captions evenly spread over all, in order; all of them where there are no more."""
        return map(self._text, spread(len(self._ends) - 1, at_most))

    def kept(self, indices: Iterable[int]) -> "Captions":
        """The captions of some images."""
        return Captions(self[image] for image in indices)

    def fingerprint(self) -> str:
        """SHA-256 of the captions."""
        digest = hashlib.sha256()
        for array in self.arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
