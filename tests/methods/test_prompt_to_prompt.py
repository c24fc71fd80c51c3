"""Prompt-to-Prompt in a model of texts: what edits keep, what they refuse, and what is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_lit.conditioners import Text
from diffusion_lit.data.captioned_digits import NAMES, SEEN, SEEN_STROKES
from diffusion_lit.diffusion import DDIM, Ancestral, ClassifierFree, DiscreteProcess, DPMSolver, Sampler
from diffusion_lit.edit import Edit, Edited
from diffusion_lit.methods.prompt_to_prompt import AttentionMaps, PromptToPrompt
from diffusion_lit.methods.prompt_to_prompt.control import cross_layers
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet, TextEncoder, attention_control
from diffusion_lit.text import encode_text
from tests import tiny

CAPTIONS = [text.format(n=n, s=s) for text in (*SEEN, *SEEN_STROKES) for n in NAMES for s in ("bold", "thin")]
LENGTH = 12
SOURCES = ["a bold three", "the digit three, bold", "a picture of a bold three"]


def model() -> DiffusionModule:
    """A model of texts with random weights, also in the layers that training finds at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ADMUNet(
            image_size=8,
            in_channels=1,
            width=32,
            multipliers=[1, 2],
            num_blocks=1,
            attention=[8, 4],
            head_channels=16,
            context_width=16,
        )
        encoder = TextEncoder(400, LENGTH, 16, depth=1, num_heads=2, head_channels=8)
        for parameter in [*network.parameters(), *encoder.parameters()]:
            parameter.data += 0.1 * torch.randn_like(parameter)
    text = Text(encoder)
    text.tokenizer.learn(CAPTIONS, 400)
    return DiffusionModule(
        network, DiscreteProcess(50), sampler=DDIM(5), conditioner=text, guidance=ClassifierFree(1.5)
    )


@pytest.fixture(scope="module")
def guided() -> DiffusionModule:
    return model().eval()


def condition(texts: list[str] = SOURCES) -> dict[str, Tensor]:
    return {"caption": encode_text(texts)}


def sample(model: DiffusionModule, edit: Edit | None = None, texts: list[str] = SOURCES, **kwargs: Any) -> Tensor:
    generator = model if edit is None else Edited(model, edit)
    return generator.sample(range(len(texts)), condition=condition(texts), **kwargs)


def pair(model: DiffusionModule, edit: PromptToPrompt, texts: list[str] = SOURCES) -> tuple[Tensor, Tensor]:
    """Latents before and after an edit, of one batch."""
    with model.evaluating():
        both = edit.pair(model, model.noise(range(len(texts)), 0), condition(texts), model.sampler)
    return both[: len(texts)], both[len(texts) :]


# What stays


@pytest.mark.parametrize("edit", [{"replace": "three:three"}, {"reweight": "bold=1"}], ids=["swap", "factor"])
@pytest.mark.parametrize("sampler", [DDIM(5), Ancestral(7), DPMSolver(5)], ids=["ddim", "ancestral", "dpm-solver"])
def test_a_text_that_stays_the_same_gives_the_model_s_image_bit_for_bit(
    guided: DiffusionModule, edit: dict[str, str], sampler: Sampler
) -> None:
    plain = sample(guided, sampler=sampler)
    assert torch.equal(sample(guided, PromptToPrompt(**edit), sampler=sampler), plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [(0.0, 0.8), (0.3, 0.6), (0.0, 0.0)])
def test_both_images_of_a_pair_with_one_text_are_the_same_bit_for_bit(
    guided: DiffusionModule, window: tuple[float, float]
) -> None:
    for given in ({"replace": "three:three"}, {"refine": SOURCES[0]}):
        edit = PromptToPrompt(**given, cross=window, blend="three")  # type: ignore[arg-type]
        before, after = pair(guided, edit, [SOURCES[0]] * 2)
        assert torch.equal(before, after)
        torch.testing.assert_close(before, sample(guided, texts=[SOURCES[0]] * 2), rtol=1e-4, atol=1e-4)


def test_the_old_image_does_not_depend_on_the_edit(guided: DiffusionModule) -> None:
    before = [pair(guided, PromptToPrompt(replace=f"three:{new}"))[0] for new in ("seven", "eight")]
    assert torch.equal(*before)


