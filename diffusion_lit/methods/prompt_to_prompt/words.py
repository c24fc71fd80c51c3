"""Texts, their words and the tokens of these, as a model of texts has them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffusion_lit.conditioners import Prompts
from diffusion_lit.methods.prompt_to_prompt.alignment import Words
from diffusion_lit.methods.prompt_to_prompt.control import cross_layers
from diffusion_lit.module import DiffusionModule
from diffusion_lit.text import decode_text
from diffusion_lit.types import Condition


def texts_of(model: DiffusionModule, method: str) -> Prompts:
    """The texts of a model whose attention to words can be seen.

    Raises:
        ValueError: If the model takes no texts, or does not attend to them.
    """
    if not isinstance(model.conditioner, Prompts):
        raise ValueError(
            f"edit: {method} needs a model of texts, with a conditioner such as Text; this one has "
            f"{type(model.conditioner).__name__}"
        )
    network = model.denoiser.network
    if not cross_layers(network):
        raise ValueError(
            f"edit: {method} needs a network with cross-attention, which this {type(network).__name__} lacks; train "
            "one with context_width, such as ADMUNet"
        )
    return model.conditioner


def require_known(option: str, text: str, texts: Prompts) -> None:
    """Raises ValueError if the vocabulary lacks a word of a new text."""
    [tokens] = texts.tokens_of([text]).tolist()
    for word, places in texts.words(text):
        if any(tokens[place] == texts.unknown for place in places):
            raise ValueError(
                f"edit.{option}: the model's vocabulary has no tokens for {word!r}; use words of its captions"
            )


def prompts_of(condition: Condition) -> list[str]:
    """The texts of a batch; raises ValueError if there are none."""
    if "caption" not in condition:
        raise ValueError('edit: there are no texts to edit; give --prompts "a text"')
    return decode_text(condition["caption"])


def pairs_of(option: str, given: str | Sequence[str] | None, separator: str) -> list[tuple[str, str]]:
    """Pairs such as three:seven, several of them between commas or in a list.

    Raises:
        ValueError: If one is no pair.
    """
    texts = [] if given is None else given.split(",") if isinstance(given, str) else list(given)
    pairs = []
    for text in texts:
        first, found, second = (part.strip() for part in text.partition(separator))
        if not (first and found and second):
            raise ValueError(f"edit.{option}={text!r} must be two words with {separator!r} between them")
        pairs.append((first, second))
    return pairs


def require_word(option: str, word: str, prompt: str, words: Words) -> list[int]:
    """The places of all tokens of a word.

    Raises:
        ValueError: If the text does not have it.
    """
    places = [place for known, where in words for place in where if known == word]
    if not places:
        raise ValueError(
            f"edit.{option}: the text {prompt!r} has no word {word!r}; its words are "
            f"{', '.join(known for known, _ in words) or 'none'}"
        )
    return places


def replace_words(prompt: str, words: Words, swaps: Mapping[str, str]) -> str:
    """A text with some of its words swapped, wherever they stand.

    Raises:
        ValueError: If it does not have one of them.
    """
    for old in swaps:
        require_word("replace", old, prompt, words)
    new, rest = [], prompt
    for word, _ in words:
        before, found, rest = rest.partition(word)
        new += [before, swaps.get(found, found)]
    return "".join([*new, rest])


def marked(words: Words, chosen: Sequence[str], length: int) -> Tensor:
    """Which tokens belong to some words of a text, bool (length,)."""
    mark = torch.zeros(length, dtype=torch.bool)
    mark[[place for word, places in words if word in chosen for place in places]] = True
    return mark
