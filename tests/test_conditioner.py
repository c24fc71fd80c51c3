import pytest
import torch
from torch import nn

from diffusion_lit.codec import Pixels
from diffusion_lit.conditioner import Labels


class Network(nn.Module):
    def __init__(self, has_null_label: bool) -> None:
        super().__init__()
        self.has_null_label = has_null_label


def test_labels_pass_the_labels_alone() -> None:
    label = torch.arange(5)
    for given in ({"label": label}, {"label": label, "flip": label > 2}):
        condition = Labels(0.5).eval()(given, Pixels())
        assert list(condition) == ["label"]
        assert torch.equal(condition["label"], label)
    assert Labels(0.5)({"flip": label > 2}, Pixels()) == {}


def test_labels_are_dropped_with_the_given_probability_in_training_only() -> None:
    label = torch.arange(20_000)
    conditioner = Labels(0.1)
    torch.manual_seed(0)
    found = conditioner({"label": label}, Pixels())["label"]
    dropped = found == -1
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(found[~dropped], label[~dropped])
    assert torch.equal(label, torch.arange(20_000))
    assert torch.equal(conditioner.eval()({"label": label}, Pixels())["label"], label)


def test_without_dropout_no_random_number_is_drawn() -> None:
    state = torch.get_rng_state()
    Labels()({"label": torch.arange(3)}, Pixels())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_null_condition_is_minus_1_for_every_label() -> None:
    null = Labels().null({"label": torch.tensor([3, 0, 7])})
    assert null["label"].tolist() == [-1, -1, -1]
    assert null["label"].dtype == torch.int64


def test_dropout_needs_a_network_with_a_null_label() -> None:
    with_null, without = Network(True), Network(False)
    assert Labels().has_null(with_null)
    assert not Labels().has_null(without)
    assert not Labels().has_null(nn.Identity())
    Labels(0.1).check(with_null)
    Labels(0.0).check(without)
    with pytest.raises(ValueError, match=r"dropout=0.1 needs a network with a null label.*conditioner.dropout 0"):
        Labels(0.1).check(without)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_probability_out_of_range_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout={dropout} must lie in \[0, 1\); 0.1 is usual"):
        Labels(dropout)
