import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.networks import NoisyClassifier
from diffusion_lit.networks.classifier import AttentionPool2d
from tests.networks.small import IMAGES, TIMES, count, randomize, seeded, shapes, small_classifier
from tests.tools.guided_diffusion import Form, as_classifier, classifier_shapes


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


def test_adms_512_classifier_has_the_published_tensors() -> None:
    """As the code that wrote the weights makes them: guided-diffusion, create_classifier, image_size 512."""
    multipliers = (0.5, 1, 1, 2, 2, 4, 4)
    form = Form(
        model_channels=128, channel_mult=multipliers, num_res_blocks=2, attended=(4, 5, 6), resblock_updown=True
    )
    with torch.device("meta"):
        network = NoisyClassifier(512, multipliers=multipliers)
    expected = classifier_shapes(as_classifier(form, num_classes=1000), image_size=512)
    assert shapes(network) == {name: tuple(shape) for name, shape in expected.items()}


def test_attention_pooling_is_what_the_mean_sees() -> None:
    pool = AttentionPool2d(3, 8, heads=2, out_channels=5).double()
    randomize(pool)
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
    randomize(network)
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
    randomize(network)
    network(IMAGES, TIMES).log_softmax(1)[:, :2].sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
