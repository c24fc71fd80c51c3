"""Texts as the context of a network: encoders that are trained with it, and what all of them share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from diffusion_lit.codec import Codec
from diffusion_lit.conditioner import Conditioner
from diffusion_lit.conditioners.tokenizer import Tokenizer, Tokens, Word, WordPiece
from diffusion_lit.data import ImageData
from diffusion_lit.networks import TextEncoder
from diffusion_lit.text import decode_text
from diffusion_lit.types import Condition

LEARNED_FROM = 1_000_000
"""Most captions that a vocabulary is learned from."""


class Prompts(Conditioner):
    """Texts, encoded as the `context` of the network; the base of what encodes them.

    The null condition is the empty text, encoded as any other.

    Args:
        dropout: Probability, in [0, 1), that a text is replaced by the empty one in training.

    Raises:
        ValueError: If the probability is out of range.
    """

    entries = ("caption",)
    roles = ("context",)

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"conditioner.dropout={dropout} must lie in [0, 1); 0.1 is usual for guidance")
        self.dropout = dropout
        self._warned = False

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of the context."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encodes texts: (B, L, width), on the device of the weights."""

    @abstractmethod
    def tokens_of(self, texts: Sequence[str]) -> Tensor:
        """The tokens that are encoded, padding included: int64, (B, L)."""

    @abstractmethod
    def words(self, text: str) -> list[Word]:
        """The words of a text, in order, each with the places of its tokens among the L; what was cut is left out."""

    @property
    def unknown(self) -> int | None:
        """The token of what the vocabulary cannot express; None: it can express everything."""
        return None

    def forward(self, given: Condition, codec: Codec) -> Condition:
        if "caption" not in given:
            raise ValueError('the model makes images from texts and was given none; give --prompts, "" for no text')
        texts = decode_text(given["caption"])
        if self.training and self.dropout:
            dropped = (torch.rand(len(texts)) < self.dropout).tolist()
            texts = ["" if drop else text for text, drop in zip(texts, dropped, strict=True)]
        return {"context": self.encode(texts)}

    def null(self, condition: Condition) -> Condition:
        return {"context": self.encode([""]).expand(len(condition["context"]), -1, -1)}

    def has_null(self, network: nn.Module) -> bool:
        return True

    def check(self, network: nn.Module) -> None:
        """Raises ValueError if the network has no cross-attention, or one to tokens of another width."""
        wanted = getattr(network, "context_width", None)
        if wanted != self.width:
            has = "attends to no context" if wanted is None else f"has context_width={wanted}"
            raise ValueError(
                f"conditioner: the {type(self).__name__} makes tokens of width {self.width} and the "
                f"{type(network).__name__} {has}; set --model.network.context_width {self.width}"
            )

    def warn(self, texts: Sequence[str], cut: Sequence[int], length: int) -> None:
        """Warns once of a text that was cut.

        Args:
            texts: The texts, B.
            cut: How many tokens of each did not fit, (B,).
            length: How many fit.
        """
        first = next((row for row, number in enumerate(cut) if number), None)
        if first is None or self._warned:
            return
        self._warned = True
        text = texts[first] if len(texts[first]) <= 60 else texts[first][:57] + "..."
        rank_zero_warn(
            f"{cut[first]} tokens of the text {text!r} were cut: the text encoder takes {length}, with begin and end; "
            "this is said once"
        )


class Text(Prompts):
    """A text encoder that is trained with the network, and a tokenizer that learns its vocabulary from the captions.

    Its weights are averaged with the network's. The authors' code averages the network alone and samples with the
    encoder's newest weights; `--weights raw` is not that either.

    Args:
        encoder: The encoder; its `width` is the network's `context_width`.
        tokenizer: Makes tokens of texts.
        dropout: Probability, in [0, 1), that a text is replaced by the empty one in training.

    Raises:
        ValueError: If the probability is out of range, or the encoder takes fewer than 3 tokens.

    Source: Rombach et al. 2022, section 4.3 and appendix E.2.1. Its code drops no texts; Ho & Salimans 2022 do.
    """

    def __init__(self, encoder: TextEncoder, tokenizer: Tokenizer | None = None, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        if encoder.length < 3:
            raise ValueError(f"conditioner.encoder.length={encoder.length} must be at least 3: begin, a token, end")
        self.encoder = encoder
        self.tokenizer = WordPiece() if tokenizer is None else tokenizer

    @property
    def width(self) -> int:
        return self.encoder.width

    @property
    def vocabulary(self) -> int:
        """Most tokens that the encoder tells apart."""
        return self.encoder.token_emb.num_embeddings

    def encode(self, texts: Sequence[str]) -> Tensor:
        ids, cut = self.tokenizer(texts, self.encoder.length)
        self.warn(texts, cut, self.encoder.length)
        return cast(Tensor, self.encoder(ids.to(self.encoder.token_emb.weight.device)))

    def tokens_of(self, texts: Sequence[str]) -> Tensor:
        return cast(Tokens, self.tokenizer(texts, self.encoder.length)).ids

    def words(self, text: str) -> list[Word]:
        return self.tokenizer.words(text, self.encoder.length)

    @property
    def unknown(self) -> int | None:
        return self.tokenizer.unknown

    def start(self, data: L.LightningDataModule | None, device: torch.device) -> None:
        """Has the tokenizer learn its vocabulary, unless it has one, such as that of other weights to start from.

        Raises:
            ValueError: If there are no captions.
        """
        if self.tokenizer.ready:
            return
        texts: list[str] = []
        if self.tokenizer.learns and isinstance(data, ImageData):
            data.prepare_data()
            texts = data.dataset("train").texts(LEARNED_FROM)
        if self.tokenizer.learns and not texts:
            raise ValueError(
                "the text encoder learns its vocabulary from captions, which the data lack; choose a --data.source "
                "that has them"
            )
        self.tokenizer.learn(texts, self.vocabulary)
        if self.tokenizer.learns:
            rank_zero_info(f"vocabulary learned from {len(texts):,} captions")
