"""Systems train on plain Lightning data modules, whose batches are (image, label) tuples."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from diffusion_lit.checkpoint import load_model
from diffusion_lit.data.tuples import Tuples
from diffusion_lit.images import from_uint8
from diffusion_lit.module import DiffusionModule
from tests import tiny
from tests.test_recorded import ADAM
from tests.test_starts import conditional

SHAPE = (1, 8, 8)


class PlainData(lightning.LightningDataModule):
    """What a user of Lightning has already."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int = 4) -> None:
        super().__init__()
        self.size = batch_size
        self.examples = TensorDataset(images, labels)

    def train_dataloader(self) -> Any:
        return DataLoader(self.examples, batch_size=self.size)

    def val_dataloader(self) -> Any:
        return DataLoader(self.examples, batch_size=self.size)


def pixels(count: int = 8) -> Tensor:
    """Images, uint8 (B, 1, 8, 8), among them 0 and 255 in each."""
    images = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0], images[:, 0, 0, 1] = 0, 255
    return images


LABELS = torch.arange(8) % 3


@pytest.mark.parametrize("of", [lambda x: x, lambda x: x / 255, from_uint8, lambda x: from_uint8(x).half()])
def test_images_of_every_accepted_range_become_the_same_batch(of: Any) -> None:
    batch = Tuples()([of(pixels()), LABELS], SHAPE, 3)
    torch.testing.assert_close(batch["image"], pixels() / 127.5 - 1, rtol=0, atol=1e-3)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].tolist() == LABELS.tolist()


def test_labels_that_are_no_classes_are_left_out() -> None:
    for other in (torch.rand(8), torch.zeros(8, 2, dtype=torch.long), ["a"] * 8, torch.ones(8, dtype=torch.bool)):
        assert "label" not in Tuples()((pixels(), other), SHAPE, None)
    assert "label" not in Tuples()(pixels(), SHAPE, None)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([pixels().float(), LABELS], r"lie in 0 \.\. 255; images must be uint8 in 0 \.\. 255, or float in \[0, 1\]"),
        ([torch.full((2, *SHAPE), torch.nan), LABELS], r"lie in nan \.\. nan"),
        ([pixels().long(), LABELS], "images are torch.int64"),
        ([pixels()[:, :, :4], LABELS], r"images are \(1, 4, 8\).* the model takes \(1, 8, 8\)"),
        ([pixels()[:, 0], LABELS], r"images are \(8, 8\)"),
        ([pixels(), LABELS + 1], "labels from 1 to 3, but the model has num_classes=3; labels count from 0"),
        ([pixels(), LABELS, LABELS], r"batches of list \(Tensor, Tensor, Tensor\); they must be \(image, label\)"),
        ({"pixels": pixels()}, r"batches of dict \(pixels\)"),
        (["a", "b"], r"batches of list \(str, str\)"),
    ],
)
def test_what_is_no_batch_of_images_is_said_in_one_line(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        Tuples()(batch, SHAPE, 3)
    assert "\n" not in str(raised.value)


def test_a_range_that_changes_is_an_error_and_no_change_of_brightness() -> None:
    tuples = Tuples()
    tuples((pixels() / 255,), SHAPE, None)
    with pytest.raises(ValueError, match=r"lie in -1 \.\. 1, those of the first batch in \[0, 1\]"):
        tuples((from_uint8(pixels()),), SHAPE, None)
    other = Tuples()
    other((from_uint8(pixels()),), SHAPE, None)
    bright = torch.full((2, *SHAPE), 0.5)
    assert torch.equal(other((bright,), SHAPE, None)["image"], bright)


@pytest.mark.parametrize("plain", [True, False])
def test_a_model_with_classes_trains_on_tuples_validates_and_is_loaded(tmp_path: Path, plain: bool) -> None:
    system = conditional(3, optimizer=ADAM, lr_scheduler=None)
    data = PlainData(pixels() / 255, LABELS)
    if plain:
        trainer: Any = lightning.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=0, max_epochs=2,
        )  # fmt: skip
    else:
        trainer = tiny.trainer(tmp_path, 4, callbacks=[], limit_val_batches=1.0, val_check_interval=2)
    trainer.fit(system, data)
    assert trainer.global_step == 4
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    loaded = load_model(tmp_path / "model.ckpt", DiffusionModule)
    assert torch.equal(loaded.sample(range(2)), system.sample(range(2)))


def test_tuples_and_the_package_s_own_data_give_the_same_step(tmp_path: Path) -> None:
    data = tiny.data()
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    images, labels = batch["image"], batch["label"]
    weights: list[dict[str, Tensor]] = []
    for given in (tiny.data(), PlainData(images, labels, tiny.BATCH)):
        system = tiny.module()
        tiny.trainer(tmp_path / str(len(weights)), 1, callbacks=[]).fit(system, given)
        weights.append(system.state_dict())
    assert tiny.identical(*weights)
