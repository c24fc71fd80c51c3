"""NCSN++ with a latent variable, and the discriminator of pairs: the paper's sizes, and what they compute."""

import numpy as np
import pytest
import torch
from scipy import signal

from diffusion_lit.networks import NCSNpp, PairDiscriminator
from diffusion_lit.networks.discriminator import append_deviation
from diffusion_lit.networks.fir import SmoothDownsample, SmoothStridedConv, SmoothUpsample

SMALL = {"image_size": 8, "in_channels": 1, "width": 8, "multipliers": [1, 2], "num_blocks": 1, "attention": [4]}
LATENT = {"latent_size": 5, "latent_width": 8, "latent_layers": 1}


def small(**kwargs: object) -> NCSNpp:
    torch.manual_seed(0)
    return NCSNpp(**{**SMALL, **LATENT, **kwargs})  # type: ignore[arg-type]


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_networks_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        assert count(NCSNpp()) == 48_432_515
        assert count(PairDiscriminator()) == 12_741_633
        large = NCSNpp(256, width=64, multipliers=[1, 1, 2, 2, 4, 4], latent_layers=3)
        assert count(large) == 39_726_979
        widths = [128, 256, 512, 512, 512, 512, 512]
        assert count(PairDiscriminator(256, widths=widths, downsample=[True] * 6)) == 27_737_217


def test_the_changes_of_resolution_are_those_of_a_filter_and_zeros_in_between() -> None:
    x = torch.randn(2, 3, 8, 8)
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    for image, down, up in zip(
        x.flatten(0, 1), SmoothDownsample()(x).flatten(0, 1), SmoothUpsample()(x).flatten(0, 1), strict=True
    ):
        filtered = signal.convolve2d(np.pad(image, 1), kernel, "valid")[::2, ::2]
        np.testing.assert_allclose(down, filtered, atol=1e-6)
        spread = np.zeros((16, 16))
        spread[::2, ::2] = image
        np.testing.assert_allclose(up, signal.convolve2d(np.pad(spread, (2, 1)), 4 * kernel, "valid"), atol=1e-6)


def test_a_constant_image_keeps_its_value_where_no_edge_is_near() -> None:
    x = torch.full((1, 2, 8, 8), 0.7)
    assert torch.allclose(SmoothDownsample()(x)[..., 1:-1, 1:-1], torch.tensor(0.7))
    assert torch.allclose(SmoothUpsample()(x)[..., 1:-1, 1:-1], torch.tensor(0.7))
    assert SmoothStridedConv(2, 5)(x).shape == (1, 5, 4, 4)


def test_the_filters_are_in_no_state_dict() -> None:
    assert not [name for name in small().state_dict() if "filter" in name]


def test_only_the_direction_of_the_latent_variable_matters_and_it_does() -> None:
    network = small()
    # Untrained, the last layers of all branches are nearly zero.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, time, z = torch.randn(2, 1, 8, 8), torch.tensor([0.0, 3.0]), torch.randn(2, 5)
    with torch.no_grad():
        y = network(x, time, {"latent": z})
        assert y.shape == x.shape
        assert float(y.abs().max()) < 1
        assert torch.allclose(y, network(x, time, {"latent": 3 * z}), atol=1e-5)
        assert not torch.allclose(y, network(x, time, {"latent": -z}), atol=1e-3)
        assert not torch.allclose(y, network(x, time.flip(0), {"latent": z}), atol=1e-3)


def test_a_checkpointed_network_has_the_same_gradients() -> None:
    x, time, z = torch.randn(2, 1, 8, 8), torch.tensor([0.0, 3.0]), torch.randn(2, 5)
    gradients = []
    for recompute in (False, True):
        network = small(checkpoint_blocks=recompute)
        network(x, time, {"latent": z}).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_without_a_latent_variable_there_is_one_line_of_help() -> None:
    with pytest.raises(ValueError, match="needs the latent variable of each image; train it with --model DDGAN"):
        small()(torch.randn(1, 1, 8, 8), torch.zeros(1))


@pytest.mark.parametrize("b", [1, 2, 6, 8])
def test_the_appended_deviation_is_that_over_strided_groups(b: int) -> None:
    x = torch.randn(b, 3, 2, 2)
    appended = append_deviation(x)
    group = max(size for size in (1, 2, 3, 4) if b % size == 0)
    for i in range(b):
        members = x.numpy()[i % (b // group) :: b // group]
        expected = np.sqrt(members.var(0) + 1e-8).mean()
        np.testing.assert_allclose(appended[i, 3], expected, rtol=1e-5)
    assert torch.equal(appended[:, :3], x)


def test_a_discriminator_of_sizes_that_do_not_agree_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size=8, 5 widths and 4 entries of downsample"):
        PairDiscriminator(8, 1, widths=[4, 4, 4, 4, 4], downsample=[True] * 4)


def test_more_layers_than_any_network_has_are_refused_at_once() -> None:
    for count in (-1, 2**30):
        with pytest.raises(ValueError, match=rf"latent_layers={count} must lie in 0 \.\. 1000"):
            NCSNpp(16, width=8, multipliers=[1], latent_layers=count)
