import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from diffusion_lit.networks import ADMUNet, NoisyClassifier
from diffusion_lit.networks.adm import AttentionPool2d, ConditionedResBlock, Downsample, QKVAttention
from diffusion_lit.networks.layers import Upsample, cosine_sine_embedding


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(module: nn.Module) -> None:
    """Wakes the branches that start at zero."""
    generator = seeded(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)


def small(**changes: object) -> ADMUNet:
    """Two resolutions of 8 and 16 channels, attention at the lower one."""
    arguments: dict[str, object] = {
        "image_size": 8,
        "width": 8,
        "multipliers": (1, 2),
        "num_blocks": 1,
        "attention": (4,),
        "head_channels": 4,
        "num_groups": 4,
    }
    return ADMUNet(**{**arguments, **changes})  # type: ignore[arg-type]


def small_classifier(**changes: object) -> NoisyClassifier:
    arguments: dict[str, object] = {
        "image_size": 8,
        "num_classes": 5,
        "width": 8,
        "multipliers": (1, 2),
        "num_blocks": 1,
        "attention": (4,),
        "head_channels": 4,
        "num_groups": 4,
    }
    return NoisyClassifier(**{**arguments, **changes})  # type: ignore[arg-type]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


IMAGES = torch.randn(3, 3, 8, 8, generator=seeded())
TIMES = torch.tensor([0.0, 10.0, 999.0])

# Published networks


@pytest.mark.parametrize(
    ("arguments", "published"),
    [
        ({"image_size": 256, "multipliers": (1, 1, 2, 2, 4, 4), "head_channels": 64}, 552_814_086),
        (
            {
                "image_size": 64,
                "width": 192,
                "multipliers": (1, 2, 3, 4),
                "num_blocks": 3,
                "head_channels": 64,
                "num_classes": 1000,
            },
            295_904_454,
        ),
        ({"image_size": 128, "multipliers": (1, 1, 2, 3, 4), "num_heads": 4, "num_classes": 1000}, 421_529_606),
        ({"image_size": 256, "head_channels": 64, "num_classes": 1000}, 553_838_086),
    ],
    ids=["LSUN 256", "ImageNet 64", "ImageNet 128", "ImageNet 256"],
)
def test_the_networks_are_adms_to_the_parameter(arguments: dict[str, object], published: int) -> None:
    with torch.device("meta"):
        assert count(ADMUNet(out_channels=6, **arguments)) == published  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        ("lsun_bedroom", 552_814_086),
        ("lsun_horse", 552_814_086),
        ("lsun_cat", 552_814_086),
        ("imagenet64", 295_904_454),
        ("imagenet128", 421_529_606),
        ("imagenet256", 553_838_086),
    ],
)
def test_the_recipes_have_the_published_networks(recipe: str, published: int) -> None:
    file = Path(__file__).parents[2] / "configs" / f"adm_{recipe}.yaml"
    network = yaml.safe_load(file.read_text())["model"]["init_args"]["network"]
    assert network["class_path"] == "diffusion_lit.networks.ADMUNet"
    with torch.device("meta"):
        assert count(ADMUNet(**network["init_args"])) == published


@pytest.mark.parametrize(
    ("image_size", "multipliers", "num_blocks", "published"),
    [
        (64, (1, 2, 3, 4), 4, 65_438_568),
        (128, (1, 1, 2, 3, 4), 2, 42_568_040),
        (256, (1, 1, 2, 2, 4, 4), 2, 54_096_360),
    ],
)
def test_the_classifiers_are_adms_to_the_parameter(
    image_size: int, multipliers: tuple[int, ...], num_blocks: int, published: int
) -> None:
    with torch.device("meta"):
        network = NoisyClassifier(image_size, multipliers=multipliers, num_blocks=num_blocks)
    assert count(network) == published


