"""Which class an image shows: asked for on the command line, and told to the network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion_lit.diffusion import DDIM, ClassifierFree, ClassifierGuidance, DiscreteProcess
from diffusion_lit.module import DiffusionModule
from diffusion_lit.prediction import parse_labels
from diffusion_lit.requests import Given, Requests
from diffusion_lit.trainer import Trainer
from diffusion_lit.types import Condition, Network, TimeDependentClassifier

PROCESS = DiscreteProcess(20)


class Grey(Network):
    """Its image of class y is grey of level y / 4 - 1, and of no class at all is white."""

    image_size, in_channels, num_classes, has_null_label = 4, 1, 5, True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        label = (condition or {}).get("label", torch.full((len(x),), -1, device=x.device))
        x0 = (torch.where(label < 0, 8, label) / 4 - 1).reshape(-1, 1, 1, 1).expand_as(x)
        alpha, sigma = PROCESS.alpha_sigma((time.double() + 1) / 20)
        return ((x - alpha.reshape(-1, 1, 1, 1) * x0) / sigma.reshape(-1, 1, 1, 1)).float() * self.weight


class Blind(Network):
    """Takes no labels."""

    image_size, in_channels = 4, 1

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        assert "label" not in (condition or {})
        return x


class Judge(TimeDependentClassifier):
    image_size, in_channels, num_classes = 4, 1, 3

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]


def model(network: Network | None = None, **kwargs: Any) -> DiffusionModule:
    return DiffusionModule(network or Grey(), PROCESS, sampler=DDIM(4), **kwargs)


def shown(images: Tensor) -> list[float]:
    return [round(level * 4 + 4, 2) for level in images.mean((1, 2, 3)).tolist()]


def test_a_list_of_labels_goes_round_and_a_count_per_class_goes_class_by_class() -> None:
    assert parse_labels("3,3,7", None, 10) == parse_labels([3, 3, 7], None, 10) == [3, 3, 7]
    assert parse_labels("[3, 7]", None, 10) == [3, 7]
    assert parse_labels("4", None, 10) == [4]
    assert parse_labels("frog, 0,cat", None, 2, ["cat", "frog"]) == [1, 0, 0]
    assert parse_labels(None, 2, 3) == [0, 0, 1, 1, 2, 2]
    assert parse_labels(None, None, None) is None


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_label_of_an_image_does_not_depend_on_the_batch(batch_size: int) -> None:
    requests = Requests(7, batch_size, Given({"label": torch.tensor([3, 3, 7])}))
    pairs = {
        int(i): int(label)
        for request in map(requests.__getitem__, range(len(requests)))
        for i, label in zip(request["index"], request["condition"]["label"], strict=True)
    }
    assert [pairs[i] for i in range(7)] == [3, 3, 7, 3, 3, 7, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("3,12", None, 10), "labels: 12 must lie in 0 .. 9, the model's 10 classes"),
        (("-1", None, 10), "labels: -1 must lie in 0 .. 9"),
        (("3,3", None, None), "the model is unconditional and cannot be asked for a class"),
        ((None, 4, None), "the model is unconditional and cannot be asked for a class"),
        (("cat", None, 10), "labels='cat' must be classes between commas, such as --labels 3,3,7"),
        (("", None, 10), "labels='' must be classes between commas, such as --labels 3,3,7"),
        (("3", 2, 10), "labels=3 and per_class=2 exclude each other"),
        ((None, 0, 10), "per_class=0 must be at least 1"),
    ],
)
def test_labels_that_cannot_be_shown_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_labels(*arguments)


def test_a_model_with_classes_shows_them_in_turn_unless_told_otherwise() -> None:
    assert shown(model().sample([3, 4, 5, 11])) == [3, 4, 0, 1]
    assert shown(model().sample([3, 4], condition={"label": torch.tensor([1, 0])})) == [1, 0]
    assert shown(model().sample([3, 4], condition={})) == [8, 8]


def test_sampling_is_guided_by_the_module_s_guidance() -> None:
    guided = model(guidance=ClassifierFree(0.25))
    label = torch.tensor([2, 3])
    # (1 + w) y - 8 w, with 8 for no class.
    assert shown(guided.sample([0, 1], condition={"label": label})) == [0.5, 1.75]
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert shown(guided.generate_from(noise, DDIM(4), {"label": label})) == [0.5, 1.75]
    guided.guidance = None
    assert shown(guided.sample([0, 1], condition={"label": label})) == [2, 3]


def test_inversion_is_guided_too() -> None:
    images = torch.zeros(1, 1, 4, 4)
    label = {"label": torch.tensor([2])}
    guided = model(guidance=ClassifierFree(1.0))
    latent = guided.invert(images, DDIM(20), label)
    assert not torch.equal(latent, model().invert(images, DDIM(20), label))


def test_a_classifier_gives_an_unconditional_model_its_classes() -> None:
    guided = model(Blind(), guidance=ClassifierGuidance(Judge(), PROCESS, 100.0))
    assert guided.num_classes == 3
    assert model(Blind()).num_classes is None
    images = [guided.sample([0], condition={"label": torch.tensor([label])}) for label in range(3)]
    assert all(int(image.flatten()[:3].argmax()) == label for label, image in enumerate(images))
    assert torch.equal(guided.sample([1]), guided.sample([1], condition={"label": torch.tensor([1])}))


def test_what_does_not_fit_is_said_before_anything_is_sampled() -> None:
    with pytest.raises(ValueError, match="Blind makes no unconditional predictions"):
        model(Blind(), guidance=ClassifierFree())
    with pytest.raises(ValueError, match="another noise schedule"):
        model(Blind(), guidance=ClassifierGuidance(Judge(), DiscreteProcess(21)))
    with pytest.raises(ValueError, match=r"labels: 5 must lie in 0 \.\. 4"):
        model().sample([0], condition={"label": torch.tensor([5])})
    with pytest.raises(ValueError, match="unconditional"):
        model(Blind()).sample([0], condition={"label": torch.tensor([0])})


def predict(directory: Path, model: DiffusionModule, **kwargs: Any) -> tuple[list[str | None], Any]:
    """The labels inside the files, and what images.npz holds."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.predict(model, out=str(directory), **kwargs)
    labels = []
    for path in sorted(directory.glob("0*.png")):
        with Image.open(path) as image:
            labels.append(image.info.get("label"))
    return labels, dict(np.load(directory.with_name(f"{directory.name}.npz")))


