import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.networks import UNet
from diffusion_lit.networks.layers import Downsample, ResBlock, SelfAttention, Upsample, sinusoidal_embedding
from tests.networks.small import count, randomize, seeded, small_unet


def test_the_defaults_are_ddpms_cifar_10_network_to_the_parameter() -> None:
    with torch.device("meta"):
        assert count(UNet()) == 35_746_307


def test_the_lsun_network_is_ddpms_to_the_parameter() -> None:
    with torch.device("meta"):
        network = UNet(256, width=128, multipliers=(1, 1, 2, 2, 4, 4), attention=(16,), dropout=0.0)
    assert count(network) == 113_673_219


def test_multipliers_may_be_fractions() -> None:
    network = small_unet(width=16, multipliers=(0.5, 1.5))
    randomize(network)
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    assert network(x, torch.tensor([3.0, 700.0])).shape == x.shape
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found["conv_in.weight"] == (16, 3, 3, 3)
    assert found["down.0.block.0.conv1.weight"] == (8, 16, 3, 3)
    assert found["mid.attn_1.q.weight"] == (24, 24, 1, 1)
    assert found["conv_out.weight"] == (3, 8, 3, 3)


def test_weights_have_the_names_of_the_published_ones() -> None:
    with torch.device("meta"):
        shapes: Mapping[str, Tensor] = UNet().state_dict()
    expected = {
        "temb.dense.0.weight": (512, 128),
        "temb.dense.1.bias": (512,),
        "conv_in.weight": (128, 3, 3, 3),
        "down.0.block.0.norm1.weight": (128,),
        "down.0.block.1.temb_proj.weight": (128, 512),
        "down.0.downsample.conv.weight": (128, 128, 3, 3),
        "down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "down.1.attn.0.norm.weight": (256,),
        "down.1.attn.1.proj_out.weight": (256, 256, 1, 1),
        "mid.block_1.conv1.weight": (256, 256, 3, 3),
        "mid.attn_1.q.weight": (256, 256, 1, 1),
        "mid.block_2.norm2.bias": (256,),
        "up.0.block.2.conv1.weight": (128, 256, 3, 3),
        "up.1.attn.2.v.bias": (256,),
        "up.3.block.2.nin_shortcut.weight": (256, 512, 1, 1),
        "up.3.upsample.conv.weight": (256, 256, 3, 3),
        "norm_out.weight": (128,),
        "conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: tuple(shapes[name].shape) for name in expected} == expected
    assert not [name for name in shapes if name.startswith(("down.3.downsample", "up.0.upsample", "down.0.attn"))]


@pytest.mark.parametrize("out_channels", [None, 6])
def test_the_output_is_an_image_near_zero_at_first(out_channels: int | None) -> None:
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    out = small_unet(out_channels=out_channels)(x, torch.tensor([0.0, 999.0]))
    assert out.shape == (2, out_channels or 3, 8, 8)
    assert 0 < out.abs().max() < 1e-3


def test_every_parameter_gets_a_gradient_once_the_branches_are_awake() -> None:
    network = small_unet()
    randomize(network)
    network(torch.randn(2, 3, 8, 8, generator=seeded()), torch.tensor([3.0, 700.0])).square().sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    # A constant added to every key leaves a softmax as it is: no bias of k is ever learnt.
    assert [name for name in silent if not name.endswith(".k.bias")] == []


def test_images_of_a_batch_do_not_mix_and_each_is_told_its_own_time() -> None:
    network = small_unet().eval()
    randomize(network)
    x = torch.randn(3, 3, 8, 8, generator=seeded())
    time = torch.tensor([0.0, 10.0, 999.0])
    together = network(x, time)
    scale = together.abs().max()
    for i in range(3):
        assert (together[i] - network(x[i : i + 1], time[i : i + 1])[0]).abs().max() < 1e-4 * scale
    flipped = network(x, time.flip(0))
    assert (flipped[0] - together[0]).abs().max() > 1e-2 * scale
    assert (flipped[1] - together[1]).abs().max() < 1e-4 * scale


def test_dropout_acts_in_training_alone() -> None:
    network = small_unet(dropout=0.5)
    randomize(network)
    x, time = torch.randn(1, 3, 8, 8, generator=seeded()), torch.tensor([5.0])
    assert not torch.equal(network(x, time), network(x, time))
    network.eval()
    assert torch.equal(network(x, time), network(x, time))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 9}, ["image_size=9", "halved 1 times", "multiple of 2", "fewer than 2 multipliers"]),
        ({"image_size": 0}, ["image_size=0", "multiple of 2"]),
        ({"num_groups": 3}, ["num_groups=3", "width=8", "make width a multiple"]),
        ({"width": 12, "num_groups": 8, "multipliers": (2, 2)}, ["num_groups=8", "width=12"]),
        ({"width": 5, "num_groups": 5}, ["width=5", "even and at least 4"]),
        ({"attention": (5,)}, ["attention at 5", "[8, 4]", "choose"]),
        ({"dropout": 1.0}, ["dropout=1.0", "[0, 1)", "0.1"]),
        ({"num_heads": 3}, ["num_heads=3", "16 channels", "divisor"]),
        ({"num_heads": 0}, ["num_heads=0", "divisor"]),
        ({"multipliers": ()}, ["multipliers=[]", "at least 1"]),
        ({"num_blocks": 0}, ["num_blocks=0", "at least 1"]),
        ({"multipliers": (0.75, 1)}, ["multiplier 0.75", "6 channels", "multiples of num_groups=4"]),
    ],
)
def test_errors_name_the_value_and_the_remedy(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        small_unet(**changes)
    for word in words:
        assert word in str(error.value)


def test_the_embedding_is_sines_then_cosines_from_1_down_to_a_ten_thousandth() -> None:
    found = sinusoidal_embedding(torch.tensor([0.0, 3.0]), 6)
    frequencies = [1.0, 0.01, 0.0001]
    expected = [
        [0.0, 0.0, 0.0, 1.0, 1.0, 1.0],
        [math.sin(3 * f) for f in frequencies] + [math.cos(3 * f) for f in frequencies],
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 4])
def test_self_attention_is_softmax_of_qk_times_v(heads: int) -> None:
    attention = SelfAttention(8, heads, groups=2).double()
    randomize(attention)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64, generator=seeded())
    h = nn.functional.group_norm(x, 2, attention.norm.weight, attention.norm.bias, eps=1e-6)

    def project(layer: nn.Conv2d) -> Tensor:
        assert layer.bias is not None
        y = torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], h) + layer.bias[:, None, None]
        return y.reshape(2, heads, 8 // heads, 15)

    q, k, v = (project(layer) for layer in (attention.q, attention.k, attention.v))
    weights = torch.einsum("bndi,bndj->bnij", q, k).div((8 / heads) ** 0.5).softmax(-1)
    mixed = torch.einsum("bnij,bndj->bndi", weights, v).reshape(2, 8, 3, 5)
    assert attention.proj_out.bias is not None
    out = torch.einsum("oc,bchw->bohw", attention.proj_out.weight[:, :, 0, 0], mixed)
    expected = x + out + attention.proj_out.bias[:, None, None]
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-10)


