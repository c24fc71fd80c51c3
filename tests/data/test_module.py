import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.data import (
    LSUN,
    CorruptImage,
    CorruptImageWarning,
    Digits,
    Example,
    Folder,
    ImageData,
    ImageDataset,
    InMemoryImages,
    Source,
    Split,
)
from diffusion_lit.types import Batch
from tests import forked

Write = Callable[..., Path]

# Lightning 2.6 on torch 2.15.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Numbered(Source):
    """Grey 4 x 4 images: image i is i on the left and 255 on the right, labelled 2 i; 22 to train on, 17 else."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 4, 4

    def load(self, split: Split) -> InMemoryImages:
        numbers = torch.arange(22 if split == "train" else 17)
        images = numbers.to(torch.uint8)[:, None, None, None].repeat(1, 1, 4, 4)
        images[..., 2:] = 255
        return InMemoryImages(f"numbered {split}", images, 2 * numbers)


class Recorder(L.LightningModule):
    """Writes down what reaches it: (number, mirrored) of every image, by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.trained: list[list[tuple[int, bool]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert sorted(batch) == ["image", "label"]
        assert batch["image"].dtype == torch.float32
        ends = ((batch["image"][:, 0, 0] + 1) * 127.5).round().int()
        mirrored = ends[:, 0] == 255
        numbers = torch.where(mirrored, ends[:, -1], ends[:, 0])
        assert torch.equal(2 * numbers, batch["label"].int())
        self.trained.append(list(zip(numbers.tolist(), mirrored.tolist(), strict=True)))
        return self.weight**2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        left, right = batch["image"][:, 0, 0, 0], batch["image"][:, 0, 0, -1]
        assert bool((right == 1).all())
        self.validated += ((left + 1) * 127.5).round().int().tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(max_steps: int, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "val_check_interval": max_steps,
    }
    return L.Trainer(max_steps=max_steps, **{**defaults, **options})


def recorded(max_steps: int, data: ImageData, ckpt_path: Path | None = None, **options: Any) -> Recorder:
    module = Recorder()
    trainer(max_steps, **options).fit(module, data, ckpt_path=ckpt_path)
    return module


def place(rank: int, world_size: int, accumulate: int = 1) -> Any:
    """As much of a trainer as says where a process stands."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=accumulate,
        global_step=0,
        strategy=strategy,
    )


def test_a_resumed_run_sees_the_rest_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = recorded(12, ImageData(Numbered(), batch_size=6, seed=4)).trained
    module, first = Recorder(), trainer(5)
    first.fit(module, ImageData(Numbered(), batch_size=6, seed=4))
    first.save_checkpoint(tmp_path / "half.ckpt")
    rest = recorded(12, ImageData(Numbered(), batch_size=6, seed=4), tmp_path / "half.ckpt").trained
    assert module.trained == whole[:5]
    assert rest == whole[5:]
    # 3.3 epochs of images were seen, about half of them mirrored.
    assert len({number for batch in whole for number, _ in batch}) == 22
    assert 20 < sum(mirrored for batch in whole for _, mirrored in batch) < 52


def test_an_accumulated_step_sees_the_images_of_a_whole_one_also_after_a_resume(tmp_path: Path) -> None:
    whole = recorded(6, ImageData(Numbered(), batch_size=6)).trained
    halves = recorded(6, ImageData(Numbered(), batch_size=6), accumulate_grad_batches=2, val_check_interval=12).trained
    assert [len(batch) for batch in halves] == [3] * 12
    assert sum(halves, []) == sum(whole, [])
    first = trainer(2, accumulate_grad_batches=2, val_check_interval=4)
    first.fit(Recorder(), ImageData(Numbered(), batch_size=6))
    first.save_checkpoint(tmp_path / "some.ckpt")
    rest = recorded(
        6, ImageData(Numbered(), batch_size=6), tmp_path / "some.ckpt", accumulate_grad_batches=2, val_check_interval=12
    )
    assert rest.trained == halves[4:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*does not have many workers")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_trainer_that_restarts_its_loader_goes_on_where_it_was(photo_folder: Write, num_workers: int) -> None:
    class Pixels(Recorder):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            self.seen.append(batch["image"])
            return self.weight**2

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

    def seen(**options: Any) -> Tensor:
        module = Pixels()
        data = ImageData(Folder(root, 8, in_memory=False), batch_size=4, num_workers=num_workers)
        trainer(6, **options).fit(module, data)
        return torch.stack(module.seen)

    root = str(photo_folder())
    epochs = seen(limit_train_batches=2, max_epochs=3, check_val_every_n_epoch=1, val_check_interval=None)
    assert torch.equal(epochs, seen())


def test_validation_in_a_fit_holds_every_image_once_as_it_is() -> None:
    module = recorded(2, ImageData(Numbered(), batch_size=4, eval_batch_size=5))
    assert sorted(module.validated) == list(range(17))


@pytest.mark.further
def test_two_processes_together_train_on_the_batches_of_one_and_validate_every_image_once(
    tmp_path: Path,
) -> None:
    class Writer(Recorder):
        def on_fit_end(self) -> None:
            found = pickle.dumps((self.trained, self.validated))
            (tmp_path / f"rank{self.global_rank}").write_bytes(found)

    def train() -> None:
        data = ImageData(Numbered(), batch_size=6, seed=1, eval_batch_size=4)
        trainer(8, devices=2, strategy="ddp").fit(Writer(), data)

    alone = recorded(8, ImageData(Numbered(), batch_size=6, seed=1))
    assert forked.wait(forked.fork(lambda: forked.in_two(train), tmp_path / "output.txt")) == 0
    (first, seen), (second, others) = (pickle.loads((tmp_path / f"rank{rank}").read_bytes()) for rank in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone.trained
    assert sorted(seen + others) == list(range(17))


@pytest.mark.parametrize(("world_size", "accumulate", "micro"), [(1, 1, 128), (4, 1, 32), (4, 8, 4), (1, 128, 1)])
def test_a_process_gets_its_part_of_the_step(world_size: int, accumulate: int, micro: int) -> None:
    data = ImageData(Digits(), batch_size=128)
    data.trainer = place(0, world_size, accumulate)
    assert len(next(iter(data.train_dataloader()))["image"]) == micro


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulate", "nearest"),
    [(128, 3, 1, "126 or 129"), (128, 3, 2, "126 or 132"), (4, 2, 4, "8"), (7, 7, 2, "14")],
)
def test_a_step_that_cannot_be_divided_names_the_nearest_that_can(
    batch_size: int, world_size: int, accumulate: int, nearest: str
) -> None:
    data = ImageData(Numbered(), batch_size=batch_size)
    data.trainer = place(0, world_size, accumulate)
    with pytest.raises(ValueError, match=f"batch_size={batch_size}, .* {world_size} processes x {accumulate} ") as e:
        data.setup("fit")
    assert str(e.value).endswith(f"--data.batch_size to {nearest}")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_statistics_and_tests_see_every_image_once_over_all_ranks(world_size: int) -> None:
    data, statistics, tested = ImageData(Numbered(), eval_batch_size=4), [], []
    for rank in range(world_size):
        batches = [batch["image"] for batch in data.stored_batches(rank, world_size, 4)]
        assert all(batch.dtype == torch.uint8 and len(batch) <= 4 for batch in batches)
        numbers = [int(image[0, 0, 0]) for batch in batches for image in batch]
        assert numbers == sorted(numbers)
        assert len(numbers) == data.num_images("train", rank, world_size)
        statistics += numbers
        data.trainer = place(rank, world_size)
        tested += [int(image[0, 0, 0]) for batch in data.test_dataloader() for image in batch["image"]]
    assert sorted(statistics) == list(range(22))
    assert sorted(tested) == list(range(17))


def test_only_chosen_images_are_mirrored_and_scaled_to_plus_minus_one() -> None:
    image = torch.tensor([[[[0, 51], [102, 255]]], [[[0, 51], [102, 255]]]], dtype=torch.uint8)
    batch: Batch = {"image": image, "label": torch.tensor([3, 4]), "flip": torch.tensor([False, True])}
    ready = ImageData(Numbered()).on_after_batch_transfer(batch, 0)
    torch.testing.assert_close(ready["image"][0, 0], torch.tensor([[-1.0, -0.6], [-0.2, 1.0]]))
    torch.testing.assert_close(ready["image"][1, 0], torch.tensor([[-0.6, -1.0], [1.0, -0.2]]))
    assert ready["label"].tolist() == [3, 4]
    assert sorted(ready) == ["image", "label"]


def test_class_names_are_those_of_the_training_images_and_fit_the_labels() -> None:
    assert ImageData(Numbered()).class_names is None
    names = [f"class {i}" for i in range(3)]
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    named = InMemoryImages("x", images, torch.arange(3), names)
    assert named.class_names == names
    with pytest.raises(ValueError, match="label 2, but only 2 class names"):
        InMemoryImages("x", images, torch.arange(3), names[:2])


def test_defaults_are_the_source_s_and_options_win() -> None:
    assert (ImageData(Digits()).flip, ImageData(Numbered()).flip) == (False, True)
    assert (ImageData(Digits(), flip=True).flip, ImageData(Numbered(), flip=False).flip) == (True, False)
    assert (ImageData(Digits()).eval_batch_size, ImageData(LSUN("x")).eval_batch_size) == (256, 64)
    assert ImageData(LSUN("x"), eval_batch_size=8).eval_batch_size == 8


def test_each_part_is_loaded_once_and_only_when_needed() -> None:
    loaded: list[Split] = []

    class Counting(Numbered):
        def load(self, split: Split) -> InMemoryImages:
            loaded.append(split)
            return super().load(split)

    data = ImageData(Counting())
    assert loaded == []
    data.setup("fit")
    data.setup("fit")
    data.train_dataloader()
    list(data.stored_batches(0, 1, 8))
    assert loaded == ["train", "val"]
    data.setup("test")
    assert loaded == ["train", "val", "test"]


def test_setup_says_how_many_images_were_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        ImageData(Digits()).setup("fit")
    assert "Digits train: 1,797 images, 1 x 8 x 8, in memory" in caplog.text


def test_loading_leaves_the_random_state_of_the_model_alone() -> None:
    data = ImageData(Numbered(), batch_size=4)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(iter(data.train_dataloader()))
    list(data.stored_batches(0, 1, 8))
    assert torch.equal(torch.rand(3), expected)


def test_fingerprints_in_memory_follow_every_pixel() -> None:
    images = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    first = InMemoryImages("a", images.clone()).fingerprint()
    assert InMemoryImages("b", images.clone()).fingerprint() == first
    assert InMemoryImages("a", images.reshape(5, 4, 2, 2)[:, :1]).fingerprint() != first
    images[4, 0, 3, 3] = 1
    assert InMemoryImages("a", images).fingerprint() != first


def test_tensors_that_are_not_square_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(N, C, H, H\), got torch.float32"):
        InMemoryImages("x", torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 5\)"):
        InMemoryImages("x", torch.zeros(2, 1, 4, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="2 images, but labels"):
        InMemoryImages("x", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3))


def test_in_training_the_next_readable_image_takes_the_place_of_a_corrupt_one(photo_folder: Write) -> None:
    def batches(name: str, **options: Any) -> tuple[ImageData, list[Batch]]:
        root = photo_folder(name=name, **options)
        data = ImageData(Folder(str(root), 16, in_memory=False), batch_size=6, on_corrupt="skip", seed=3)
        loader = iter(data.train_dataloader())
        return data, [next(loader) for _ in range(3)]

    whole, expected = batches("whole")
    with pytest.warns(CorruptImageWarning) as warned:
        data, found = batches("some", broken=(1, 2, 5))
    assert sorted(str(warning.message).split("/")[-1][:7] for warning in warned) == [
        "001.jpg",
        "002.jpg",
        "005.jpg",
    ]
    assert data.corrupt() == [1, 2, 5]
    assert data.num_images() == 3
    originals = [whole.dataset("train").read(i)["image"] for i in range(6)]
    stand_in = {0: 0, 1: 3, 2: 3, 3: 3, 4: 4, 5: 0}
    for before, after in zip(expected, found, strict=True):
        assert torch.equal(before["flip"], after["flip"])
        for image, replaced in zip(before["image"], after["image"], strict=True):
            (index,) = (i for i in range(6) if torch.equal(image, originals[i]))
            assert torch.equal(replaced, originals[stand_in[index]])


class Described(ImageDataset):
    """Grey 4 x 4 images: image i has the value i, and on the left edge of every spatial entry i + 100."""

    def __init__(self) -> None:
        super().__init__("described", 4, 1)

    def __len__(self) -> int:
        return 12

    def fingerprint(self) -> str:
        return "described"

    def read(self, index: int) -> Example:
        def edged(dtype: torch.dtype, *shape: int) -> Tensor:
            entry = torch.full(shape, index, dtype=dtype)
            entry[..., 0] += 100
            return entry

        return {
            "image": edged(torch.uint8, 1, 4, 4),
            "label": index % 3,
            "caption": torch.ones(1 + index, dtype=torch.uint8),
            "map": edged(torch.int64, 4, 4),
            "low_res": edged(torch.uint8, 1, 2, 2),
            "mask": torch.arange(4).expand(1, 4, 4) == 0,
        }


class Descriptions(Source):
    """A source of them."""

    image_shape = (1, 4, 4)

    def load(self, split: Split) -> ImageDataset | None:
        return Described() if split == "train" else None


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_spatial_entries_are_mirrored_with_the_image_and_others_are_passed_on(num_workers: int) -> None:
    data = ImageData(Descriptions(), batch_size=24, num_workers=num_workers)
    batch = next(iter(data.train_dataloader()))
    flip, stored = batch["flip"].clone(), batch["image"].clone()
    ready = data.on_after_batch_transfer(batch, 0)
    assert 0 < flip.sum() < 24
    assert sorted(ready) == ["caption", "image", "label", "low_res", "map", "mask"]
    numbers = stored[:, 0, 0, 1].long()
    assert sorted(numbers.tolist()) == sorted([*range(12)] * 2)
    assert torch.equal(ready["label"], numbers % 3)
    assert ready["caption"].shape == (24, 12)
    assert torch.equal(ready["caption"].long().sum(1), numbers + 1)
    image = ((ready["image"][:, 0, 0] + 1) * 127.5).round().long()
    low_res = ((ready["low_res"][:, 0, 0] + 1) * 127.5).round().long()
    for row in (image, ready["map"][:, 0], low_res):
        edge = torch.where(flip, row[:, -1], row[:, 0])
        other = torch.where(flip, row[:, 0], row[:, -1])
        assert torch.equal(edge, numbers + 100)
        assert torch.equal(other, numbers)
    assert torch.equal(ready["mask"][:, 0, 0, -1].bool(), flip)
    assert torch.equal(ready["mask"][:, 0, 0, 0].bool(), ~flip)
    assert ready["map"].dtype == torch.int64
    assert ready["low_res"].dtype == ready["mask"].dtype == torch.float32


def test_stored_batches_and_images_by_number_have_all_entries_too() -> None:
    data = ImageData(Descriptions())
    assert torch.equal(data.some([3, 7])["caption"].sum(1), torch.tensor([4, 8]))
    (batch,) = data.stored_batches(0, 1, 12)
    assert batch["mask"].shape == (12, 1, 4, 4)


class Few(Source):
    """As many validation and test images as wanted, read as needed; some cannot be read."""

    image_shape = (1, 4, 4)

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count = count
        self.broken = broken

    def load(self, split: Split) -> ImageDataset:
        whole = Numbered().load(split)
        count, broken = self.count, self.broken

        class Lazy(ImageDataset):
            def __len__(self) -> int:
                return len(whole) if split == "train" else count

            def read(self, index: int) -> Example:
                if split != "train" and index in broken:
                    raise CorruptImage(f"image {index} is broken", index)
                return whole.read(index)

            def fingerprint(self) -> str:
                return "few"

        return Lazy(f"few {split}", 4, 1)


CASES = [(1, ()), (2, ()), (3, ()), (2, (1,)), (4, (1, 3)), (2, (0, 1))]


@pytest.mark.filterwarnings(f"ignore::{CorruptImageWarning.__module__}.CorruptImageWarning")
@pytest.mark.parametrize(("count", "broken"), CASES)
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_an_empty_share_has_as_many_batches_as_any_other(count: int, broken: tuple[int, ...], world_size: int) -> None:
    lengths, seen, stored = set(), [], []
    for rank in range(world_size):
        data = ImageData(Few(count, broken), on_corrupt="skip", eval_batch_size=2)
        data.trainer = place(rank, world_size)
        loader = data.test_dataloader()
        batches = list(loader)
        lengths |= {len(loader), len(batches)}
        assert all(batch["image"].shape[1:] == (1, 4, 4) for batch in batches)
        seen += [int(label) for batch in batches if "label" in batch for label in batch["label"]]
        found = [len(batch["image"]) for batch in data.stored_batches(rank, world_size, 2, "test")]
        assert 0 not in found
        assert sum(found) == data.num_images("test", rank, world_size)
        stored += found
    assert len(lengths) == 1
    assert sorted(seen) == [2 * i for i in range(count) if i not in broken]
    assert sum(stored) == len(seen)


@pytest.mark.filterwarnings(
    f"ignore::{CorruptImageWarning.__module__}.CorruptImageWarning", "ignore:.*does not have many workers"
)
@pytest.mark.parametrize(("count", "broken"), [(1, ()), (4, (1, 3)), (2, (0, 1))])
def test_two_processes_validate_although_one_has_nothing_to_read(
    tmp_path: Path, count: int, broken: tuple[int, ...]
) -> None:
    class Counter(Recorder):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            number = len(batch["image"])
            mean = batch["label"].float().mean() if number else torch.zeros(())
            # A float: Lightning rounds the mean of whole numbers over processes down, here to 0.
            self.log("mean", mean, on_epoch=True, sync_dist=True, batch_size=float(number))  # type: ignore[arg-type]

        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                (tmp_path / f"rank{self.global_rank}").touch()

    pair = trainer(2, devices=2, strategy="ddp_fork")
    pair.fit(Counter(), ImageData(Few(count, broken), batch_size=2, on_corrupt="skip"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0", "rank1"]
    if len(broken) < count:
        readable = [2 * i for i in range(count) if i not in broken]
        assert float(pair.callback_metrics["mean"]) == pytest.approx(sum(readable) / len(readable))


@pytest.mark.filterwarnings(f"ignore::{CorruptImageWarning.__module__}.CorruptImageWarning")
def test_in_one_pass_a_corrupt_image_is_dropped_and_an_empty_batch_passed_over(photo_folder: Write) -> None:
    data = ImageData(Folder(str(photo_folder(broken=(0, 1, 4))), 16, in_memory=False), on_corrupt="skip")
    batches = [batch["image"] for batch in data.stored_batches(0, 1, 2)]
    assert [len(batch) for batch in batches] == [2, 1]
    assert torch.equal(torch.cat(batches), data.dataset("train").batch([2, 3, 5])["image"])
    assert [data.num_images("train", rank, 2) for rank in range(2)] == [1, 2]


def test_a_corrupt_image_stops_one_pass_too(photo_folder: Write) -> None:
    data = ImageData(Folder(str(photo_folder(broken=(4,))), 16, in_memory=False))
    with pytest.raises(CorruptImage, match=r"004\.jpg"):
        list(data.stored_batches(0, 1, 2))


def test_a_run_without_validation_images_trains(photo_folder: Write) -> None:
    steps: list[int] = []

    class Unlabelled(Recorder):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            steps.append(len(batch["image"]))
            return self.weight**2

    trainer(3).fit(Unlabelled(), ImageData(Folder(str(photo_folder(3)), 8), batch_size=8))
    assert steps == [8, 8, 8]
