"""Classes as one token of context: counts, the null class, dropout and guidance."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_lit.codec import Pixels
from diffusion_lit.conditioners import ClassContext
from diffusion_lit.diffusion import DDIM, ClassifierFree
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet
from tests import tiny
from tests.networks.small import randomize


def network(context_width: int | None = 6) -> ADMUNet:
    made = ADMUNet(
        8, 1, width=8, multipliers=[1], num_blocks=1, attention=[8], num_groups=4, context_width=context_width
    )
    randomize(made)
    return made


def context(conditioner: ClassContext, *labels: int) -> Tensor:
    found: Tensor = conditioner({"label": torch.tensor(labels)}, Pixels())["context"]
    return found


@pytest.mark.parametrize(("null_class", "parameters"), [(False, 512_000), (True, 512_512)])
def test_the_published_embeddings_have_their_sizes(null_class: bool, parameters: int) -> None:
    assert sum(p.numel() for p in ClassContext(1000, 512, null_class).parameters()) == parameters


def test_every_class_is_a_token_of_its_own() -> None:
    conditioner = ClassContext(5, 6).eval()
    assert torch.equal(context(conditioner, 3, 0)[:, 0], conditioner.embedding.weight[[3, 0]])
    assert context(conditioner, 1).shape == (1, 1, 6)


def test_the_null_class_is_the_last_and_stands_for_no_class() -> None:
    conditioner = ClassContext(5, 6, null_class=True).eval()
    null = conditioner.null({"context": context(conditioner, 1, 2, 3)})["context"]
    assert torch.equal(null, context(conditioner, 5, -1, 5))


@pytest.mark.parametrize("training", [True, False])
def test_classes_are_dropped_in_training_alone_and_as_often_as_said(training: bool) -> None:
    conditioner = ClassContext(5, 6, null_class=True, dropout=0.3).train(training)
    found = context(conditioner, *[2] * 4000)[:, 0]
    null = (found == conditioner.embedding.weight[-1]).all(1)
    assert torch.equal(found[~null], conditioner.embedding.weight[2].expand(int((~null).sum()), 6))
    assert null.float().mean().item() == pytest.approx(0.3 if training else 0.0, abs=0.03)


def test_guidance_extrapolates_from_the_null_class_to_the_class() -> None:
    conditioner = ClassContext(5, 6, null_class=True)
    model = tiny.module(network=network(), conditioner=conditioner, guidance=ClassifierFree(0.5)).eval()
    x, t, label = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5), torch.tensor([4, 0, 2])
    guided = model.bind({"label": label})(x, t)
    conditional, null = (
        model.denoiser(x, t, {"context": context(conditioner, *given)}) for given in (label.tolist(), [5, 5, 5])
    )
    torch.testing.assert_close(guided.eps, 1.5 * conditional.eps - 0.5 * null.eps)
    assert not torch.allclose(conditional.eps, null.eps, atol=1e-3)


def test_the_embedding_learns_is_averaged_and_makes_every_class_in_turn(tmp_path: Path) -> None:
    conditioner = ClassContext(10, 6, null_class=True, dropout=0.5)
    before = conditioner.embedding.weight.detach().clone()
    model: DiffusionModule = tiny.module(network=network(), conditioner=conditioner, sampler=DDIM(2))
    tiny.trainer(tmp_path, 3).fit(model, tiny.data())
    assert not torch.equal(conditioner.embedding.weight, before)
    assert "conditioner.embedding.weight" in model.averaged_names()
    assert model.num_classes == 10
    assert model.conditions()(torch.arange(12))["label"].tolist() == [*range(10), 0, 1]
    assert not torch.equal(*model.sample([0, 0], condition={"label": torch.tensor([1, 2])}).unbind())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 6), "num_classes=0 and width=6 must be at least 1"),
        ((5, 6, True, 1.0), r"dropout=1.0 must lie in \[0, 1\)"),
        ((5, 6, False, 0.1), "dropout=0.1 needs a null class; set --model.conditioner.null_class true"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: tuple[float, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ClassContext(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [None, 7])
def test_a_network_without_such_a_context_is_refused(width: int | None) -> None:
    with pytest.raises(ValueError, match=f"context_width={width}; set --model.network.context_width 6"):
        tiny.module(network=network(width), conditioner=ClassContext(5, 6))


def test_guidance_without_a_null_class_and_images_without_a_class_are_refused() -> None:
    with pytest.raises(ValueError, match="makes no unconditional predictions"):
        tiny.module(network=network(), conditioner=ClassContext(5, 6), guidance=ClassifierFree())
    model = tiny.module(network=network(), conditioner=ClassContext(5, 6))
    with pytest.raises(ValueError, match="attends to a class and was given none; say which by label"):
        model.sample([0], condition={})
    with pytest.raises(ValueError, match=r"labels: 5 must lie in 0 \.\. 4"):
        model.sample([0], condition={"label": torch.tensor([5])})
