"""Pictures of where a model looks for each word."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_lit.diffusion import ImageNoise, Sampler
from diffusion_lit.edit import Edit
from diffusion_lit.methods.prompt_to_prompt.control import Maps, cross_layers
from diffusion_lit.methods.prompt_to_prompt.words import marked, prompts_of, require_word, texts_of
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import attention_control
from diffusion_lit.types import Condition, StepFn


class AttentionMaps(Edit):
    """Images as the model makes them, each with the cross-attention maps of words to its right.

        predict --prompts "a bold three" --edit AttentionMaps --edit.words bold,three

    A map is the mean over heads, steps and the layers of one resolution; black is 0, white its greatest value.

    Args:
        words: With commas between several; every text must have them. By default every word of a text; then all texts
            must have equally many.
        positions: Greatest number of positions of the layers whose maps are taken.

    Raises:
        ValueError: If there are no words.

    Source: Hertz et al. 2022, section 3.1 and figure 4.
    """

    entries = ("caption",)

    def __init__(self, words: str | Sequence[str] | None = None, positions: int = 256) -> None:
        self.words = words.split(",") if isinstance(words, str) else words if words is None else list(words)
        if self.words is not None and not all(self.words):
            raise ValueError("edit.words: there are none; give words between commas, or leave it out to see all")
        self.positions = positions

    def check(self, model: DiffusionModule) -> None:
        """Raises ValueError if the model takes no texts or does not attend to them."""
        texts_of(model, "AttentionMaps")

    def generate(
        self,
        model: DiffusionModule,
        noise: ImageNoise,
        condition: Condition,
        sampler: Sampler,
        on_step: StepFn | None = None,
    ) -> Tensor:
        images, maps = self.maps(model, noise, condition, sampler, on_step)
        scaled = maps / maps.amax((2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
        pictures = F.interpolate(2 * scaled - 1, size=images.shape[2:]).unbind(1)
        return torch.cat([images, *(picture[:, None].expand_as(images) for picture in pictures)], 3)

    def maps(
        self,
        model: DiffusionModule,
        noise: ImageNoise,
        condition: Condition,
        sampler: Sampler,
        on_step: StepFn | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Images, and the maps of their words, (B, words, side, side), up to a factor."""
        network = model.denoiser.network
        marks = self._marks(model, prompts_of(condition)).to(model.device)
        maps = Maps(cross_layers(network), len(marks), self.positions)
        with model.denoiser.uncompiled(), attention_control(network, maps.add):
            images = model.generate(noise, condition, sampler, on_step)
        return images, torch.stack([maps.of(mark) for mark in marks.unbind(1)], 1)

    def _marks(self, model: DiffusionModule, prompts: Sequence[str]) -> Tensor:
        """The tokens of every word in every text, bool (B, words, K)."""
        texts = texts_of(model, "AttentionMaps")
        length = texts.tokens_of(prompts[:1]).shape[1]
        marks = []
        for prompt in prompts:
            words = texts.words(prompt)
            if self.words is None:
                marks.append([marked([word], [word[0]], length) for word in words])
            else:
                for word in self.words:
                    require_word("words", word, prompt, words)
                marks.append([marked(words, [word], length) for word in self.words])
        if len({len(found) for found in marks}) > 1 or not marks[0]:
            raise ValueError(
                "edit.words: texts with different numbers of words, or none, give pictures of different widths; name "
                "words that all of them have"
            )
        return torch.stack([torch.stack(found) for found in marks])
