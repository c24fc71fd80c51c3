"""Networks as the command line's parser chooses them: by name, and only where they fit."""

from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from diffusion_lit.networks import ADMUNet, NoisyClassifier, UNet
from diffusion_lit.types import Condition, Network, TimeDependentClassifier


class Model:
    def __init__(self, network: Network) -> None:
        self.network = network


class Guide:
    def __init__(self, network: TimeDependentClassifier) -> None:
        self.network = network


class Own(Network):
    """A network from outside the package."""

    def __init__(self, image_size: int = 4) -> None:
        super().__init__()
        self.image_size, self.in_channels = image_size, 1

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        return x


def parser(owner: type) -> ArgumentParser:
    found = ArgumentParser(exit_on_error=False)
    found.add_class_arguments(owner, "model")
    return found


def chosen(owner: type, *arguments: str) -> Any:
    made = parser(owner)
    with torch.device("meta"):
        return made.instantiate(made.parse_args(list(arguments))).model.network


@pytest.mark.parametrize("name", ["{}", "diffusion_lit.networks.{}"])
@pytest.mark.parametrize(("owner", "network"), [(Model, UNet), (Model, ADMUNet), (Guide, NoisyClassifier)])
def test_a_network_is_chosen_by_its_short_name_or_its_path(owner: type, network: type, name: str) -> None:
    found = chosen(owner, "--model.network", name.format(network.__name__), "--model.network.in_channels", "1")
    assert type(found) is network
    assert vars(found)["in_channels"] == 1


def test_a_network_from_elsewhere_fits_if_it_is_a_network() -> None:
    found = chosen(Model, "--model.network", f"{__name__}.Own", "--model.network.image_size", "6")
    assert type(found) is Own
    assert found.image_size == 6


@pytest.mark.parametrize(
    ("owner", "path"),
    [
        (Model, "torch.nn.Linear"),
        (Model, "subprocess.Popen"),
        (Model, "diffusion_lit.networks.NoisyClassifier"),
        (Model, "diffusion_lit.networks.ConvClassifier"),
        (Model, "diffusion_lit.types.Network"),
        (Guide, "diffusion_lit.networks.UNet"),
        (Guide, "diffusion_lit.networks.ConvClassifier"),
    ],
)
def test_nothing_else_fits(owner: type, path: str) -> None:
    with pytest.raises(ArgumentError, match=r"does not correspond to a subclass of|is abstract") as error:
        parser(owner).parse_args(["--model.network", path])
    assert path in str(error.value)


def test_the_help_lists_the_networks() -> None:
    listed = parser(Model).format_help()
    assert "diffusion_lit.networks.ADMUNet" in listed
    assert "diffusion_lit.networks.UNet" in listed
    assert "Classifier" not in listed
    assert "diffusion_lit.networks.NoisyClassifier" in parser(Guide).format_help()


def test_multipliers_are_stored_as_they_are_written() -> None:
    written = ["--model.network", "UNet", "--model.network.multipliers", "[0.5, 1, 2]"]
    found = parser(Model).parse_args(written).model.network.init_args.multipliers
    assert [(type(m), m) for m in found] == [(float, 0.5), (int, 1), (int, 2)]


@pytest.mark.parametrize("network", [UNet, ADMUNet, NoisyClassifier])
def test_the_first_line_of_the_documentation_is_a_sentence(network: type[nn.Module]) -> None:
    """It is all that the help of a network shows of it."""
    first = (network.__doc__ or "").splitlines()[0]
    assert first.endswith(".")
