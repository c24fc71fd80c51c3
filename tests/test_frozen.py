import copy
import io

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.frozen import Frozen


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(2, 2)
        self.teacher = Frozen(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)))


def weight(owner: Owner) -> Tensor:
    first = owner.teacher.network.get_submodule("0")
    assert isinstance(first, nn.Linear)
    return first.weight


def test_its_owner_neither_saves_nor_trains_nor_lists_it() -> None:
    owner = Owner()
    assert set(owner.state_dict()) == {"trained.weight", "trained.bias"}
    assert {name for name, _ in owner.named_parameters()} == {"trained.weight", "trained.bias"}
    assert not list(owner.buffers())
    assert owner.teacher.network not in set(owner.modules())
    owner.train().requires_grad_(True)
    assert not any(module.training for module in owner.teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in owner.teacher.network.parameters())


def test_an_owner_loads_strictly_what_another_saved_and_keeps_its_own_frozen_network() -> None:
    first, second = Owner(), Owner()
    before = weight(second).clone()
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(second.trained.weight, first.trained.weight)
    assert torch.equal(weight(second), before)


def test_it_moves_and_casts_with_its_owner() -> None:
    owner = Owner().to("meta")
    assert weight(owner).is_meta
    assert all(buffer.is_meta for buffer in owner.teacher.network.buffers())
    owner = Owner().double()
    assert weight(owner).dtype == torch.float64
    assert owner.teacher(torch.zeros(4, 2, dtype=torch.float64)).dtype == torch.float64


def test_copies_and_pickles_have_a_frozen_network_of_their_own() -> None:
    owner = Owner()
    file = io.BytesIO()
    torch.save(owner, file)
    file.seek(0)
    for other in (copy.deepcopy(owner), torch.load(file, weights_only=False)):
        assert torch.equal(weight(other), weight(owner))
        with torch.no_grad():
            weight(other).zero_()
        assert weight(owner).any()
        assert not other.state_dict().keys() ^ owner.state_dict().keys()
        assert weight(other.double()).dtype == torch.float64


def test_gradients_reach_its_inputs_only() -> None:
    owner = Owner()
    x = torch.randn(4, 2, requires_grad=True)
    owner.teacher(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    assert weight(owner).grad is None
    assert not owner.teacher(x.detach()).requires_grad


@pytest.mark.parametrize("shape", [(3, 2), (1, 2)])
def test_it_computes_what_the_network_does_in_eval_mode(shape: tuple[int, int]) -> None:
    owner, x = Owner().train(), torch.randn(shape)
    assert torch.equal(owner.teacher(x), owner.teacher.network.eval()(x))
