"""The recipes of text models: what their papers say of them."""

import pytest
import torch
from torch import nn

from diffusion_lit import cli
from diffusion_lit.conditioners import Text
from diffusion_lit.data import CaptionedDigits
from tests.test_configs import instantiate


def test_the_text_to_image_model_has_the_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made = instantiate("txt2img", monkeypatch)
    model = made.model
    network, conditioner = model.denoiser.network, model.conditioner
    assert isinstance(conditioner, Text)
    assert size(network) == 872_300_484
    # 581,994,042 with an output head that nothing uses.
    assert size(conditioner) + 30_522 * 1280 + 30_522 == 581_994_042
    assert (conditioner.encoder.length, made.datamodule.batch_size) == (77, 680)
    alpha, _ = model.process.alpha_sigma(torch.tensor([1.0], dtype=torch.float64))
    assert abs(float(alpha**2) - 4.66010e-3) < 1e-7


@pytest.mark.further
def test_the_recipe_of_the_digits_fits_its_captions() -> None:
    made = cli.CLI.parts(["fit", "-c", "text_digits", "--trainer.accelerator", "cpu", "--trainer.devices", "1"])
    conditioner = made.model.conditioner
    assert isinstance(conditioner, Text)
    conditioner.start(made.datamodule, torch.device("cpu"))
    texts = {text for split in ("train", "test") for text in CaptionedDigits().load(split).texts(10**6)}
    found = conditioner.tokenizer(sorted(texts), conditioner.encoder.length)
    assert max(found.cut) == 0
    assert not (found.ids == conditioner.unknown).any()


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