def test_weights_have_the_names_of_the_published_ones() -> None:
    with torch.device("meta"):
        found = shapes(ADMUNet(out_channels=6, head_channels=64, num_classes=1000))
    expected = {
        "time_embed.0.weight": (1024, 256),
        "time_embed.2.bias": (1024,),
        "label_emb.weight": (1000, 1024),
        "input_blocks.0.0.weight": (256, 3, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (256,),
        "input_blocks.2.0.out_layers.3.bias": (256,),
        "input_blocks.3.0.in_layers.2.weight": (256, 256, 3, 3),
        "input_blocks.7.0.skip_connection.weight": (512, 256, 1, 1),
        "input_blocks.10.1.qkv.weight": (1536, 512, 1),
        "input_blocks.17.1.norm.weight": (1024,),
        "middle_block.0.out_layers.0.weight": (1024,),
        "middle_block.1.proj_out.weight": (1024, 1024, 1),
        "middle_block.2.emb_layers.1.bias": (2048,),
        "output_blocks.0.0.skip_connection.weight": (1024, 2048, 1, 1),
        "output_blocks.2.2.emb_layers.1.weight": (2048, 1024),
        "output_blocks.8.1.qkv.bias": (1536,),
        "output_blocks.11.1.in_layers.2.weight": (512, 512, 3, 3),
        "output_blocks.17.0.in_layers.2.weight": (256, 512, 3, 3),
        "out.0.weight": (256,),
        "out.2.weight": (6, 256, 3, 3),
    }
    assert {name: found.get(name) for name in expected} == expected
    absent = (
        "input_blocks.18.",
        "input_blocks.3.0.skip",
        "input_blocks.7.1",
        "output_blocks.17.1",
        "output_blocks.18.",
    )
    assert not [name for name in found if name.startswith(absent)]


def test_the_classifiers_weights_have_the_names_of_the_published_ones() -> None:
    with torch.device("meta"):
        found = shapes(NoisyClassifier())
    expected = {
        "time_embed.0.weight": (512, 128),
        "input_blocks.14.1.qkv.weight": (1536, 512, 1),
        "middle_block.2.out_layers.3.weight": (512, 512, 3, 3),
        "out.0.bias": (512,),
        "out.2.positional_embedding": (512, 65),
        "out.2.qkv_proj.weight": (1536, 512, 1),
        "out.2.c_proj.weight": (1000, 512, 1),
    }
    assert {name: found.get(name) for name in expected} == expected


def test_resampling_by_convolution_has_the_published_names_too() -> None:
    found = shapes(small(resblock_updown=False))
    assert found["input_blocks.2.0.op.weight"] == (8, 8, 3, 3)
    assert found["output_blocks.1.2.conv.weight"] == (16, 16, 3, 3)
    assert small(resblock_updown=False)(IMAGES, TIMES).shape == IMAGES.shape


# The network


@pytest.mark.parametrize("out_channels", [None, 6])
def test_the_output_is_an_image_of_zeros_at_first(out_channels: int | None) -> None:
    out = small(out_channels=out_channels)(IMAGES, TIMES)
    assert out.shape == (3, out_channels or 3, 8, 8)
    assert (out == 0).all()


@pytest.mark.parametrize("resblock_updown", [True, False])
@pytest.mark.parametrize("scale_shift_norm", [True, False])
def test_every_parameter_gets_a_gradient_once_the_branches_are_awake(
    resblock_updown: bool, scale_shift_norm: bool
) -> None:
    network = small(resblock_updown=resblock_updown, scale_shift_norm=scale_shift_norm, num_classes=3)
    randomise(network)
    network(IMAGES, TIMES, {"label": torch.arange(3)}).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9] == []


def test_images_of_a_batch_do_not_mix_and_each_is_told_its_own_time_and_class() -> None:
    network = small(num_classes=3).eval()
    randomise(network)
    label = torch.tensor([2, 0, 1])
    together = network(IMAGES, TIMES, {"label": label})
    scale = together.abs().max()
    for i in range(3):
        alone = network(IMAGES[i : i + 1], TIMES[i : i + 1], {"label": label[i : i + 1]})
        assert (together[i] - alone[0]).abs().max() < 1e-4 * scale
    for time, classes in ((TIMES.flip(0), label), (TIMES, torch.tensor([1, 0, 2]))):
        other = network(IMAGES, time, {"label": classes})
        assert (other[0] - together[0]).abs().max() > 1e-2 * scale
        assert (other[1] - together[1]).abs().max() < 1e-4 * scale


