"""From texts to tokens, by a vocabulary that is learned from the captions of a data set."""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion_lit.types import Part

PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
MOST_LETTERS = 1000
"""Most letters that a vocabulary has; words with rarer ones are unknown."""


def _has_pattern(value: Any) -> bool:
    """Whether a tokenizer's JSON holds a regular expression."""
    if isinstance(value, dict):
        return "Regex" in value or any(map(_has_pattern, value.values()))
    return isinstance(value, list) and any(map(_has_pattern, value))


class Tokens(NamedTuple):
    """Texts as tokens.

    Attributes:
        ids: int64, (B, L).
        cut: How many tokens of each text did not fit, (B,).
    """

    ids: Tensor
    cut: list[int]


class Word(NamedTuple):
    """A word of a text.

    Attributes:
        text: As the tokenizer reads it.
        positions: Of its tokens, among the L.
    """

    text: str
    positions: list[int]


class Tokenizer(nn.Module, Part):
    """Turns texts into tokens."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether it has a vocabulary."""

    @property
    def learns(self) -> bool:
        """Whether `learn` needs texts."""
        return True

    @property
    def unknown(self) -> int | None:
        """The token of what the vocabulary cannot express; None: it can express everything."""
        return None

    def learn(self, texts: Iterable[str], vocabulary: int) -> None:
        """Makes the vocabulary; the same on every process.

        Args:
            texts: What training shows.
            vocabulary: Most tokens.

        Raises:
            ValueError: If that is not possible.
        """

    @abstractmethod
    def forward(self, texts: Sequence[str], length: int) -> Tokens:
        """Turns each text into `length` tokens; longer ones are cut, shorter ones padded.

        Raises:
            ValueError: If there is no vocabulary yet.
        """

    @abstractmethod
    def words(self, text: str, length: int) -> list[Word]:
        """The words of a text that fits into `length` tokens at least in part, with their places."""


