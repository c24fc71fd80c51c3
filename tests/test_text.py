"""Text to image: the text encoder as a conditioner, resuming, processes, prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_lit.codec import Pixels
from diffusion_lit.conditioners import Text
from diffusion_lit.data import CaptionedDigits, Digits, ImageData
from diffusion_lit.diffusion import ClassifierFree
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import TextEncoder
from diffusion_lit.prediction import asked_conditions
from diffusion_lit.text import encode_text
from tests import forked, tiny
from tests.texts import PROMPTS, STEPS, conditioner, learned, loaded, module, network, run


def assert_same(whole: Path, parts: Path) -> None:
    a, b = (tiny.load(tiny.last(place)) for place in (whole, parts))
    held = {"state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers"}
    assert [name for name in held if not tiny.identical(a[name], b[name])] == []
    for step in (3, 6):
        name = f"samples/step_{step:08d}.png"
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


# The conditioner


def test_texts_are_dropped_with_the_given_probability_in_training_only() -> None:
    text = learned()
    null = text.encode([""])
    given = {"caption": encode_text(["a three"] * 4000)}
    whole = text(given, Pixels())["context"]
    assert torch.equal(whole, text.encode(["a three"]).expand_as(whole))
    torch.manual_seed(0)
    context = text.train()(given, Pixels())["context"]
    dropped = (context == null).flatten(1).all(1)
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(context[~dropped], whole[~dropped])
    assert torch.equal(text.null({"context": whole})["context"], null.expand_as(whole))


def test_a_text_that_is_too_long_is_cut_with_one_warning() -> None:
    text = learned()
    long = "three " * 17
    with pytest.warns(UserWarning, match=r"3 tokens of the text 'three three .*' were cut: .* takes 16, with begin"):
        cut = text.encode([long])
    assert torch.equal(cut, text.encode(["three " * 14]))


def test_parts_that_do_not_fit_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"width 16 and the ADMUNet has context_width=8; set .*context_width 16"):
        module(network=network(8))
    with pytest.raises(ValueError, match=r"width 16 and the UNet attends to no context"):
        module(network=tiny.network())
    with pytest.raises(ValueError, match=r"dropout=1\.0 must lie in \[0, 1\)"):
        conditioner(dropout=1.0)
    with pytest.raises(ValueError, match="length=2 must be at least 3"):
        Text(TextEncoder(10, 2, 8, 1, 1, 8))


def test_what_a_text_model_cannot_be_asked_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels: the model is asked by texts; give --prompts"):
        asked_conditions(module(), labels="3")
    with pytest.raises(ValueError, match="learns its vocabulary from captions, which the data lack"):
        tiny.trainer(tmp_path).fit(module(), ImageData(Digits(), batch_size=32))
    text = learned()
    with pytest.raises(ValueError, match=r"was given none; give --prompts, \"\" for no text"):
        module(conditioner=text).sample([0], condition={})


@pytest.mark.further
def test_encoder_and_network_learn_and_are_averaged(tmp_path: Path) -> None:
    system = run(tmp_path, 4)
    checkpoint = tiny.load(tiny.last(tmp_path))
    start = dict(module().named_parameters())
    names = [name for name in start if name.startswith("conditioner.encoder.")]
    assert len(names) > 10
    raw, averaged = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert set(names) <= raw.keys()
    moved = [name for name in names if not torch.equal(raw[name], start[name])]
    # Nothing follows from keys' biases: there are none, and every other tensor has a gradient.
    assert moved == names
    assert all(not torch.equal(raw[name], averaged[name]) for name in names)
    assert system.num_classes is None


@pytest.mark.few(1)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_in_two_parts_ends_as_one_in_one_bit_for_bit(tmp_path: Path, stop: int) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "parts", stop)
    run(tmp_path / "parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.further
def test_two_processes_learn_one_vocabulary_and_hold_the_same_weights(tmp_path: Path) -> None:
    def train() -> None:
        for name, stops in (("whole", [STEPS]), ("parts", [3, STEPS])):
            for stop in stops:
                system = run(tmp_path / name, stop, devices=2, strategy="ddp")
            torch.save(system.state_dict(), tmp_path / f"{name}_{system.global_rank}.pt")

    child = forked.fork(lambda: forked.in_two(train), tmp_path / "output.txt")
    assert forked.wait(child) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    states = [
        torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for name in ("whole", "parts") for rank in (0, 1)
    ]
    assert all(tiny.identical(state, states[0]) for state in states[1:])
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    run(place)
    return place


def moved_by_texts(trained: Path, **kwargs: Any) -> DiffusionModule:
    """A model whose images depend on their texts, which those of one trained for six steps hardly do."""
    system = loaded(trained, **kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in system.denoiser.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return system


def test_a_checkpoint_carries_the_vocabulary(trained: Path, tmp_path: Path) -> None:
    system = loaded(trained)
    assert isinstance(system.conditioner, Text)
    assert torch.equal(system.conditioner.tokens_of(PROMPTS), learned().tokens_of(PROMPTS))
    save_file({name: value.contiguous() for name, value in system.state_dict().items()}, tmp_path / "a.safetensors")
    other = module()
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    given = {"caption": encode_text(PROMPTS)}
    assert torch.equal(other.sample(range(3), condition=given), system.sample(range(3), condition=given))


@pytest.mark.further
def test_a_new_run_from_trained_weights_keeps_their_vocabulary(trained: Path, tmp_path: Path) -> None:
    class Few(CaptionedDigits):
        def load(self, split: Any) -> Any:
            images = super().load(split)
            assert images.captions is not None
            images.captions = images.captions.__class__([["one two"]] * len(images))
            return images

    system = module()
    tiny.trainer(tmp_path, 1).fit(system, ImageData(Few(), batch_size=32), init_from=str(tiny.last(trained)))
    assert isinstance(system.conditioner, Text)
    assert torch.equal(system.conditioner.tokens_of(["a three"]), learned().tokens_of(["a three"]))


@pytest.mark.parametrize("guidance", [None, ClassifierFree(1.5)])
def test_image_i_depends_on_the_seed_i_and_its_prompt_alone(trained: Path, guidance: ClassifierFree | None) -> None:
    system = moved_by_texts(trained, guidance=guidance)
    texts = [PROMPTS[i % 3] for i in range(6)]

    def images(indices: list[int]) -> Tensor:
        return system.sample(indices, seed=5, condition={"caption": encode_text([texts[i] for i in indices])})

    six = images([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(images([4, 1]), six[[4, 1]], atol=1e-5, rtol=0)
    # Another text, longer in bytes, beside it changes nothing.
    given = {"caption": encode_text([texts[4], "this shows the number seven, written by hand"])}
    torch.testing.assert_close(system.sample([4, 1], seed=5, condition=given)[0], six[4], atol=1e-5, rtol=0)
    other = system.sample([4], seed=5, condition={"caption": encode_text(["zero"])})
    assert (other[0] - six[4]).abs().max() > 0.01


def test_guidance_goes_from_the_empty_text_to_the_prompt(trained: Path) -> None:
    given = {"caption": encode_text(["a bold three"])}
    nothing = {"caption": encode_text([""])}
    plain = moved_by_texts(trained)
    images = {
        scale: moved_by_texts(trained, guidance=ClassifierFree(scale)).sample([0], condition=given)
        for scale in (-1.0, 0.0)
    }
    torch.testing.assert_close(images[0.0], plain.sample([0], condition=given), atol=1e-5, rtol=0)
    torch.testing.assert_close(images[-1.0], plain.sample([0], condition=nothing), atol=1e-5, rtol=0)
    assert (images[0.0] - images[-1.0]).abs().max() > 0.01


def test_predict_writes_the_same_bytes_on_one_process_and_on_two(trained: Path, tmp_path: Path) -> None:
    def predict(name: str, **kwargs: Any) -> None:
        trainer = tiny.trainer(tmp_path, 1, [], logger=False, **kwargs)
        trainer.predict(
            module(), ckpt_path=str(tiny.last(trained)), prompts=PROMPTS[:2], num_images=5, batch_size=2, out=name
        )

    predict(str(tmp_path / "one"))
    child = forked.fork(
        lambda: forked.in_two(lambda: predict(str(tmp_path / "two"), devices=2, strategy="ddp")),
        tmp_path / "output.txt",
    )
    assert forked.wait(child) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    for i in range(5):
        pngs = [(tmp_path / name / f"{i:06d}.png") for name in ("one", "two")]
        assert pngs[0].read_bytes() == pngs[1].read_bytes()
        assert pngs[0].with_suffix(".txt").read_text() == PROMPTS[i % 2] + "\n"
        with Image.open(pngs[0]) as image:
            assert image.info["caption"] == PROMPTS[i % 2]
