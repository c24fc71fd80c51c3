"""Whether images show what their prompts say, where prompts name classes."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion_lit.metrics.features import FeatureExtractor
from diffusion_lit.metrics.scores import Evidence, Score
from diffusion_lit.text import decode_text
from diffusion_lit.types import Condition


def find_words(texts: Sequence[str], words: Sequence[Sequence[str]]) -> Tensor:
    """Which group of words each text has a word of: int64, (B,); -1: of none, or of several."""
    groups = {word.lower(): number for number, group in enumerate(words) for word in group}
    found = [{groups[word] for word in re.findall(r"\w+", text.lower()) if word in groups} for text in texts]
    return torch.tensor([next(iter(numbers)) if len(numbers) == 1 else -1 for numbers in found])


def check_words(name: str, words: Sequence[Sequence[str]], count: int) -> None:
    """Raises ValueError if there are fewer groups of words than `count`, an empty one, or a word in two of them."""
    every = [word.lower() for group in words for word in group]
    if len(words) < count or not all(words) or len(set(every)) < len(every):
        raise ValueError(
            f"{name}: {[list(group) for group in words]} must be {count} or more lists of words, such as "
            "[[cat, kitten], [dog]], no word twice"
        )


class PromptAgreement(Score):
    """How often a classifier sees the class that the prompt names; prompts that name none or several do not count.

    Args:
        words: Of each class of the classifier, in its order, the words that name it; upper and lower case are the same.
        extractor: A classifier, such as `TrainedFeatures`; None: that of the evaluation.

    Raises:
        ValueError: If there are not two classes, or one has no word of its own.

    Source: none; for digits it takes the place of the CLIP score.
    """

    against = "nothing"
    output = "logits"

    def __init__(self, words: Sequence[Sequence[str]], extractor: FeatureExtractor | None = None) -> None:
        super().__init__(extractor)
        check_words("PromptAgreement.words", words, 2)
        self.words = [list(group) for group in words]

    def per_image(self, generator: nn.Module, images: Tensor, condition: Condition) -> dict[str, Tensor]:
        return {"prompt_agreement.class": find_words(_captions(condition), self.words)}

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        wanted = evidence.columns["prompt_agreement.class"]
        if evidence.generated.shape[1] != len(self.words):
            raise ValueError(
                f"PromptAgreement.words: {len(self.words)} lists of words, but {extractor.name} tells "
                f"{evidence.generated.shape[1]} classes apart; give one list for each, in its order"
            )
        seen = evidence.generated.argmax(1).cpu()
        return {extractor.scalar("prompt_agreement"): _share(seen == wanted, wanted >= 0, "PromptAgreement")}


class InkAgreement(Score):
    """How often an image has more ink than half of the real images of its class where the prompt says so, or less.

    Ink is the mean brightness. Prompts without a word of either kind, or without a class, do not count.

    Args:
        words: Of each class, in the order of the data's labels, the words that name it.
        more: Words that ask for much ink.
        less: Words that ask for little.

    Raises:
        ValueError: If a class or an amount has no word of its own.
    """

    against = "features"

    def __init__(
        self, words: Sequence[Sequence[str]], more: Sequence[str] = ("bold",), less: Sequence[str] = ("thin",)
    ) -> None:
        super().__init__(Ink())
        check_words("InkAgreement.words", words, 1)
        check_words("InkAgreement.more and less", [more, less], 2)
        self.words = [list(group) for group in words]
        self.more, self.less = list(more), list(less)

    def per_image(self, generator: nn.Module, images: Tensor, condition: Condition) -> dict[str, Tensor]:
        texts = _captions(condition)
        return {
            "ink_agreement.class": find_words(texts, self.words),
            "ink_agreement.less": find_words(texts, [self.more, self.less]),
        }

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        if evidence.real is None or evidence.real_labels is None:
            raise ValueError("InkAgreement: the real images have no classes; leave the score out")
        wanted, less = (evidence.columns[f"ink_agreement.{name}"] for name in ("class", "less"))
        ink, real = evidence.generated.cpu().flatten(), evidence.real.cpu().flatten()
        middle = torch.full((len(self.words),), float("nan"))
        for label in set(evidence.real_labels.tolist()) & set(range(len(self.words))):
            middle[label] = real[evidence.real_labels == label].median()
        bound = middle[wanted.clamp(min=0)]
        counts = (wanted >= 0) & (less >= 0) & bound.isfinite()
        return {"ink_agreement": _share(torch.where(less == 1, ink < bound, ink > bound), counts, "InkAgreement")}


class Ink(FeatureExtractor):
    """The mean brightness of an image, in [0, 1]."""

    name = "ink"
    num_features = 1

    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1).mean(1, keepdim=True) / 255


def _captions(condition: Condition) -> list[str]:
    if "caption" not in condition:
        raise ValueError("scores of prompts need a model of texts; leave the score out")
    return decode_text(condition["caption"])


def _share(right: Tensor, counts: Tensor, name: str) -> float:
    if not counts.any():
        raise ValueError(f"{name}: no prompt names what its words name; give the words that prompts have")
    return float(right[counts].double().mean())