class WordPiece(Tokenizer):
    """Words, and parts of rarer words: the tokenizer of BERT, with a vocabulary of its own.

    A text becomes [CLS], its tokens, [SEP] and as many [PAD] as fit. The vocabulary is learned from the captions before
    a new run and travels in checkpoints, as the bytes of the JSON text that the `tokenizers` package reads. Learning
    takes the same captions in the same order on every process and gives the same vocabulary.

    Args:
        file: A vocabulary to take instead of learning one: a `tokenizer.json`, or BERT's `vocab.txt`. It is read before
            a new run, and not needed afterwards.
        lowercase: Whether upper-case letters and accents are removed.

    Source: Schuster & Nakajima 2012; Devlin et al. 2019 (BERT); its use here: Rombach et al. 2022, appendix E.2.1.
    """

    only_at_start = ("file", "lowercase")

    def __init__(self, file: str | None = None, lowercase: bool = True) -> None:
        super().__init__()
        self.file = file
        self.lowercase = lowercase
        self._json = ""
        self._tokenizer: Any = None

    @property
    def ready(self) -> bool:
        return self._tokenizer is not None

    @property
    def learns(self) -> bool:
        return self.file is None

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary; 0: there is none yet."""
        return self._tokenizer.get_vocab_size() if self.ready else 0

    @property
    def unknown(self) -> int | None:
        return int(self._special(UNKNOWN)[0])

    def learn(self, texts: Iterable[str], vocabulary: int) -> None:
        learned = self._learned(texts, vocabulary) if self.file is None else self._read(Path(self.file).expanduser())
        size = learned.get_vocab_size()
        if size > vocabulary:
            raise ValueError(
                f"the vocabulary of {self.file or 'the captions'} has {size} tokens, the text encoder {vocabulary}; "
                f"set --model.conditioner.encoder.vocabulary {size}"
            )
        try:
            self._take(learned.to_str())
        except ValueError as error:
            raise ValueError(f"conditioner.tokenizer.file={self.file} cannot be used: {error}") from error

    def _learned(self, texts: Iterable[str], vocabulary: int) -> Any:
        from tokenizers.trainers import WordPieceTrainer

        special = [PAD, UNKNOWN, BEGIN, END]
        tokenizer = self._bert({token: number for number, token in enumerate(special)})
        counts = Counter(
            word
            for text in texts
            for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        )
        letters: Counter[str] = Counter()
        for word, count in counts.items():
            letters.update(dict.fromkeys(word, count))
        # Each letter takes two tokens, one that begins a word and one that does not.
        most = max(1, min(MOST_LETTERS, (vocabulary - len(special)) // 4))
        alphabet = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:most])
        words = sorted(word for word in counts if set(word) <= set(alphabet))
        # The package numbers the letters that do not begin a word in a random order, by which it then breaks ties,
        # unless they have numbers already.
        trainer = WordPieceTrainer(
            vocab_size=vocabulary,
            special_tokens=[*special, *(f"##{letter}" for letter in alphabet)],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator((word for word in words for _ in range(counts[word])), trainer)
        return self._bert(tokenizer.get_vocab())

    def _read(self, path: Path) -> Any:
        from tokenizers import Tokenizer as Backend

        try:
            if path.suffix == ".json":
                return Backend.from_file(str(path))
            lines = path.read_text(encoding="utf-8").splitlines()
            return self._bert({word: number for number, word in enumerate(lines)})
        except Exception as error:  # The package raises plain exceptions.
            raise ValueError(
                f"conditioner.tokenizer.file={self.file} is no tokenizer.json and no vocab.txt: {error}"
            ) from error

    def _bert(self, vocabulary: dict[str, int]) -> Any:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        missing = [token for token in (PAD, UNKNOWN, BEGIN, END) if token not in vocabulary]
        if missing:
            raise ValueError(f"it has no {' and no '.join(missing)}")
        tokenizer = Backend(models.WordPiece(vocabulary, unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    def _take(self, text: str) -> None:
        from tokenizers import Tokenizer as Backend

        if _has_pattern(json.loads(text)):
            raise ValueError("it splits or replaces by a regular expression, which can take for ever")
        tokenizer = Backend.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._json, self._tokenizer = text, tokenizer

    def _special(self, *names: str) -> list[int]:
        self._require()
        return [self._tokenizer.token_to_id(name) for name in names]

    def _require(self) -> None:
        if not self.ready:
            raise ValueError(
                "the text encoder has no vocabulary yet: it is learned when training starts, and checkpoints hold it"
            )

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        self._require()
        # One by one: the package would start threads for a batch, which a process must not have when it forks.
        return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def forward(self, texts: Sequence[str], length: int) -> Tokens:
        encoded = self._encoded(texts)
        pad, begin, end = self._special(PAD, BEGIN, END)
        room = length - 2
        ids = torch.full((len(texts), length), pad)
        for row, text in zip(ids, encoded, strict=True):
            kept = [begin, *text.ids[:room], end]
            row[: len(kept)] = torch.tensor(kept)
        return Tokens(ids, [max(len(text.ids) - room, 0) for text in encoded])

    def words(self, text: str, length: int) -> list[Word]:
        [encoded] = self._encoded([text])
        places: dict[int, list[int]] = {}
        for position, number in enumerate(encoded.word_ids[: length - 2]):
            places.setdefault(number, []).append(position + 1)
        spans = {number: encoded.word_to_chars(number) for number in places}
        return [Word(text[slice(*spans[number])], positions) for number, positions in places.items()]

    def get_extra_state(self) -> Tensor:
        """The JSON text of the vocabulary, uint8, (n,); n = 0: there is none yet."""
        return torch.tensor(list(self._json.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over what `get_extra_state` returned.

        Raises:
            ValueError: If it is no such text.
        """
        text = bytes(state.tolist()).decode(errors="replace")
        if not text:
            self._json, self._tokenizer = "", None
            return
        try:
            self._take(text)
        except Exception as error:  # The package raises plain exceptions.
            raise ValueError(f"the checkpoint's vocabulary cannot be read: {error}") from error
