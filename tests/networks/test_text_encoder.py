"""The text encoder of latent diffusion."""

from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from diffusion_lit.networks import TextEncoder, attention_control
from tests.networks.small import count, randomize, seeded, shapes

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def small(**changes: Any) -> TextEncoder:
    """Heads of 2 x 3 channels inside 8."""
    sizes = {"vocabulary": 11, "length": 7, "width": 8, "depth": 2, "num_heads": 2, "head_channels": 3}
    network = TextEncoder(**{**sizes, **changes})
    randomize(network)
    return network.eval()


@pytest.mark.parametrize(
    ("arguments", "published", "head"),
    [
        ({"vocabulary": 30522}, 581_994_042, 1281 * 30522),
        ({"vocabulary": 30522, "width": 640}, 186_154_682, 641 * 30522),
        ({"vocabulary": 8192, "length": 92, "width": 512, "depth": 16}, 58_858_496, 513 * 8192),
    ],
    ids=["txt2img", "text2img256", "layout2img"],
)
def test_the_published_encoders_to_the_parameter(arguments: dict[str, Any], published: int, head: int) -> None:
    with torch.device("meta"):
        assert count(TextEncoder(**arguments, output_head=True)) == published
        assert count(TextEncoder(**arguments)) == published - head


def test_weights_have_the_published_names() -> None:
    with torch.device("meta"):
        found = shapes(TextEncoder(30522, output_head=True))
    expected = {
        "token_emb.weight": (30522, 1280),
        "pos_emb.emb.weight": (77, 1280),
        "attn_layers.layers.0.0.weight": (1280,),
        "attn_layers.layers.0.1.to_q.weight": (512, 1280),
        "attn_layers.layers.62.1.to_out.weight": (1280, 512),
        "attn_layers.layers.62.1.to_out.bias": (1280,),
        "attn_layers.layers.63.1.net.0.0.weight": (5120, 1280),
        "attn_layers.layers.63.1.net.2.bias": (1280,),
        "norm.bias": (1280,),
        "to_logits.weight": (30522, 1280),
    }
    assert {name: found.get(name) for name in expected} == expected
    assert "attn_layers.layers.0.1.to_q.bias" not in found
    assert "attn_layers.layers.64.0.weight" not in found
    assert len(found) == 2 + 32 * (2 + 5 + 2 + 4) + 2 + 2