def test_self_attention_does_not_see_the_order_of_positions() -> None:
    attention = SelfAttention(8, 2, groups=2).double()
    randomize(attention)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, generator=seeded())
    order = torch.randperm(16, generator=seeded())

    def shuffle(y: Tensor) -> Tensor:
        return y.flatten(2)[:, :, order].reshape(y.shape)

    torch.testing.assert_close(attention(shuffle(x)), shuffle(attention(x)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", [SelfAttention(8, 1, 4), ResBlock(8, 8, 16, 0.0, 4)])
def test_blocks_start_as_the_identity(layer: nn.Module) -> None:
    x = torch.randn(2, 8, 4, 4, generator=seeded())
    out = layer(x) if isinstance(layer, SelfAttention) else layer(x, torch.ones(2, 16))
    torch.testing.assert_close(out, x, rtol=0, atol=1e-3)
    assert not torch.equal(out, x)


def test_downsampling_pads_on_the_right_and_below_only() -> None:
    layer = Downsample(1)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[0, 0, 0, 0] = 1
        x = torch.arange(16.0).reshape(1, 1, 4, 4)
        # The kernel's first entry lies on the even pixels, its last one beyond the far edges.
        assert layer(x).flatten().tolist() == [0, 2, 8, 10]
        layer.conv.weight.copy_(layer.conv.weight.flip(2, 3))
        assert layer(x).flatten().tolist() == [10, 0, 0, 0]


def test_upsampling_repeats_pixels_before_it_convolves() -> None:
    layer = Upsample(1)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[0, 0, 1, 1] = 1
    out = layer(torch.tensor([[[[1.0, 2.0]]]]))
    assert out.tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]


def test_a_residual_block_commutes_with_translation_away_from_the_edges() -> None:
    block = ResBlock(4, 6, 16, 0.0, 2).double()
    randomize(block)
    x = torch.zeros(1, 4, 12, 12, dtype=torch.float64)
    x[:, :, 4:7, 3:6] = torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=seeded())
    embedding = torch.randn(1, 16, dtype=torch.float64, generator=seeded(2))
    # Normalisation takes its moments over all pixels, which moving a patch leaves as they are; the second one
    # sees what the first convolution makes of the zero padding, which the shift leaves as it is too.
    here, there = block(x, embedding), block(x.roll((2, 3), (2, 3)), embedding)
    moved = here.roll((2, 3), (2, 3))
    torch.testing.assert_close(moved[:, :, 5:10, 6:10], there[:, :, 5:10, 6:10], rtol=1e-9, atol=1e-9)