def test_afterwards_the_network_computes_what_it_did(guided: DiffusionModule) -> None:
    before, layers = sample(guided), [vars(module).copy() for module in guided.denoiser.network.modules()]
    sample(guided, PromptToPrompt(replace="three:seven", blend="three,seven"))
    sample(guided, AttentionMaps("three"))
    assert torch.equal(sample(guided), before)
    after = [vars(module) for module in guided.denoiser.network.modules()]
    assert [a.keys() for a in after] == [b.keys() for b in layers]


def test_both_images_of_a_pair_are_counted(guided: DiffusionModule) -> None:
    edited = Edited(guided, PromptToPrompt(replace="three:seven"))
    assert edited.evaluations(DDIM(5)) == 10


def test_outside_of_all_windows_the_new_image_is_the_new_text_s_own(guided: DiffusionModule) -> None:
    edit = PromptToPrompt(replace="three:seven", cross=(0, 0), self_attention=(0, 0))
    own = sample(guided, texts=[text.replace("three", "seven") for text in SOURCES])
    torch.testing.assert_close(sample(guided, edit), own, rtol=1e-4, atol=1e-4)
    with_maps = sample(guided, PromptToPrompt(replace="three:seven", cross=(0, 1)))
    assert float((with_maps - own).abs().max()) > 1e-3


def test_unconditional_predictions_are_left_alone(guided: DiffusionModule) -> None:
    """At w = -1 the conditional half has no effect: whatever is done to it, images stay the same."""
    guided.guidance, kept = ClassifierFree(-1.0), guided.guidance
    try:
        edit = PromptToPrompt(reweight="bold=-5", cross=(0, 1))
        torch.testing.assert_close(sample(guided, edit), sample(guided), rtol=1e-4, atol=1e-4)
    finally:
        guided.guidance = kept
    assert float((sample(guided, edit) - sample(guided)).abs().max()) > 1e-3


