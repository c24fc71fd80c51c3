"""The editing method: one text's images, changed as another text says."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffusion_lit.conditioners import Prompts
from diffusion_lit.diffusion import ImageNoise, Sampler
from diffusion_lit.diffusion.samplers.base import AmendFn
from diffusion_lit.edit import Edit
from diffusion_lit.methods.prompt_to_prompt.alignment import Alignment, Words, refinement, replacement
from diffusion_lit.methods.prompt_to_prompt.control import (
    Change,
    Clock,
    Maps,
    blend_mask,
    cross_layers,
    steer,
    steps_of,
)
from diffusion_lit.methods.prompt_to_prompt.words import (
    marked,
    pairs_of,
    prompts_of,
    replace_words,
    require_known,
    require_word,
    texts_of,
)
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import attention_control
from diffusion_lit.text import encode_text
from diffusion_lit.types import Condition, StepFn


class PromptToPrompt(Edit):
    """Keeps the layout of an image while its text changes, by the attention maps of the text before.

    The images of both texts are drawn at once, from the same noise. While the new one is drawn, its attention maps are
    those of the old one, as far as their words correspond. Unconditional predictions of guidance are left alone.

        predict --prompts "a three" --edit PromptToPrompt --edit.replace three:seven
        predict --prompts "a three" --edit PromptToPrompt --edit.refine "a bold three"
        predict --prompts "a bold three" --edit PromptToPrompt --edit.reweight bold=4

    Without any change the images are those of the model, bit for bit.

    Args:
        replace: Words to swap, old:new, with commas between several.
        refine: Instead, the new text.
        reweight: Factors of the attention to words of the new text, word=factor, with commas between several.
        cross: Window in which cross-attention is changed, [first, end) as fractions of the sampler's steps.
        cross_words: Windows of single words of the new text.
        self_attention: Window in which the new image has the old one's self-attention, likewise.
        self_positions: Greatest number of positions of a feature map at which it has.
        blend: Words, with commas between several: the new image differs from the old one only where either shows
            them, according to their maps.
        threshold: Share of a map's maximum, in (0, 1), above which a place shows a word.

    Raises:
        ValueError: If nothing is to be changed, two changes exclude each other, or a number is out of range.

    Source: Hertz et al. 2022, algorithm 1 and section 3.2, and its code.
    """

    entries = ("caption",)

    def __init__(
        self,
        replace: str | Sequence[str] | None = None,
        refine: str | None = None,
        reweight: str | Sequence[str] | None = None,
        cross: Sequence[float] = (0.0, 0.8),
        cross_words: Mapping[str, Sequence[float]] | None = None,
        self_attention: Sequence[float] = (0.0, 0.4),
        self_positions: int = 256,
        blend: str | Sequence[str] | None = None,
        threshold: float = 0.3,
    ) -> None:
        if replace is None and refine is None and reweight is None:
            raise ValueError("edit: nothing is changed; give --edit.replace, --edit.refine or --edit.reweight")
        if replace is not None and refine is not None:
            raise ValueError("edit.replace and edit.refine exclude each other; give the new text with --edit.refine")
        self.replace = replace
        self.refine = refine
        self.reweight = reweight
        self.cross = list(cross)
        self.cross_words = dict(cross_words or {})
        self.self_attention = list(self_attention)
        self.self_positions = self_positions
        self.blend = blend
        self.threshold = threshold
        self._swaps = dict(pairs_of("replace", replace, ":"))
        self._factors = dict(_factor(pair) for pair in pairs_of("reweight", reweight, "="))
        self._blended = [] if blend is None else blend.split(",") if isinstance(blend, str) else list(blend)
        windows = {"cross": self.cross, "self_attention": self.self_attention}
        for name, window in {**windows, **{f"cross_words.{w}": v for w, v in self.cross_words.items()}}.items():
            if len(window) != 2 or not 0 <= window[0] <= window[1] <= 1:
                raise ValueError(
                    f"edit.{name}={list(window)} must be two fractions of the steps, 0 <= first <= end <= 1"
                )
        if not 0 < threshold < 1:
            raise ValueError(f"edit.threshold={threshold} must lie between 0 and 1; the authors have 0.3")

    def check(self, model: DiffusionModule) -> None:
        """Raises ValueError if the model takes no texts or does not attend to them."""
        texts_of(model, "PromptToPrompt")

    def shown(self, model: DiffusionModule, condition: Condition) -> Condition:
        texts = texts_of(model, "PromptToPrompt")
        new = [self.target(prompt, texts.words(prompt)) for prompt in prompts_of(condition)]
        return {**condition, "caption": encode_text(new)}

    def target(self, prompt: str, words: Words) -> str:
        """The new text for a text with these words; raises ValueError if it lacks a word that is to be swapped."""
        if self.refine is not None:
            return self.refine
        return replace_words(prompt, words, self._swaps) if self._swaps else prompt

    def generate(
        self,
        model: DiffusionModule,
        noise: ImageNoise,
        condition: Condition,
        sampler: Sampler,
        on_step: StepFn | None = None,
    ) -> Tensor:
        self.change(model, condition, sampler)
        shown = self.shown(model, condition)
        if prompts_of(shown) == prompts_of(condition) and all(factor == 1 for factor in self._factors.values()):
            return model.generate(noise, condition, sampler, on_step)
        pair = self.pair(model, noise, condition, sampler, on_step)
        return model.finished(pair[len(pair) // 2 :], shown)

    def evaluations(self, model: DiffusionModule, sampler: Sampler) -> int:
        """Twice those of the model: the image before the change is drawn too."""
        return 2 * model.evaluations(sampler)

    def pair(
        self,
        model: DiffusionModule,
        noise: ImageNoise,
        condition: Condition,
        sampler: Sampler,
        on_step: StepFn | None = None,
    ) -> Tensor:
        """Latents of the B images before the change, then of those after it, (2 B, C', H', W')."""
        network = model.denoiser.network
        change = self.change(model, condition, sampler).to(model.device)
        both = _joined(condition, self.shown(model, condition))
        times = sampler.times(model.process)
        clock, layers = Clock(times), cross_layers(network)
        maps = Maps(layers, 2 * len(change.taken)) if self._blended else None
        self_steps = steps_of(self.self_attention, len(times) - 1)
        control = steer(layers, change, clock, self_steps, self.self_positions, None if maps is None else maps.add)
        amend = None if maps is None else self._blending(model, both, maps)
        denoise = clock.watch(model.bind(both))

        def draw() -> Tensor:
            return noise.draw().repeat(2, 1, 1, 1)

        with model.denoiser.uncompiled(), attention_control(network, control):
            return sampler(denoise, draw(), model.process, draw, on_step, amend=amend)

    def change(self, model: DiffusionModule, condition: Condition, sampler: Sampler) -> Change:
        """What is done to the attention of each image.

        Raises:
            ValueError: If a text lacks a word of the edit, or the model does not know one.
        """
        texts = texts_of(model, "PromptToPrompt")
        pairs = list(zip(prompts_of(condition), prompts_of(self.shown(model, condition)), strict=True))
        alignments = [self._alignment(texts, old, new) for old, new in pairs]
        length = len(alignments[0].taken)
        factors = torch.ones(len(pairs), length)
        total = len(sampler.times(model.process))
        windows = torch.tensor(steps_of(self.cross, total)).repeat(len(pairs), length, 1)
        for row, (_, new) in enumerate(pairs):
            words = texts.words(new)
            for word, factor in self._factors.items():
                factors[row, require_word("reweight", word, new, words)] = factor
            for word, window in self.cross_words.items():
                windows[row, require_word("cross_words", word, new, words)] = torch.tensor(steps_of(window, total))
        return Change.of(alignments, factors, windows)

    def _alignment(self, texts: Prompts, old: str, new: str) -> Alignment:
        require_known("replace" if self.refine is None else "refine", new, texts)
        if self.refine is None:
            return replacement(texts.words(old), texts.words(new), texts.tokens_of([new]).shape[1])
        source, target = texts.tokens_of([old, new]).tolist()
        return refinement(source, target)

    def _blending(self, model: DiffusionModule, both: Condition, maps: Maps) -> AmendFn:
        """Takes the new image from the old one wherever neither shows the words to blend."""
        marks = self._marks(texts_of(model, "PromptToPrompt"), prompts_of(both)).to(model.device)

        def amend(x: Tensor, s: Tensor) -> Tensor:
            source, target = x.chunk(2)
            mask = blend_mask(maps.of(marks), x.shape[2:], self.threshold)
            return torch.cat([source, torch.where(mask, target, source)])

        return amend

    def _marks(self, texts: Prompts, prompts: Sequence[str]) -> Tensor:
        """The tokens of the words to blend in every text, bool (2 B, K)."""
        words = [texts.words(prompt) for prompt in prompts]
        for old, new, prompt in zip(words, words[len(words) // 2 :], prompts, strict=False):
            for word in self._blended:
                require_word("blend", word, prompt, [*old, *new])
        length = texts.tokens_of(prompts[:1]).shape[1]
        return torch.stack([marked(found, self._blended, length) for found in words])


def _factor(pair: tuple[str, str]) -> tuple[str, float]:
    word, factor = pair
    try:
        return word, float(factor)
    except ValueError:
        raise ValueError(f"edit.reweight: the factor {factor!r} of {word!r} must be a number") from None


def _joined(first: Condition, second: Condition) -> dict[str, Tensor]:
    """Two batches in one; texts of different lengths are filled up."""
    texts = {"caption": encode_text([*prompts_of(first), *prompts_of(second)])}
    return {**{name: torch.cat([first[name], second[name]]) for name in first if name != "caption"}, **texts}
