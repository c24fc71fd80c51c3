"""Which tokens of one text correspond to which of another."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Words = Sequence[tuple[str, Sequence[int]]]
"""The words of a text in order, each with the places of its tokens in the context."""


class Alignment(NamedTuple):
    """Where the attention to each token of the target comes from.

    Attributes:
        matrix: M, float32 (K, K): the share of the attention to source token i that target token j gets.
        taken: Whether target token j has a source at all, bool (K,); otherwise it keeps its own attention.
    """

    matrix: Tensor
    taken: Tensor


def from_pairs(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], length: int) -> Alignment:
    """An alignment in which groups of source tokens stand for groups of target tokens.

    Groups of one size correspond token by token; otherwise each source token is spread evenly over the target's.

    Args:
        pairs: Places of the source and of the target, for each group.
        length: Number of tokens of the context, K.
    """
    matrix = torch.zeros(length, length)
    for source, target in pairs:
        if len(source) == len(target):
            matrix[list(source), list(target)] = 1
        else:
            for place in source:
                matrix[place, list(target)] = 1 / len(target)
    return Alignment(matrix, matrix.any(0))


def groups(words: Words, length: int) -> list[list[int]]:
    """The places of a context from first to last, those of a word in one group, and each other one in its own."""
    word_at = {place: number for number, (_, places) in enumerate(words) for place in places}
    found: list[list[int]] = []
    previous = None
    for place in range(length):
        number = word_at.get(place)
        if number is not None and number == previous:
            found[-1].append(place)
        else:
            found.append([place])
        previous = number
    return found


def replacement(source: Words, target: Words, length: int) -> Alignment:
    """Aligns word by word two texts of which some words differ.

    Tokens that are no words, such as those that end and fill up a text, correspond in their order. (The published code
    takes them, and words behind a replaced one, at equal places, which is wrong where the words have not as many
    tokens.)

    Args:
        source: The words of the source.
        target: As many words.
        length: Number of tokens of the context.

    Raises:
        ValueError: If the numbers of words differ.

    Source: Hertz et al. 2022, section 3.2, "word swap", and its code.
    """
    if len(source) != len(target):
        raise ValueError(
            f"edit: a text of {len(source)} words cannot be aligned word by word with one of {len(target)}; give the "
            "new text with --edit.refine"
        )
    return from_pairs(list(zip(groups(source, length), groups(target, length), strict=False)), length)


def refinement(source: Sequence[Hashable], target: Sequence[Hashable]) -> Alignment:
    """Aligns the tokens that two texts have in common; other tokens of the target have no source.

    The alignment has the best score of Needleman and Wunsch with gap 0, match 1 and mismatch -1. Among several the one
    that aligns the earliest tokens is taken.

    Args:
        source: Tokens of the source, K, with those that fill up the context.
        target: Tokens of the target, K.

    Source: Hertz et al. 2022, section 3.2, "adding a new phrase", and its code.
    """
    rows, columns = len(source), len(target)
    # best[i][j]: the score of source[i:] and target[j:]; a mismatch is never better than two gaps.
    best = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            match = best[i + 1][j + 1] + 1 if source[i] == target[j] else 0
            best[i][j] = max(match, best[i + 1][j], best[i][j + 1])
    pairs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < rows and j < columns:
        if source[i] == target[j]:
            pairs.append(([i], [j]))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return from_pairs(pairs, columns)