def in_diffusers(network: TextEncoder, tokens: Tensor) -> Tensor:
    """The same by diffusers' transformer blocks: self-attention and a feed-forward layer, both after their norms."""
    state = network.state_dict()
    x = state["token_emb.weight"][tokens] + state["pos_emb.emb.weight"][: tokens.shape[1]]
    for i in range(2):
        block = BasicTransformerBlock(8, 2, 3, activation_fn="gelu", attention_bias=False, norm_eps=1e-5).to(x.dtype)
        names = {
            f"layers.{2 * i}.0.": "norm1.",
            f"layers.{2 * i}.1.to_out.": "attn1.to_out.0.",
            f"layers.{2 * i}.1.": "attn1.",
            f"layers.{2 * i + 1}.0.": "norm3.",
            f"layers.{2 * i + 1}.1.net.0.0.": "ff.net.0.proj.",
            f"layers.{2 * i + 1}.1.": "ff.",
        }
        given: dict[str, Tensor] = {}
        for name, tensor in state.items():
            for ours, theirs in names.items():
                if name.startswith(f"attn_layers.{ours}"):
                    given[theirs + name.removeprefix(f"attn_layers.{ours}")] = tensor
                    break
        block.load_state_dict(given)
        x = block(x)
    return nn.functional.layer_norm(x, (8,), state["norm.weight"], state["norm.bias"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_it_computes_what_diffusers_does(dtype: torch.dtype, tolerance: float) -> None:
    network = small().to(dtype)
    found, expected = network(TOKENS), in_diffusers(network, TOKENS)
    assert found.shape == (2, 5, 8)
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_the_output_head_changes_no_output_and_gets_no_gradient() -> None:
    plain, headed = small(), small(output_head=True)
    headed.load_state_dict({**headed.state_dict(), **plain.state_dict()})
    assert torch.equal(plain(TOKENS), headed(TOKENS))
    headed(TOKENS).square().sum().backward()
    idle = [name for name, p in headed.named_parameters() if p.grad is None]
    assert idle == ["to_logits.weight", "to_logits.bias"]


def test_every_token_depends_on_every_other_and_on_its_place() -> None:
    network = small()
    out = network(TOKENS)
    padded = TOKENS.clone()
    padded[0, 4] = 0
    changed = (network(padded) - out).abs().amax(-1)
    assert (changed[0] > 1e-4).all()
    assert (changed[1] == 0).all()
    moved = network(TOKENS[:, [1, 0, 2, 3, 4]])[:, [1, 0, 2, 3, 4]]
    assert (moved - out).abs().max() > 1e-3


def test_embeddings_are_small_at_first() -> None:
    torch.manual_seed(0)
    network = TextEncoder(1000, 50, 64, depth=1)
    for embedding in (network.token_emb, network.pos_emb["emb"]):
        assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)  # type: ignore[operator]


def test_blocks_that_are_computed_again_have_the_same_gradients() -> None:
    found = []
    for checkpoint_blocks in (False, True):
        network = small(checkpoint_blocks=checkpoint_blocks)
        network(TOKENS).square().mean().backward()
        found.append([p.grad for p in network.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_its_attention_can_be_controlled() -> None:
    network = small()
    seen: list[str] = []

    def record(name: str, weights: Tensor) -> Tensor:
        assert weights.shape == (2, 2, 5, 5)
        seen.append(name)
        return weights

    with attention_control(network, record):
        network(TOKENS)
    assert seen == ["attn_layers.layers.0.1", "attn_layers.layers.2.1"]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), ["(2, 8)", "from 1 to length=7"]),
        (torch.zeros(2, 0, dtype=torch.int64), ["(2, 0)", "from 1 to length=7"]),
        (torch.zeros(5, dtype=torch.int64), ["(5,)", "(B, L)"]),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens: Tensor, words: list[str]) -> None:
    with pytest.raises(ValueError, match="TextEncoder") as error:
        small()(tokens)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["vocabulary", "length", "width", "depth", "num_heads", "head_channels"])
def test_sizes_that_are_too_small_are_refused(name: str) -> None:
    least = 0 if name == "depth" else 1
    with pytest.raises(ValueError, match=rf"TextEncoder: {name}={least - 1} must be at least {least}"):
        small(**{name: least - 1})


def test_blocks_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match=r"TextEncoder: depth=1073741824 must be at most 1000"):
        small(depth=2**30)


def test_without_blocks_each_token_of_the_context_depends_on_its_own_word() -> None:
    network = small(depth=0)
    tokens = torch.tensor([[1, 2, 3, 4], [1, 5, 3, 4]])
    one, other = network(tokens)
    assert torch.equal(one[[0, 2, 3]], other[[0, 2, 3]])
    assert not torch.allclose(one[1], other[1])


def test_fewer_tokens_than_the_longest_text_have_the_first_places() -> None:
    network = small(depth=1)
    before = network(TOKENS)
    with torch.no_grad():
        network.pos_emb["emb"].weight[5:] = 7.0  # type: ignore[operator]
    assert torch.equal(network(TOKENS), before)


def test_a_text_of_one_token_attends_to_itself() -> None:
    """Then attention is linear: the output projection of the values."""
    network = small(depth=1).double()
    attention: Any = network.get_submodule("attn_layers.layers.0.1")
    x = torch.randn(2, 1, 8, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(attention(x), attention.to_out(attention.to_v(x)))