def test_heads_grow_with_the_channels_or_stay_as_many() -> None:
    def heads(**changes: object) -> list[int]:
        return [m.heads for m in small(attention=(8, 4), **changes).modules() if isinstance(m, QKVAttention)]

    # One block down at 8 and at 16 channels, the middle, two blocks up at 16 and at 8.
    assert heads(head_channels=4) == [2, 4, 4, 4, 4, 2, 2]
    assert heads(head_channels=None, num_heads=2) == [2] * 7


def test_it_computes_in_the_precision_of_its_weights() -> None:
    network = small().double()
    randomise(network)
    assert network(IMAGES.double(), TIMES).dtype == torch.float64


# Labels


def test_the_null_label_stands_in_for_a_missing_one() -> None:
    network = small(num_classes=4, label_dropout=0.1).eval()
    randomise(network)
    assert network.has_null_label
    assert network.label_emb.weight.shape == (5, 32)
    without = network(IMAGES, TIMES)
    torch.testing.assert_close(network(IMAGES, TIMES, {"label": torch.tensor([4, 4, 4])}), without)
    torch.testing.assert_close(network(IMAGES, TIMES, {}), without)
    assert not torch.allclose(network(IMAGES, TIMES, {"label": torch.tensor([0, 4, 1])})[0], without[0])


def test_labels_are_dropped_as_often_as_asked_and_in_training_alone() -> None:
    network = small(image_size=2, attention=(), num_classes=4, label_dropout=0.25)
    seen: list[Tensor] = []
    network.label_emb.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    n = 4000
    label = torch.arange(n) % 4
    x, time = torch.zeros(n, 3, 2, 2), torch.zeros(n)
    torch.manual_seed(0)
    with torch.no_grad():
        network(x, time, {"label": label})
        network.eval()
        network(x, time, {"label": label})
    trained, evaluated = seen
    dropped = trained == 4
    assert torch.equal(trained[~dropped], label[~dropped])
    # Five standard deviations.
    assert abs(dropped.float().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    assert torch.equal(evaluated, label)


def test_without_classes_labels_are_not_looked_at() -> None:
    network = small()
    randomise(network)
    assert network.num_classes is None
    assert not network.has_null_label
    torch.testing.assert_close(network(IMAGES, TIMES, {"label": torch.tensor([7, 8, 9])}), network(IMAGES, TIMES))


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (None, ["num_classes=4", "give labels", "label_dropout above 0"]),
        ({}, ["num_classes=4", "give labels", "label_dropout above 0"]),
        ({"label": torch.tensor([1])}, ["(1,)", "3 images", "one per image"]),
    ],
)
def test_labels_that_are_missing_or_too_few_are_refused(condition: dict[str, Tensor] | None, words: list[str]) -> None:
    network = small(num_classes=4)
    assert not network.has_null_label
    with pytest.raises(ValueError) as error:  # noqa: PT011
        network(IMAGES, TIMES, condition)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 9}, ["image_size=9", "halved 1 times", "multiple of 2"]),
        ({"num_groups": 3}, ["num_groups=3", "width=8", "make width a multiple"]),
        ({"width": 5, "num_groups": 5}, ["width=5", "even and at least 4"]),
        ({"attention": (5,)}, ["attention at 5", "[8, 4]", "choose"]),
        ({"dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
        ({"head_channels": 5}, ["head_channels=5", "16 channels", "divisor"]),
        ({"head_channels": 0}, ["head_channels=0", "divisor"]),
        ({"multipliers": ()}, ["multipliers=[]", "at least 1"]),
        ({"num_blocks": 0}, ["num_blocks=0", "at least 1"]),
        ({"num_classes": 0}, ["num_classes=0", "at least 1"]),
        ({"head_channels": None, "num_heads": 3}, ["num_heads=3", "16 channels", "divisor"]),
        ({"num_classes": 4, "label_dropout": 1.0}, ["label_dropout=1.0", "[0, 1)"]),
        ({"label_dropout": 0.1}, ["label_dropout=0.1", "set num_classes"]),
    ],
)
def test_errors_name_the_value_and_the_remedy(changes: dict[str, object], words: list[str]) -> None:
    networks = [small]
    if not changes.keys() & {"num_heads", "label_dropout"}:
        networks.append(small_classifier)  # type: ignore[arg-type]
    for network in networks:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            network(**changes)
        for word in words:
            assert word in str(error.value)