def test_an_image_depends_on_its_own_text_alone(guided: DiffusionModule) -> None:
    edit = PromptToPrompt(replace="three:seven", reweight="bold=3", blend="seven,three")
    together = sample(guided, edit)
    for i, text in enumerate(SOURCES):
        alone = Edited(guided, edit).sample([i], condition=condition([text]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


def test_factors_change_the_map_of_their_word_in_the_network(guided: DiffusionModule) -> None:
    """The first layer sees the same input, so that its maps differ by the factor alone."""
    seen: list[Tensor] = []
    network = guided.denoiser.network
    first = next(iter(name for name, _ in network.named_modules() if name in cross_layers(network)))
    edit = PromptToPrompt(reweight="bold=3", self_attention=(0, 0))
    original = attention_control

    def spying(network: Any, control: Callable[[str, Tensor], Tensor]) -> Any:
        def spy(name: str, weights: Tensor) -> Tensor:
            new = control(name, weights)
            if name == first and not seen:
                seen.append(new)
            return new

        return original(network, spy)

    import diffusion_lit.methods.prompt_to_prompt.edit as room

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "attention_control", spying)
        pair(guided, edit, [SOURCES[0]])
    before, after = seen[0][0], seen[0][1]
    factors = after / before
    expected = torch.ones(LENGTH)
    # [CLS] a bold three
    expected[2] = 3
    torch.testing.assert_close(factors, expected.expand_as(factors), rtol=1e-3, atol=1e-3)


def test_a_blended_edit_differs_only_where_a_word_is_seen(guided: DiffusionModule) -> None:
    before, after = pair(guided, PromptToPrompt(replace="three:seven", cross=(0, 0.2), blend="seven", threshold=0.97))
    same = (before == after).flatten(1)
    assert bool((same.any(1) & ~same.all(1)).all())


# What is written


def test_what_is_written_beside_an_image_is_the_new_text(guided: DiffusionModule, tmp_path: Path) -> None:
    out = tmp_path / "out"
    edit = PromptToPrompt(replace="three:seven,bold:thin")
    tiny.trainer(tmp_path).predict(guided, prompts=SOURCES, edit=edit, out=str(out))
    texts = [(out / f"{i:06d}.txt").read_text() for i in range(3)]
    assert texts == ["a thin seven\n", "the digit seven, thin\n", "a picture of a thin seven\n"]


def test_maps_of_words_are_pictures_to_the_right_of_each_image(guided: DiffusionModule, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny.trainer(tmp_path).predict(guided, prompts=SOURCES, edit=AttentionMaps("bold,three"), out=str(out))
    plain = sample(guided)
    for i in range(3):
        with Image.open(out / f"{i:06d}.png") as image:
            assert image.size == (24, 8)
            levels = torch.from_numpy(np.array(image)).float()
        assert (levels[:, :8] - (plain[i, 0].clamp(-1, 1) + 1) * 127.5).abs().max() < 1
        assert levels[:, 8:16].max() == levels[:, 16:].max() == 255
    assert (tmp_path / "out_grid.png").is_file()


def test_maps_of_all_tokens_add_up_to_one_per_layer_and_step(guided: DiffusionModule) -> None:
    from diffusion_lit.methods.prompt_to_prompt.control import Maps

    network = guided.denoiser.network
    maps = Maps(cross_layers(network), 3)
    with attention_control(network, maps.add):
        sample(guided)
    total = maps.of(torch.ones(3, LENGTH))
    layers = sum(name.endswith("attn2") for name in cross_layers(network))
    assert total.shape == (3, 8, 8)
    assert float(total.std()) < 1e-4
    assert 0 < float(total.mean()) / 5 < layers
    assert float(total.mean()) / 5 == pytest.approx(round(float(total.mean()) / 5), abs=1e-4)


def test_without_a_choice_every_word_of_the_text_has_a_map(guided: DiffusionModule) -> None:
    assert sample(guided, AttentionMaps(), ["a bold three", "a thin seven"]).shape == (2, 1, 8, 32)
    with pytest.raises(ValueError, match=r"edit\.words: texts with different numbers of words"):
        sample(guided, AttentionMaps())


# What is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing is changed; give --edit.replace"),
        ({"replace": "a:b", "refine": "b"}, "exclude each other"),
        ({"replace": "three"}, r"edit\.replace='three' must be two words with ':' between"),
        ({"replace": "three:"}, r"edit\.replace='three:' must be two words"),
        ({"reweight": "bold"}, r"edit\.reweight='bold' must be two words with '=' between"),
        ({"reweight": "bold=much"}, r"edit\.reweight: the factor 'much' of 'bold' must be a number"),
        ({"reweight": "a=1", "cross": (0.5, 0.2)}, r"edit\.cross=\[0\.5, 0\.2\] must be two fractions"),
        ({"reweight": "a=1", "cross": (0.5,)}, r"edit\.cross=\[0\.5\] must be two fractions"),
        ({"reweight": "a=1", "self_attention": (0, 1.5)}, r"edit\.self_attention=\[0, 1\.5\]"),
        ({"reweight": "a=1", "cross_words": {"a": (0, 2)}}, r"edit\.cross_words\.a=\[0, 2\]"),
        ({"reweight": "a=1", "threshold": 1.0}, r"edit\.threshold=1\.0 must lie between 0 and 1"),
    ],
)
def test_edits_that_make_no_sense_are_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        PromptToPrompt(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replace": "six:seven"}, r"edit\.replace: the text 'a bold three' has no word 'six'; its words are a, bold"),
        ({"replace": "bold:very bold"}, "a text of 3 words cannot be aligned word by word with one of 4; .*refine"),
        (
            {"replace": "three:\N{PILE OF POO}"},
            r"edit\.replace: the model's vocabulary has no tokens for '\N{PILE OF POO}'",
        ),
        ({"refine": "a \N{PILE OF POO} three"}, r"edit\.refine: the model's vocabulary has no tokens"),
        ({"reweight": "six=2"}, r"edit\.reweight: the text 'a bold three' has no word 'six'"),
        ({"reweight": "bold=2", "cross_words": {"six": (0, 1)}}, r"edit\.cross_words: .* has no word 'six'"),
        ({"replace": "three:seven", "blend": "six"}, r"edit\.blend: .* has no word 'six'"),
    ],
)
def test_words_that_are_not_there_are_named(guided: DiffusionModule, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        sample(guided, PromptToPrompt(**given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("edit", [PromptToPrompt(reweight="a=2"), AttentionMaps("a")], ids=["edit", "maps"])
def test_a_model_without_texts_is_refused(edit: Edit) -> None:
    with pytest.raises(ValueError, match=r"needs a model of texts.*this one has Labels"):
        Edited(tiny.module(), edit)


def test_maps_of_words_that_are_not_there_are_refused(guided: DiffusionModule) -> None:
    with pytest.raises(ValueError, match=r"edit\.words: the text 'a bold three' has no word 'six'"):
        sample(guided, AttentionMaps("six"))
    with pytest.raises(ValueError, match=r"edit\.words: there are none"):
        AttentionMaps("")
