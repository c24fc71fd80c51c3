"""What must hold with several processes: here two on a CPU, over gloo.

Scenarios run here with one process and, all in one go, in two processes of their own; they write down what they saw,
and the tests compare.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.data import Digits, ImageData
from diffusion_lit.data.dataset import ImageDataset, InMemoryImages, Split
from diffusion_lit.diffusion import Denoiser, Gaussian, NoiseSource, Objective, UniformTimes
from diffusion_lit.evaluation import Evaluation, Likelihood
from diffusion_lit.images import from_uint8, to_uint8
from diffusion_lit.metrics import KID, FrechetDistance, Pixels, PrecisionRecall
from diffusion_lit.networks import ConvClassifier
from diffusion_lit.records import RESULTS, read_records
from diffusion_lit.requests import Requests
from diffusion_lit.system import System
from diffusion_lit.types import Batch, Condition
from tests import forked, tiny
from tests.tiny import curves, identical, last, load


def two_processes(place: Path) -> None:
    """Runs all scenarios in two processes; both end here, come what may."""

    def run() -> None:
        for scenario in SCENARIOS:
            folder = place / scenario.__name__
            folder.mkdir(exist_ok=True)
            scenario(2, folder)

    output = place / "output.txt"
    assert forked.wait(forked.fork(lambda: forked.in_two(run), output)) == 0, output.read_text()[-4000:]


def trainer(count: int, place: Path, max_steps: int, callbacks: list[L.Callback], **kwargs: Any) -> Any:
    return tiny.trainer(place, max_steps, callbacks, devices=count, strategy="ddp" if count > 1 else "auto", **kwargs)


class FromTheImage(Objective):
    """Times and noise that are functions of the image, so that a gradient does not depend on who computes it."""

    times = UniformTimes()

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: Condition,
        noise: NoiseSource = Gaussian(),
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        t = ((x0.flatten(1).sum(1).abs() * 7).long() % 100 + 1) / 100
        losses = self.losses_at(denoiser, x0, torch.sin(x0 * 50 + torch.arange(64.0).view(1, 1, 8, 8)), t, condition)
        return {"loss": losses.mean(), "t": t, "losses": losses.detach()}

    def losses_at(self, denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        prediction = denoiser(denoiser.process.perturb(x0, eps, t), t, condition)
        losses: Tensor = (eps - prediction.eps).square().flatten(1).mean(1)
        return losses


class Few(Digits):
    """The first so many digits for validation, all for training."""

    def __init__(self, count: int) -> None:
        self.count = count

    def load(self, split: Split) -> ImageDataset:
        images = super().load(split)
        return images if split == "train" else InMemoryImages("few", images.batch(range(self.count))["image"])


class Watch(L.Callback):
    """Writes down what one process sees of the first steps."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.seen: dict[str, list[Tensor]] = {"image": [], "noise": [], "gradient": [], "weights": []}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: object) -> None:
        self.seen["image"].append(batch["image"].clone())

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.seen["gradient"].append(torch.cat(gradients or [torch.zeros(0)]))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self.seen["noise"].append(torch.randn(8))
        self.seen["weights"].append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(self.seen, self.place / f"rank_{trainer.global_rank}.pt")


class Score(L.Callback):
    """Writes down a Fréchet distance in full precision."""

    def __init__(self, evaluation: Evaluation, place: Path) -> None:
        self.evaluation = evaluation
        self.place = place

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = self.evaluation.evaluate(trainer, pl_module)["scores"]["frechet/pixels"]  # type: ignore[arg-type]
        (self.place / f"score_{trainer.global_rank}.json").write_text(json.dumps(value))


class WithRunningMeans(System):
    """A classifier with running means, trained like a system with several optimizers."""

    def __init__(self) -> None:
        super().__init__(tiny.optimizer)
        self.automatic_optimization = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = ConvClassifier(image_size=8, in_channels=1, num_classes=10, width=8)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        losses = torch.nn.functional.cross_entropy(self.network(batch["image"]), batch["label"], reduction="none")
        return {"loss": losses.mean(), "losses": losses}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        parts = self.losses(batch)
        self.update(self.all_optimizers()[0], parts["loss"])
        outputs = self.note(parts)
        self.finish_step()
        return outputs