# Pieces


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
    randomise(block)
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
        randomise(block)
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
        randomise(block)
        assert block(x, torch.ones(2, 5)).shape == shape


def test_both_branches_change_resolution_ahead_of_the_convolution() -> None:
    """On pixels in equal 2x2 squares halving undoes doubling exactly, whatever the convolutions are."""
    plain = ConditionedResBlock(4, 4, 5, 0.0, 2)
    down = ConditionedResBlock(4, 4, 5, 0.0, 2, resample=nn.AvgPool2d(2))
    for block in (plain, down):
        randomise(block)
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
    randomise(attention)
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
    (upsample,) = (m for m in small(resblock_updown=False).modules() if isinstance(m, Upsample))
    assert upsample.conv.bias is not None
    assert upsample.conv.bias.abs().max() > 0


# The classifier


def test_attention_pooling_is_what_the_mean_sees() -> None:
    pool = AttentionPool2d(3, 8, heads=2, out_channels=5).double()
    randomise(pool)
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64, generator=seeded())
    places = torch.cat([x.mean((2, 3))[:, :, None], x.flatten(2)], 2) + pool.positional_embedding
    assert pool.qkv_proj.bias is not None
    assert pool.c_proj.bias is not None
    rows = torch.einsum("oc,bcl->bol", pool.qkv_proj.weight[:, :, 0], places) + pool.qkv_proj.bias[:, None]
    # torch's own attention, which takes (L, B, C), of all positions; the first one is the result.
    q, k, v = (part.permute(2, 0, 1) for part in rows.chunk(3, dim=1))
    full, _ = nn.functional.multi_head_attention_forward(
        q,
        k,
        v,
        embed_dim_to_check=8,
        num_heads=2,
        in_proj_weight=torch.eye(8, dtype=torch.float64).repeat(3, 1),
        in_proj_bias=None,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.c_proj.weight[:, :, 0],
        out_proj_bias=pool.c_proj.bias,
        need_weights=False,
    )
    torch.testing.assert_close(pool(x), full[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("resblock_updown", [True, False])
def test_the_classifier_gives_logits_which_the_image_and_the_time_decide(resblock_updown: bool) -> None:
    network = small_classifier(resblock_updown=resblock_updown).eval()
    randomise(network)
    assert (network.image_size, network.in_channels, network.num_classes) == (8, 3, 5)
    logits = network(IMAGES, TIMES)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(network(IMAGES[1:2], TIMES[1:2])[0], logits[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(network(IMAGES, TIMES + 300), logits)


def test_the_classifiers_gradient_is_the_slope_of_the_log_probability() -> None:
    network = small_classifier().double().eval()
    x = IMAGES.double().requires_grad_()

    def log_p(y: Tensor) -> Tensor:
        return network(y, TIMES).log_softmax(1)[:, 2].sum()  # type: ignore[no-any-return]

    (gradient,) = torch.autograd.grad(log_p(x), x)
    assert gradient.flatten(1).abs().amax(1).min() > 0
    direction = torch.randn(x.shape, dtype=torch.float64, generator=seeded(3))
    h = 1e-5
    slope = (log_p(x + h * direction) - log_p(x - h * direction)) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-8)


def test_every_parameter_of_the_classifier_gets_a_gradient() -> None:
    network = small_classifier()
    randomise(network)
    network(IMAGES, TIMES).log_softmax(1)[:, :2].sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