def test_predict_writes_the_images_asked_for_and_says_of_what_they_are(tmp_path: Path) -> None:
    labels, arrays = predict(tmp_path / "a", model(), labels="3,3,1", batch_size=2)
    assert labels == ["3", "3", "1"]
    assert arrays["arr_1"].tolist() == [3, 3, 1]
    np.testing.assert_allclose(arrays["arr_0"].mean((1, 2, 3)) / 255 * 8, [3, 3, 1], atol=0.02)
    assert predict(tmp_path / "b", model(), labels="3,1", num_images=5)[0] == ["3", "1", "3", "1", "3"]
    assert predict(tmp_path / "c", model(), per_class=2, batch_size=3)[0] == [str(i // 2) for i in range(10)]
    with Image.open(tmp_path / "c_grid.png") as grid, Image.open(tmp_path / "b_grid.png") as other:
        assert (grid.height, other.width) == (5 * 68 - 4, 3 * 68 - 4)
        assert grid.width > 2 * 68 - 4  # the rows' classes beside them
    named = model()
    named.class_names = ["a", "b", "c"]
    assert predict(tmp_path / "f", named, per_class=1)[0] == ["0", "1", "2", "3", "4"]
    assert predict(tmp_path / "d", model(), num_images=7)[0] == ["0", "1", "2", "3", "4", "0", "1"]
    assert predict(tmp_path / "e", model(Blind()), num_images=2)[0] == [None, None]


def test_predict_is_guided_by_a_classifier_although_lightning_turns_gradients_off(tmp_path: Path) -> None:
    guided = model(Blind(), guidance=ClassifierGuidance(Judge(), PROCESS, 100.0))
    labels, arrays = predict(tmp_path / "a", guided, labels=[2, 0])
    assert labels == ["2", "0"]
    assert arrays["arr_0"].reshape(2, -1)[:, :3].argmax(1).tolist() == [2, 0]


def test_predict_refuses_labels_before_it_writes_anything(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unconditional"):
        predict(tmp_path / "a", model(Blind()), labels="0")
    with pytest.raises(ValueError, match=r"7 must lie in 0 \.\. 4"):
        predict(tmp_path / "a", model(), labels="1,7")
    assert not (tmp_path / "a").exists()
