import math

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.networks.adm_blocks import ConditionedResBlock, Downsample, QKVAttention
from diffusion_lit.networks.layers import Upsample, cosine_sine_embedding
from tests.networks.small import randomize, seeded, small_adm


def test_the_embedding_is_cosines_then_sines_and_stops_short_of_a_ten_thousandth() -> None:
    found = cosine_sine_embedding(torch.tensor([0.0, 3.0]), 8)
    frequencies = [1.0, 0.1, 0.01, 0.001]
    expected = [
        [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0],
        [math.cos(3 * f) for f in frequencies] + [math.sin(3 * f) for f in frequencies],
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("scale_shift_norm", [False, True])
def test_a_residual_block_scales_and_shifts_after_the_norm_or_adds_before_it(
    scale_shift_norm: bool, rescale: bool
) -> None:
    block = ConditionedResBlock(4, 6, 5, 0.0, 2, scale_shift_norm, rescale).double()
    randomize(block)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=seeded())
    embedding = torch.randn(2, 5, dtype=torch.float64, generator=seeded(2))
    p = dict(block.named_parameters())
    f = nn.functional

    def normalised(y: Tensor, name: str) -> Tensor:
        groups = y.reshape(2, 2, -1)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        return groups.reshape(y.shape) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    told = f.silu(embedding) @ p["emb_layers.1.weight"].T + p["emb_layers.1.bias"]
    h = f.conv2d(f.silu(normalised(x, "in_layers.0")), p["in_layers.2.weight"], p["in_layers.2.bias"], padding=1)
    if scale_shift_norm:
        h = normalised(h, "out_layers.0") * (1 + told[:, :6, None, None]) + told[:, 6:, None, None]
    else:
        h = normalised(h + told[:, :, None, None], "out_layers.0")
    h = f.conv2d(f.silu(h), p["out_layers.3.weight"], p["out_layers.3.bias"], padding=1)
    skip = torch.einsum("oi,bihw->bohw", p["skip_connection.weight"][:, :, 0, 0], x)
    expected = h + skip + p["skip_connection.bias"][:, None, None]
    if rescale:
        expected = expected / math.sqrt(2)
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-9, atol=1e-9)


def test_scale_and_shift_of_zero_leave_the_norm_as_it_is() -> None:
    told = ConditionedResBlock(4, 4, 5, 0.0, 2, scale_shift_norm=True)
    plain = ConditionedResBlock(4, 4, 5, 0.0, 2, scale_shift_norm=False)
    for block in (told, plain):
        randomize(block)
        nn.init.zeros_(block.emb_layers[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(block.emb_layers[1].bias)  # type: ignore[arg-type]
    plain.load_state_dict({k: v for k, v in told.state_dict().items() if not k.startswith("emb")}, strict=False)
    x, embedding = torch.randn(2, 4, 3, 3, generator=seeded()), torch.ones(2, 5)
    torch.testing.assert_close(told(x, embedding), plain(x, embedding))


def test_a_residual_block_that_changes_resolution_starts_as_pooling_or_repeating() -> None:
    x = torch.randn(2, 4, 6, 6, generator=seeded())
    down = ConditionedResBlock(4, 4, 5, 0.0, 2, resample=nn.AvgPool2d(2))
    means = x.reshape(2, 4, 3, 2, 3, 2).mean((3, 5))
    torch.testing.assert_close(down(x, torch.ones(2, 5)), means)
    up = ConditionedResBlock(4, 4, 5, 0.0, 2, resample=nn.Upsample(scale_factor=2.0))
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x, torch.ones(2, 5)), repeated)
    for block, shape in ((down, (2, 4, 3, 3)), (up, (2, 4, 12, 12))):
        randomize(block)
        assert block(x, torch.ones(2, 5)).shape == shape


def test_both_branches_change_resolution_ahead_of_the_convolution() -> None:
    """On pixels in equal 2x2 squares halving undoes doubling exactly, whatever the convolutions are."""
    plain = ConditionedResBlock(4, 4, 5, 0.0, 2)
    down = ConditionedResBlock(4, 4, 5, 0.0, 2, resample=nn.AvgPool2d(2))
    for block in (plain, down):
        randomize(block)
    x = torch.randn(2, 4, 3, 3, generator=seeded())
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(down(doubled, torch.ones(2, 5)), plain(x, torch.ones(2, 5)), rtol=1e-4, atol=1e-4)


def test_convolutions_that_change_resolution_pad_on_all_sides() -> None:
    layer = Downsample(1)
    with torch.no_grad():
        layer.op.weight.zero_()
        layer.op.weight[0, 0, 1, 1] = 1
        assert layer.op.bias is not None
        layer.op.bias.zero_()
        x = torch.arange(16.0).reshape(1, 1, 4, 4)
        # The kernel's centre lies on the even pixels.
        assert layer(x).flatten().tolist() == [0, 2, 8, 10]


@pytest.mark.parametrize("qkv_first", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_softmax_of_qk_times_v(heads: int, qkv_first: bool) -> None:
    attention = QKVAttention(8, heads, groups=2, qkv_first=qkv_first).double()
    randomize(attention)
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64, generator=seeded())
    h = nn.functional.group_norm(x, 2, attention.norm.weight, attention.norm.bias, eps=1e-5).flatten(2)
    assert attention.qkv.bias is not None
    rows = torch.einsum("oc,bcl->bol", attention.qkv.weight[:, :, 0], h) + attention.qkv.bias[:, None]
    c = 8 // heads
    mixed = []
    for n in range(heads):
        starts = [8 * part + c * n for part in range(3)] if qkv_first else [3 * c * n + c * part for part in range(3)]
        q, k, v = (rows[:, start : start + c] for start in starts)
        weights = torch.einsum("bdi,bdj->bij", q, k).div(c**0.5).softmax(-1)
        mixed.append(torch.einsum("bij,bdj->bdi", weights, v))
    assert attention.proj_out.bias is not None
    out = torch.einsum("oc,bcl->bol", attention.proj_out.weight[:, :, 0], torch.cat(mixed, 1))  # type: ignore[index]
    out = out + attention.proj_out.bias[:, None]  # type: ignore[index]
    torch.testing.assert_close(attention(x), x + out.reshape(x.shape), rtol=1e-10, atol=1e-10)


def test_convolutions_after_doubling_start_as_torch_has_them() -> None:
    """Not without a bias, as DDPM's do."""
    (upsample,) = (m for m in small_adm(resblock_updown=False).modules() if isinstance(m, Upsample))
    assert upsample.conv.bias is not None
    assert upsample.conv.bias.abs().max() > 0
