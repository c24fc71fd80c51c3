"""Control over the attention weights of a network."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.networks import ConvClassifier, attention_control
from diffusion_lit.networks.attention import attend, count_heads
from tests.networks.small import IMAGES, TIMES, randomize, seeded, small_adm, small_classifier, small_ddpmpp, small_unet

NETWORKS = pytest.mark.parametrize("make", [small_unet, small_adm, small_ddpmpp, small_classifier])

# One block down, the middle, and two blocks up; for the classifier the pooling.
NAMES: dict[Callable[[], nn.Module], list[str]] = {
    small_unet: ["down.1.attn.0", "mid.attn_1", "up.1.attn.0", "up.1.attn.1"],
    small_adm: ["input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"],
    small_ddpmpp: ["enc.2.attention", "mid.0.attention", "dec.0.1.attention"],
    small_classifier: ["input_blocks.3.1", "middle_block.1", "out.2"],
}


def awake(make: Callable[[], nn.Module]) -> nn.Module:
    network = make()
    randomize(network)
    return network.eval()


def identity(name: str, weights: Tensor) -> Tensor:
    return weights


def uniform(name: str, weights: Tensor) -> Tensor:
    return torch.full_like(weights, 1 / weights.shape[-1])


@NETWORKS
def test_the_identity_changes_nothing_but_rounding(make: Callable[[], nn.Module]) -> None:
    network = awake(make).double()
    plain = network(IMAGES.double(), TIMES)
    with attention_control(network, identity):
        controlled = network(IMAGES.double(), TIMES)
    torch.testing.assert_close(controlled, plain, rtol=1e-12, atol=1e-12)


@NETWORKS
def test_in_single_precision_too(make: Callable[[], nn.Module]) -> None:
    network = awake(make)
    plain = network(IMAGES, TIMES)
    with attention_control(network, identity):
        controlled = network(IMAGES, TIMES)
    assert (controlled - plain).abs().max() < 1e-6 * plain.abs().max()


@NETWORKS
def test_weights_are_handed_out_by_name_in_the_order_of_the_network_and_are_probabilities(
    make: Callable[[], nn.Module],
) -> None:
    network = awake(make)
    seen: list[tuple[str, Tensor]] = []

    def record(name: str, weights: Tensor) -> Tensor:
        seen.append((name, weights))
        return weights

    with attention_control(network, record):
        network(IMAGES, TIMES)
    assert [name for name, _ in seen] == NAMES[make]
    modules = dict(network.named_modules())
    for name, weights in seen:
        heads = modules[name].heads
        assert weights.shape == ((3, heads, 1, 17) if name == "out.2" else (3, heads, 16, 16))
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.min() >= 0


def test_the_weights_are_softmax_of_qk_by_the_formula() -> None:
    network = awake(small_unet).double()
    found: dict[str, Tensor] = {}
    inputs: list[Tensor] = []
    layer = network.get_submodule("mid.attn_1")
    layer.register_forward_hook(lambda _, args, __: inputs.append(args[0]))

    def record(name: str, weights: Tensor) -> Tensor:
        found[name] = weights
        return weights

    with attention_control(network, record):
        network(IMAGES.double(), TIMES)
    h = layer.get_submodule("norm")(inputs[0])
    q, k = (layer.get_submodule(name)(h).flatten(2) for name in "qk")
    for i in range(3):
        scores = q[i].T @ k[i] / math.sqrt(16)
        expected = scores.exp() / scores.exp().sum(1, keepdim=True)
        torch.testing.assert_close(found["mid.attn_1"][i, 0], expected, rtol=1e-9, atol=1e-9)


def test_the_weights_that_come_back_are_used_as_they_are() -> None:
    """Uniform weights put the mean of the values everywhere, and twice the weights twice the mean."""
    network = awake(small_unet).double()
    layer = network.get_submodule("mid.attn_1")
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with attention_control(network, lambda name, weights: 2 * uniform(name, weights)):
        network(IMAGES.double(), TIMES)
    x, out = seen[0]
    values = layer.get_submodule("v")(layer.get_submodule("norm")(x))
    mixed = 2 * values.mean((2, 3), keepdim=True).expand_as(values)
    torch.testing.assert_close(out, x + layer.get_submodule("proj_out")(mixed), rtol=1e-10, atol=1e-10)


@NETWORKS
def test_one_layer_can_be_changed_and_the_output_changes(make: Callable[[], nn.Module]) -> None:
    network = awake(make)
    plain = network(IMAGES, TIMES)
    for chosen in NAMES[make]:

        def change(name: str, weights: Tensor, chosen: str = chosen) -> Tensor:
            return uniform(name, weights) if name == chosen else weights

        with attention_control(network, change):
            controlled = network(IMAGES, TIMES)
        assert (controlled - plain).abs().max() > 1e-4 * plain.abs().max(), chosen


@NETWORKS
def test_afterwards_the_network_is_what_it_was_bit_by_bit(make: Callable[[], nn.Module]) -> None:
    network = awake(make)
    attributes = {name: dict(vars(module)) for name, module in network.named_modules()}
    names = list(network.state_dict())
    plain = network(IMAGES, TIMES)
    with attention_control(network, uniform):
        network(IMAGES, TIMES)
        assert list(network.state_dict()) == names
    assert {name: dict(vars(module)) for name, module in network.named_modules()} == attributes
    assert torch.equal(network(IMAGES, TIMES), plain)


def test_an_exception_in_the_control_ends_it() -> None:
    network = awake(small_unet)
    plain = network(IMAGES, TIMES)

    def fail(name: str, weights: Tensor) -> Tensor:
        raise KeyError(name)

    with pytest.raises(KeyError, match=r"down\.1\.attn\.0"), attention_control(network, fail):
        network(IMAGES, TIMES)
    assert torch.equal(network(IMAGES, TIMES), plain)


def test_a_second_control_is_refused_and_the_first_goes_on() -> None:
    network = awake(small_unet)
    with attention_control(network, uniform):
        controlled = network(IMAGES, TIMES)
        for module in (network, network.get_submodule("mid")):
            with (
                pytest.raises(ValueError, match=r"attn_?\S+ is replaced already; leave that context first"),
                attention_control(module, identity),
            ):
                pass
        assert torch.equal(network(IMAGES, TIMES), controlled)


def test_two_networks_are_controlled_apart() -> None:
    first, second = awake(small_unet), awake(small_adm)
    plain = second(IMAGES, TIMES)
    with attention_control(first, uniform):
        assert torch.equal(second(IMAGES, TIMES), plain)
        with attention_control(second, uniform):
            assert not torch.equal(second(IMAGES, TIMES), plain)


def test_a_network_without_attention_and_weights_of_another_shape_are_refused() -> None:
    with (
        pytest.raises(ValueError, match="ConvClassifier has no attention layer"),
        attention_control(ConvClassifier(8), identity),
    ):
        pass
    network = awake(small_unet)
    with (
        pytest.raises(ValueError, match=r"shape \(3, 1, 16\) for 'down.1.attn.0'; return \(3, 1, 16, 16\)"),
        attention_control(network, lambda _, weights: weights[..., 0]),
    ):
        network(IMAGES, TIMES)


@NETWORKS
def test_gradients_pass_through_the_control(make: Callable[[], nn.Module]) -> None:
    network = awake(make).double()
    x = IMAGES.double().requires_grad_()
    (plain,) = torch.autograd.grad(network(x, TIMES).square().sum(), x)
    with attention_control(network, identity):
        (controlled,) = torch.autograd.grad(network(x, TIMES).square().sum(), x)
    torch.testing.assert_close(controlled, plain, rtol=1e-9, atol=1e-9)


def test_blocks_that_are_recomputed_are_controlled_in_the_backward_pass_too() -> None:
    def gradient(checkpoint_blocks: bool) -> Tensor:
        network = small_unet(checkpoint_blocks=checkpoint_blocks).double()
        randomize(network)
        x = IMAGES.double().requires_grad_()
        with attention_control(network, uniform):
            (found,) = torch.autograd.grad(network(x, TIMES).square().sum(), x)
        return found

    assert torch.equal(gradient(checkpoint_blocks=False), gradient(checkpoint_blocks=True))


@pytest.mark.further
def test_a_compiled_network_is_compiled_anew_for_a_control() -> None:
    network = awake(small_unet)
    compiled = torch.compile(network, backend="eager")
    plain = network(IMAGES, TIMES)
    with attention_control(network, uniform):
        expected = network(IMAGES, TIMES)
    assert torch.equal(compiled(IMAGES, TIMES), plain)
    with attention_control(network, uniform):
        assert torch.equal(compiled(IMAGES, TIMES), expected)
    assert torch.equal(compiled(IMAGES, TIMES), plain)


@NETWORKS
def test_nothing_attends_past_the_control(make: Callable[[], nn.Module]) -> None:
    network = awake(make)

    def fused() -> int:
        with torch.autograd.profiler.profile() as profile:
            network(IMAGES, TIMES)
        return sum(event.name == "aten::scaled_dot_product_attention" for event in profile.function_events or ())

    assert fused() == len(NAMES[make])
    with attention_control(network, identity):
        assert fused() == 0


@pytest.mark.parametrize("queries", [1, 5])
def test_queries_and_keys_may_differ_in_number(queries: int) -> None:
    q, k, v = (torch.randn(2, 3, 4, n, dtype=torch.float64, generator=seeded(n)) for n in (queries, 7, 7))
    weights = torch.einsum("bhcq,bhck->bhqk", q, k).div(2).softmax(-1)
    torch.testing.assert_close(attend(q, k, v), torch.einsum("bhqk,bhck->bhcq", weights, v))


def test_heads_are_counted_or_given() -> None:
    assert count_heads(64, 4) == 4
    assert count_heads(64, 4, head_channels=32) == 2
    for arguments in ((64, 3), (64, 0), (64, 4, 48)):
        with pytest.raises(ValueError, match=r"64 channels cannot be split into .*; use a divisor"):
            count_heads(*arguments)
