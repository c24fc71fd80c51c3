"""DDPM++: its published sizes, initialisation and conditions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lit.networks import DDPMpp
from diffusion_lit.networks.ddpmpp import PlusBlock, SingleHeadAttention


def small(**kwargs: object) -> DDPMpp:
    torch.manual_seed(0)
    return DDPMpp(**{"image_size": 8, "width": 16, "multipliers": [1, 2], "num_blocks": 1, "attention": [4], **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        # Karras et al. 2022: their networks map 9 numbers of the augmentation.
        ({"augment_dim": 9}, 55_733_891),
        ({"augment_dim": 9, "image_size": 64, "multipliers": [1, 2, 2, 2]}, 61_805_571),
        ({}, 55_733_891 - 9 * 128),
        ({"augment_dim": 9, "num_classes": 10}, 55_733_891 + 10 * 128 + 128),
    ],
    ids=["cifar10", "ffhq", "without augmentation", "by class"],
)
def test_it_has_the_published_number_of_parameters(options: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        network = DDPMpp(**options)  # type: ignore[arg-type]
    assert sum(p.numel() for p in network.parameters()) == count


def test_its_layers_start_as_published() -> None:
    network = small(width=64)

    def std_over_glorot(layer: nn.Module) -> float:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        area = weight[0, 0].numel()
        return float(weight.detach().std()) / math.sqrt(2 / (area * (weight.shape[0] + weight.shape[1])))

    for module in network.modules():
        if isinstance(module, PlusBlock):
            assert std_over_glorot(module.conv0) == pytest.approx(1, abs=0.1)
            assert std_over_glorot(module.conv1) == pytest.approx(1e-5, rel=0.1)
        if isinstance(module, SingleHeadAttention):
            assert std_over_glorot(module.qkv) == pytest.approx(math.sqrt(0.2), rel=0.1)
            assert std_over_glorot(module.proj) == pytest.approx(1e-5, rel=0.1)
    assert std_over_glorot(network.conv_out) == pytest.approx(1e-5, rel=0.1)
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias") and "norm" not in name)


def test_at_the_start_blocks_divide_their_input_by_the_root_of_2() -> None:
    block = PlusBlock(16, 16, 8, dropout=0.0)
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(block(x, torch.randn(2, 8)), x / math.sqrt(2), rtol=0, atol=1e-3)


def test_attention_is_that_of_interleaved_queries_keys_and_values() -> None:
    layer = SingleHeadAttention(8).double()
    torch.nn.init.normal_(layer.get_parameter("proj.weight"))
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    rows = layer.qkv(layer.norm(x)).flatten(2)
    q, k, v = rows[:, 0::3], rows[:, 1::3], rows[:, 2::3]
    weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(8)).softmax(-1)
    mixed = torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape)
    torch.testing.assert_close(layer(x), (layer.proj(mixed) + x) * math.sqrt(0.5))


def test_an_embedding_is_of_the_time_the_scaled_label_and_the_augmentation() -> None:
    network = small(num_classes=3, augment_dim=2).eval()
    time, label, augment = torch.tensor([0.3, -1.0]), torch.tensor([2, -1]), torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    freqs = 10_000.0 ** (-torch.arange(8) / 7)
    sinusoids = torch.cat([(time[:, None] * freqs).sin(), (time[:, None] * freqs).cos()], dim=1)
    one_hot = torch.tensor([[0.0, 0, 1], [0, 0, 0]])
    mapped = sinusoids + network.map_label(one_hot * math.sqrt(3)) + augment @ network.map_augment.weight.T
    expected = F.silu(network.map_layer1(F.silu(network.map_layer0(mapped))))
    found = network.embed(time, {"label": label, "augment": augment}, torch.float32)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[1:], network.embed(time[1:], None, torch.float32))


def test_every_parameter_has_a_gradient_without_augmentation_and_labels() -> None:
    network = small(num_classes=3, augment_dim=9)
    network(torch.randn(2, 3, 8, 8), torch.zeros(2)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_recomputed_blocks_have_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        network = small(dropout=0.3, checkpoint_blocks=recompute)
        torch.manual_seed(1)
        network(torch.randn(2, 3, 8, 8), torch.zeros(2)).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("wrong", [{"num_classes": 0}, {"augment_dim": -1}, {"width": 18}, {"attention": [3]}])
def test_impossible_sizes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"DDPMpp: .*"):
        small(**wrong)


def test_labels_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="labels of shape"):
        small(num_classes=3)(torch.zeros(2, 3, 8, 8), torch.zeros(2), {"label": torch.tensor([1])})
