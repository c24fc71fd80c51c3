"""Texts as tensors, so that captions travel with batches as images and labels do."""

from collections.abc import Sequence

import torch
from torch import Tensor


def encode_text(texts: Sequence[str]) -> Tensor:
    """Texts as UTF-8 bytes, uint8 (B, L): each is followed by at least one zero, and zeros fill up the shorter ones."""
    encoded = [text.replace("\0", " ").encode() + b"\0" for text in texts]
    length = max(map(len, encoded), default=1)
    data = bytearray(b"".join(text.ljust(length, b"\0") for text in encoded))
    if not data:
        return torch.zeros(0, length, dtype=torch.uint8)
    return torch.frombuffer(data, dtype=torch.uint8).reshape(len(encoded), length)


def decode_text(encoded: Tensor) -> list[str]:
    """The texts of such a tensor, (B, L); without the zeros, and with what is no UTF-8 replaced."""
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in encoded.cpu()]


def stack_texts(encoded: Sequence[Tensor]) -> Tensor:
    """Stacks texts of different lengths, (L_i,) each, into one tensor, uint8 (B, max L_i)."""
    return torch.nn.utils.rnn.pad_sequence(list(encoded), batch_first=True)
