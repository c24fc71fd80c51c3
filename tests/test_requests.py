"""What images show: conditions of examples, captions as tensors, editing methods and scores of single images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from diffusion_lit.codec import Codec
from diffusion_lit.command import parse
from diffusion_lit.conditioner import Conditioner
from diffusion_lit.data import ImageData
from diffusion_lit.data.dataset import Example, ImageDataset, Split
from diffusion_lit.data.source import Source
from diffusion_lit.diffusion import DDIM, ImageNoise, Sampler
from diffusion_lit.edit import Edit, Edited
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.metrics.features import FeatureExtractor
from diffusion_lit.metrics.scores import Evidence, Score
from diffusion_lit.module import DiffusionModule
from diffusion_lit.prediction import asked_conditions
from diffusion_lit.records import read_records
from diffusion_lit.requests import Examples, Given
from diffusion_lit.text import decode_text, encode_text
from diffusion_lit.types import Condition, StepFn
from tests import tiny

TEXTS = ["a", "two words", "\u4e09 and \N{PILE OF POO}", ""]


class Captioned(ImageDataset):
    """Images whose brightness is their number, and captions that say it."""

    def __init__(self, count: int) -> None:
        super().__init__("captioned", 8, 1)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        return f"captioned {self.count}"

    def read(self, index: int) -> Example:
        image = torch.full((1, 8, 8), index, dtype=torch.uint8)
        return {"image": image, "caption": encode_text([f"number {index}"])[0]}


class Captions(Source):
    """A source of them."""

    image_shape = (1, 8, 8)

    def load(self, split: Split) -> ImageDataset | None:
        return {"train": Captioned(12), "val": Captioned(3), "test": Captioned(2)}[split]


class Numbers(Conditioner):
    """The network is given nothing, and every image becomes as bright as its caption says."""

    entries = ("caption",)

    def forward(self, given: Condition, codec: Codec) -> Condition:
        return {}

    def null(self, condition: Condition) -> Condition:
        return condition

    def has_null(self, network: nn.Module) -> bool:
        return False

    def finish(self, images: Tensor, given: Condition) -> Tensor:
        numbers = [float(text.split()[1]) for text in decode_text(given["caption"])]
        return torch.tensor(numbers).view(-1, 1, 1, 1).expand_as(images) / 127.5 - 1


class Error(Score):
    """Largest difference from the target, in levels."""

    against = "nothing"
    output = None

    def check(self, num_images: int) -> None:
        pass

    def per_image(self, generator: nn.Module, images: Tensor, condition: Condition) -> dict[str, Tensor]:
        target = ((condition["image"] + 1) * 127.5).round()
        return {"error": (images.cpu().float() - target).abs().flatten(1).max(1).values}

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        return {"error": float(evidence.columns["error"].max())}


def model(**parts: Any) -> DiffusionModule:
    return tiny.module(conditioner=Numbers(), **parts)


def data() -> ImageData:
    return ImageData(Captions(), batch_size=4)


def test_texts_become_tensors_and_texts_again() -> None:
    encoded = encode_text(TEXTS)
    assert encoded.dtype == torch.uint8
    assert decode_text(encoded) == TEXTS
    assert decode_text(encode_text([])) == []


@pytest.mark.parametrize(("testing", "count"), [(False, 3), (True, 2)])
def test_image_i_is_given_what_example_i_modulo_n_shows(testing: bool, count: int) -> None:
    examples = Examples(data(), ["caption"], testing)
    found = examples(torch.tensor([0, 1, 7]))
    assert decode_text(found["caption"]) == [f"number {i % count}" for i in (0, 1, 7)]
    assert sorted(found) == ["caption", "image"]


def test_data_without_captions_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"needs caption, which Digits val lacks; choose a --data\.source"):
        Examples(tiny.data(), ["caption"])
    with pytest.raises(ValueError, match="Numbers needs caption, which the data lack"):
        model().losses({"image": torch.zeros(2, 1, 8, 8)})
    with pytest.raises(ValueError, match="makes images from caption: say which, or give --data"):
        model().sample([0])


def test_prompts_are_what_images_show_and_are_kept_beside_them(tmp_path: Path) -> None:
    prompts = ["number 7", "number 200"]
    tiny.trainer(tmp_path).predict(model(), prompts=prompts, num_images=3, out=str(tmp_path / "out"), npz=False)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000000.png", "000000.txt", "000001.png", "000001.txt", "000002.png", "000002.txt"]
    assert (tmp_path / "out" / "000001.txt").read_text() == "number 200\n"
    from PIL import Image

    with Image.open(tmp_path / "out" / "000002.png") as image:
        assert image.info["caption"] == "number 7"
        assert image.getextrema() == (7, 7)


def test_without_prompts_the_data_say_what_images_show(tmp_path: Path) -> None:
    tiny.trainer(tmp_path).predict(model(), data(), out=str(tmp_path / "out"))
    texts = [(tmp_path / "out" / f"{i:06d}.txt").read_text() for i in range(64)]
    assert texts == [f"number {i % 3}\n" for i in range(64)]
    assert not (tmp_path / "out" / "000064.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "3"}, "labels: the model is asked by texts; give --prompts"),
        ({"prompts": []}, "prompts: there are none"),
        ({"prompts": ["a"], "prompts_file": "b"}, "exclude each other"),
        ({"prompts_file": "/nowhere"}, "prompts_file=/nowhere cannot be read"),
    ],
)
def test_what_a_model_of_texts_cannot_be_asked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked_conditions(model(), **arguments)


def test_a_model_without_texts_is_asked_for_none() -> None:
    with pytest.raises(ValueError, match="prompts: the model takes no texts"):
        asked_conditions(tiny.module(), prompts=["a three"])


def test_scores_of_single_images_compare_image_i_with_example_i(tmp_path: Path) -> None:
    evaluation = Evaluation(scores=[Error()], num_images=5, batch_size=2, sampler=DDIM(2))
    trainer = tiny.trainer(tmp_path, callbacks=[evaluation])
    trainer.test(model(), data())
    [record] = read_records(tmp_path / "results.jsonl")
    assert record["scores"] == {"error": 0.0}
    assert record["conditions"] == {"split": "test", "images": "captioned 2", "entries": ["caption", "image"]}
    assert record["extractors"] == []


class Constant(Edit):
    """Gives back the images that it is given."""

    entries = ("image",)

    def generate(
        self,
        model: DiffusionModule,
        noise: ImageNoise,
        condition: Condition,
        sampler: Sampler,
        on_step: StepFn | None = None,
    ) -> Tensor:
        return condition["image"].clone()


def test_an_editing_method_makes_the_images_of_a_model(tmp_path: Path) -> None:
    edited = Edited.of(tiny.module(), Constant())
    assert edited.entries == ("image",)
    image = torch.rand(2, 1, 8, 8)
    assert torch.equal(edited.sample([0, 1], condition={"image": image}), image)
    assert edited.described(None)["edit"] == {"class": "Constant"}
    tiny.trainer(tmp_path).predict(tiny.module(), data(), num_images=3, out=str(tmp_path / "out"), edit=Constant())
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_only_diffusion_models_can_be_edited() -> None:
    with pytest.raises(ValueError, match="edit: Constant needs a DiffusionModule, not a LightningModule"):
        Edited.of(LightningModule(), Constant())


def test_conditions_in_memory_come_in_turn() -> None:
    given = Given({"label": torch.tensor([5, 6])})
    assert given(torch.tensor([0, 3]))["label"].tolist() == [5, 6]
    assert (len(given), len(Given({})), Given({})(torch.tensor([1]))) == (2, 0, {})


def test_several_texts_are_given_as_words() -> None:
    command = parse(["predict", "--prompts", "a three", "7", "--seed", "3"], ["predict"])
    assert command.options == [("prompts", '["a three", "7"]'), ("seed", "3")]