# Scenarios


def train(count: int, place: Path) -> None:
    """Steps whose gradient is known."""
    model = tiny.module(network=tiny.network(dropout=0.0), objective=FromTheImage())
    trainer(count, place, 3, [EMA([0.9]), Scalars(), Watch(place)], log_every_n_steps=3).fit(model, tiny.data())


def train_pair(count: int, place: Path) -> None:
    """Steps of two optimizers without randomness, one of them bad."""
    model = tiny.Pair(bad_at=[3], random=False)
    made = trainer(count, place, 5, [EMA([0.5]), Scalars(), Watch(place), Checkpoints()], gradient_clip_val=0.05)
    made.fit(model, tiny.data())


def resume_pair(count: int, place: Path) -> None:
    """Two optimizers, with validations, in one piece and in two."""
    for name, stops in (("whole", [5]), ("parts", [2, 5])):
        for stop in stops:
            callbacks = [EMA([0.9]), Scalars(), Checkpoints()]
            settings = {"log_every_n_steps": 3, "val_check_interval": 4, "limit_val_batches": 1}
            trainer(count, place / name, stop, callbacks, **settings).fit(tiny.Pair(), tiny.data(), ckpt_path="last")


class LogsOnce(tiny.Pair):
    """Logs something of its first step alone."""

    def note(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        early = {"early": torch.tensor(7.0)} if self.step == 1 else {}
        return super().note({**early, **parts})


def widen(count: int, place: Path) -> None:
    """Two steps by one process, with sums of the log pending, then as many processes as there are."""
    stop = 2 if count == 1 else 4
    callbacks = [EMA([0.9]), Scalars(), Checkpoints()]
    made = trainer(count, place, stop, callbacks, log_every_n_steps=4)
    made.fit(LogsOnce(random=False), tiny.data(), ckpt_path="last")


def running_means(count: int, place: Path) -> None:
    """Running means in a system that calls `update`: what each process has of them at the end."""
    model = WithRunningMeans()
    trainer(count, place, 3, [Checkpoints()]).fit(model, tiny.data())
    torch.save(dict(model.named_buffers()), place / f"buffers_{model.global_rank}.pt")


def validate(count: int, place: Path) -> None:
    """Validations of so few images that one of two processes has none in some batch, or in any."""
    for images in (1, 5):
        for name, model in (("module", tiny.module(objective=FromTheImage())), ("pair", tiny.Pair(random=False))):
            data = ImageData(Few(images), batch_size=tiny.BATCH, eval_batch_size=1)
            folder = place / f"{name}_{images}"
            trainer(count, folder, 1, [], val_check_interval=1, limit_val_batches=None).fit(model, data)


def score(count: int, place: Path) -> None:
    """The distance of an untrained model."""
    evaluation = Evaluation(None, Pixels(4), num_images=22, batch_size=4, cache_dir=str(place / "cache"))
    trainer(count, place, 1, [Score(evaluation, place)], logger=False).fit(tiny.module(), tiny.data())


def resume(count: int, place: Path) -> None:
    """The same run in one piece and in two, where the pause lies between two logged steps."""
    for name, stops in (("whole", [5]), ("parts", [2, 5])):
        for stop in stops:
            callbacks = [EMA([0.9, 0.5]), Scalars(), Checkpoints()]
            made = trainer(count, place / name, stop, callbacks, log_every_n_steps=3)
            made.fit(tiny.module(), tiny.data(), ckpt_path="last")


def generate(count: int, place: Path) -> None:
    """Images 0 .. 9 in batches of four, where one process makes one more batch than the other."""
    made = trainer(count, place, 1, [], logger=False)
    made.predict(tiny.module(), num_images=10, batch_size=4, seed=5, out=str(place / "out"))


def evaluate(count: int, place: Path) -> None:
    """All scores and the bound of an untrained model."""
    scores = [FrechetDistance(), PrecisionRecall(), KID(subsets=3, subset_size=8)]
    settings: dict[str, Any] = {"num_images": 22, "batch_size": 4, "cache_dir": str(place / "cache")}
    evaluation = Evaluation(scores, Pixels(2), **settings)
    likelihood = Likelihood("train", num_images=30, num_terms=5, batch_size=4)
    made = trainer(count, place, 1, [evaluation, likelihood], logger=False, limit_test_batches=1)
    made.test(tiny.module(), tiny.data())


def fail(count: int, place: Path) -> None:
    """One process fails; the run ends all the same and keeps a checkpoint."""

    class Fail(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            if trainer.global_step == 2 and trainer.is_global_zero:
                raise KeyError("on purpose")

    try:
        trainer(count, place, 4, [EMA(), Scalars(), Fail(), Checkpoints()]).fit(tiny.module(), tiny.data())
    except KeyError:
        (place / "failed").touch()
        os._exit(0)


ALONE = (train, train_pair, validate, score, generate, evaluate)
"""What one process does too."""
SCENARIOS = (*ALONE, resume, resume_pair, running_means, widen, fail)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Where one process, and where two wrote what they saw."""
    one, two = (tmp_path_factory.mktemp(f"processes_{count}") for count in (1, 2))
    for scenario in ALONE:
        (one / scenario.__name__).mkdir()
        scenario(1, one / scenario.__name__)
    widen(1, two / "widen")
    two_processes(two)
    return [one, two]


def seen(places: list[Path], what: str, scenario: str = "train") -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    one, first, second = (
        torch.load(place / scenario / f"rank_{rank}.pt", weights_only=True)[what]
        for place, rank in ((places[0], 0), (places[1], 0), (places[1], 1))
    )
    return one, first, second


def test_two_processes_see_together_the_batches_of_one(places: list[Path]) -> None:
    for one, first, second in zip(*seen(places, "image"), strict=True):
        assert first.shape[0] == second.shape[0] == one.shape[0] // 2
        assert torch.equal(torch.cat([first, second]), one)


def test_two_processes_make_the_steps_of_one(places: list[Path]) -> None:
    for one, first, second in zip(*seen(places, "gradient"), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, one, rtol=1e-3, atol=1e-5)
    for _, first, second in zip(*seen(places, "weights"), strict=True):
        assert torch.equal(first, second)
    first_gradients = [gradients[0] for gradients in seen(places, "gradient")[:2]]
    torch.testing.assert_close(*first_gradients, rtol=1e-4, atol=1e-7)


def test_two_processes_make_the_steps_of_one_with_two_optimizers(places: list[Path]) -> None:
    weights = list(zip(*seen(places, "weights", "train_pair"), strict=True))
    assert len(weights) == 5
    for one, first, second in weights:
        assert torch.equal(first, second)
        # Sums over 32 images in another order; Adam divides small gradients by their own size.
        torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-6)
    # The bad step moves none of the weights of its optimizer, 64 x 64 + 64, on either process.
    size = 64 * 65
    assert torch.equal(weights[2][1][:size], weights[1][1][:size])
    assert not torch.equal(weights[3][1][:size], weights[2][1][:size])
    one_run, two_runs = (load(last(place / "train_pair")) for place in places)
    for name, value in one_run["state_dict"].items():
        torch.testing.assert_close(two_runs["state_dict"][name], value, rtol=1e-4, atol=1e-6)
    assert one_run["skipped_steps"] == two_runs["skipped_steps"] == [1, 0]
    assert one_run["averages"]["num_updates"] == two_runs["averages"]["num_updates"] == 4
    scalars = [curves(place / "train_pair") for place in places]
    assert {"train/loss", "train/other", "train/gradient_norm", "images_seen"} <= scalars[0].keys()
    assert scalars[0].keys() == scalars[1].keys()
    for name, curve in scalars[0].items():
        assert [step for step, _ in scalars[1][name]] == [step for step, _ in curve]
        finite = [pair for pair in zip(curve, scalars[1][name], strict=True) if np.isfinite(pair[0][1])]
        assert [two for _, (_, two) in finite] == pytest.approx([one for (_, one), _ in finite], rel=1e-4), name


def test_running_means_are_those_of_the_first_process_on_both(places: list[Path]) -> None:
    first, second = (
        torch.load(places[1] / "running_means" / f"buffers_{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert first
    assert identical(first, second)
    written = load(last(places[1] / "running_means"))["state_dict"]
    assert all(torch.equal(value, written[name]) for name, value in first.items())


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("name", ["module", "pair"])
def test_a_validation_in_which_a_process_has_no_image_is_the_mean_over_all_images(
    places: list[Path], name: str, images: int
) -> None:
    one, two = (curves(place / "validate" / f"{name}_{images}") for place in places)
    assert one.keys() == two.keys()
    assert "val/loss" in one
    for scalar in one:
        if scalar.startswith("val/"):
            # A step of training comes before.
            assert two[scalar][0][1] == pytest.approx(one[scalar][0][1], rel=1e-3), scalar


def test_no_advice_is_given_to_gather_what_is_gathered_already(places: list[Path]) -> None:
    assert "sync_dist" not in (places[1] / "output.txt").read_text()


def test_totals_of_a_validation_are_means_over_images_whatever_their_share(tmp_path: Path) -> None:
    model = tiny.module(network=tiny.network(dropout=0.0), objective=FromTheImage())
    data = ImageData(Few(5), batch_size=tiny.BATCH, eval_batch_size=2)
    [found] = tiny.trainer(tmp_path, callbacks=[], logger=False, limit_val_batches=None).validate(model, data)
    with torch.no_grad():
        losses = model.eval().losses({"image": from_uint8(data.dataset("val").batch(range(5))["image"])})["losses"]
    assert found["val/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_a_run_of_one_process_continues_on_two_with_its_sums_of_the_log(places: list[Path], tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, 4, log_every_n_steps=4)
    made.fit(LogsOnce(random=False), tiny.data())
    one, two = curves(tmp_path), curves(places[1] / "widen")
    assert one.keys() == two.keys()
    assert two["train/early"] == [(4, 7.0)]
    for name, curve in one.items():
        assert [step for step, _ in two[name]] == [step for step, _ in curve] == [4]
        assert two[name][0][1] == pytest.approx(curve[0][1], rel=1e-4), name


def test_no_two_processes_or_steps_draw_the_same_noise(places: list[Path]) -> None:
    _, first, second = seen(places, "noise")
    assert len({tuple(noise.tolist()) for noise in [*first, *second]}) == 6


def test_losses_are_means_over_the_images_of_all_processes(places: list[Path]) -> None:
    one, two = (curves(place / "train") for place in places)
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith("train/loss") or name == "images_seen":
            assert [step for step, _ in two[name]] == [3]
            assert two[name][0][1] == pytest.approx(one[name][0][1], rel=1e-4)


def test_a_frechet_distance_does_not_depend_on_the_number_of_processes(places: list[Path]) -> None:
    one, first, second = (
        json.loads((place / "score" / f"score_{rank}.json").read_text())
        for place, rank in ((places[0], 0), (places[1], 0), (places[1], 1))
    )
    assert first == second
    # Fewer images than features: roots of eigenvalues near 1e-17 remain.
    assert one == pytest.approx(first, rel=1e-8)
    assert one > 0.1


def test_no_score_depends_on_the_number_of_processes(places: list[Path]) -> None:
    (images, bound), (images_of_two, bound_of_two) = (read_records(place / "evaluate" / RESULTS) for place in places)
    assert [record["processes"] for record in (images, images_of_two, bound_of_two)] == [1, 2, 2]
    # Features are made by batches and added up in one order, so that not even the last bit differs; the real images'
    # covariance is added up by each process on its own.
    assert images["scores"].pop("frechet/pixels") == pytest.approx(
        images_of_two["scores"].pop("frechet/pixels"), rel=1e-8
    )
    assert images["scores"] == images_of_two["scores"]
    assert bound["scores"] == bound_of_two["scores"]
    assert images["references"][0]["count"] == images_of_two["references"][0]["count"] == 1797


@pytest.mark.parametrize("scenario", ["resume", "resume_pair"])
def test_two_processes_resume_bit_for_bit(places: list[Path], scenario: str) -> None:
    folder = places[1] / scenario
    whole, parts = (load(last(folder / name)) for name in ("whole", "parts"))
    for name in ("state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers"):
        assert identical(whole[name], parts[name])
    assert len(whole["optimizer_states"]) == (2 if scenario == "resume_pair" else 1)
    scalars = [curves(folder / name) for name in ("whole", "parts")]
    assert scalars[0] == scalars[1]
    assert [step for step, _ in scalars[0]["train/loss"]] == [3]


def test_a_failure_in_one_process_ends_the_run_with_a_checkpoint(places: list[Path]) -> None:
    assert (places[1] / "fail" / "failed").exists()
    assert load(last(places[1] / "fail"))["global_step"] == 2


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_images_are_the_same_bytes_with_one_process_and_with_two(places: list[Path], tmp_path: Path) -> None:
    one, two = (files(place / "generate" / "out") for place in places)
    assert len(one) == 10
    assert one == two
    arrays = [np.load(place / "generate" / "out.npz")["arr_0"] for place in places]
    assert np.array_equal(*arrays)
    tiny.trainer(tmp_path, callbacks=[], logger=False).predict(
        tiny.module(), num_images=3, batch_size=4, seed=5, out=str(tmp_path / "few")
    )
    assert {name: one[name] for name in ("000000.png", "000001.png", "000002.png")} == files(tmp_path / "few")


# With one process


def test_with_another_batch_size_images_differ_by_rounding_at_most(tmp_path: Path) -> None:
    images = []
    for size in (1, 7, 16):
        out = tmp_path / str(size)
        tiny.trainer(tmp_path, callbacks=[], logger=False).predict(
            tiny.module(), num_images=16, batch_size=size, seed=5, out=str(out)
        )
        images.append(np.stack([np.asarray(Image.open(out / f"{i:06}.png")) for i in range(16)]).astype(int))
    for other in images[1:]:
        assert abs(other - images[0]).max() <= 1
        assert (other != images[0]).mean() <= 1e-3
    assert len({image.tobytes() for image in images[0]}) == 16


def test_the_noise_of_an_image_depends_on_seed_and_index_alone() -> None:
    starts: dict[tuple[int, ...], Tensor] = {}
    for indices in ((0, 1, 2), (2,), (5, 2)):

        class Keep(torch.nn.Module):
            image_size, in_channels = 8, 1
            first: Tensor | None = None

            def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
                self.first = x.clone() if self.first is None else self.first
                return torch.zeros_like(x)

        keep = Keep()
        tiny.module(network=keep).sample(indices, seed=9)
        assert keep.first is not None
        starts[indices] = keep.first
    assert torch.equal(starts[0, 1, 2][2], starts[2,][0])
    assert torch.equal(starts[5, 2][1], starts[2,][0])
    assert not torch.equal(starts[0, 1, 2][0], starts[0, 1, 2][1])
    assert not torch.equal(tiny.module().sample([0], seed=1), tiny.module().sample([0], seed=2))


@pytest.mark.parametrize(
    ("num_images", "batch_size", "world_size"), [(1, 4, 2), (10, 4, 1), (10, 4, 2), (12, 4, 3), (9, 2, 4)]
)
def test_requests_cover_every_image_once_in_batches_of_one_size(
    num_images: int, batch_size: int, world_size: int
) -> None:
    requests = Requests(num_images, batch_size)
    asked: list[int] = []
    for rank in range(world_size):
        for request, count in requests.batches(rank, world_size):
            assert len(request["index"]) == batch_size
            asked += request["index"].tolist()[:count]
        loaded = [batch["index"].tolist() for batch in requests.loader(rank, world_size)]
        # A process without any batch loads an empty one.
        assert loaded == ([r["index"].tolist() for r, _ in requests.batches(rank, world_size)] or [[]])
    assert sorted(asked) == list(range(num_images))


@pytest.mark.parametrize(("num_images", "batch_size", "message"), [(0, 4, "num_images=0"), (4, 0, "batch_size=0")])
def test_requests_for_nothing_are_refused(num_images: int, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be at least 1"):
        Requests(num_images, batch_size)


def test_sampling_leaves_modes_and_gradients_as_they_were() -> None:
    model = tiny.module()
    model.train()
    model.denoiser.network.conv_in.eval()  # type: ignore[union-attr]
    image = model.sample([0])
    assert model.training
    assert not model.denoiser.network.conv_in.training  # type: ignore[union-attr]
    assert not image.requires_grad
    assert torch.equal(to_uint8(image), to_uint8(model.eval().sample([0])))
