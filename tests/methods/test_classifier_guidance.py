"""A classifier of noisy images is trained as any system, and then guides a model that knows no classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.checkpoint import load_model
from diffusion_lit.configuration import Untrusted
from diffusion_lit.diffusion import DDIM, DiscreteProcess
from diffusion_lit.loggers import read_curves
from diffusion_lit.methods.classifier_guidance import NoisyClassifierModule, TrainedClassifier
from diffusion_lit.methods.feature_network import FeatureNetworkModule
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ConvClassifier, NoisyClassifier
from diffusion_lit.system import NonFiniteGradients, System
from diffusion_lit.types import Batch, Condition, Network, TimeDependentClassifier
from tests import forked, tiny

HERE = "tests.methods.test_classifier_guidance"
STEPS = 100
QUARTERS = ("t_0.00_0.25", "t_0.25_0.50", "t_0.50_0.75", "t_0.75_1.00")


class Linear(TimeDependentClassifier):
    """A classifier small enough for a test, always with the same weights."""

    image_size, in_channels, num_classes = 8, 1, 10

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(65, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        logits: Tensor = self.layers(torch.cat([x.flatten(1), time[:, None] / STEPS], 1))
        return logits


class Blind(Network):
    """A model that takes all for noise and knows no classes."""

    image_size, in_channels = 8, 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        return x * self.weight


class Oracle(TimeDependentClassifier):
    """Recognises every image, told by its first pixel, in the first half of the process only."""

    image_size, in_channels, num_classes = 8, 1, 10

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        label = (x[:, 0, 0, 0].sign() > 0).long()
        return torch.eye(10)[torch.where(time < STEPS / 2, label, 9)]


def noisy(**kwargs: Any) -> NoisyClassifierModule:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.01)

    module = NoisyClassifierModule(Linear(), DiscreteProcess(STEPS), optimizer, **kwargs)
    process = {"class_path": "diffusion_lit.diffusion.DiscreteProcess", "init_args": {"num_steps": STEPS}}
    arguments = {"network": {"class_path": f"{HERE}.Linear"}, "process": process}
    path = "diffusion_lit.methods.classifier_guidance.NoisyClassifierModule"
    module.config = {"model": {"class_path": path, "init_args": arguments}}
    return module


def clean(**kwargs: Any) -> FeatureNetworkModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ConvClassifier(image_size=8, in_channels=1, num_classes=10, width=8)
    return FeatureNetworkModule(network, lambda parameters: torch.optim.AdamW(parameters, lr=0.01), **kwargs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier trained for 200 steps."""
    run = tmp_path_factory.mktemp("classifier")
    options: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 100, "log_every_n_steps": 20}
    callbacks = [EMA([0.9]), Scalars(), Checkpoints()]
    tiny.trainer(run, 200, callbacks, **options).fit(noisy(), tiny.data(batch_size=256))
    return run


def model(**kwargs: Any) -> DiffusionModule:
    return DiffusionModule(Blind(), DiscreteProcess(STEPS), sampler=DDIM(10), **kwargs)


def guidance(run: Path, **kwargs: Any) -> TrainedClassifier:
    return TrainedClassifier(str(tiny.last(run)), **kwargs)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier of these tests is not the package's: a person would trust it by name."""
    import diffusion_lit.methods.classifier_guidance as room

    def load(path: Any, base: Any) -> Any:
        return load_model(path, base, trust=[HERE])

    monkeypatch.setattr(room, "load_model", load)


# Training


def test_it_learns_and_is_the_surer_the_less_noise_there_is(run: Path) -> None:
    curves = read_curves(run)
    for stage in ("train", "val"):
        quarters = [curves[f"{stage}/accuracy_{name}"][-1][1] for name in QUARTERS]
        assert quarters[0] > 0.85
        assert quarters == sorted(quarters, reverse=True)
        assert curves[f"{stage}/accuracy"][-1][1] == pytest.approx(sum(quarters) / 4, abs=0.05)
        assert f"{stage}/loss_{QUARTERS[0]}" in curves
    losses = [value for _, value in curves["train/loss"]]
    assert losses[-1] < losses[0] / 2


def test_accuracy_is_that_of_each_image_at_its_time() -> None:
    module = NoisyClassifierModule(Oracle(), DiscreteProcess(STEPS))
    module.process.perturb = lambda x0, eps, t: x0  # type: ignore[method-assign]
    label = torch.arange(400) % 2
    image = (label * 2.0 - 1).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    parts = module.losses({"image": image, "label": label})
    assert torch.equal(parts["accuracy"], (parts["t"] <= 0.5).float())


@pytest.mark.parametrize("make", [noisy, clean])
def test_a_classifier_resumes_bit_for_bit_with_its_averages(tmp_path: Path, make: Any) -> None:
    tiny.trainer(tmp_path / "whole", 6).fit(make(), tiny.data())
    for steps in (3, 6):
        tiny.trainer(tmp_path / "parts", steps).fit(make(), tiny.data(), ckpt_path="last")
    a, b = (tiny.load(tiny.last(tmp_path / name)) for name in ("whole", "parts"))
    for name in ("state_dict", "current_model_state", "averages", "optimizer_states", "global_step"):
        assert tiny.identical(a[name], b[name]), name
    assert read_curves(tmp_path / "whole")["train/accuracy"] == read_curves(tmp_path / "parts")["train/accuracy"]


@pytest.mark.parametrize("make", [noisy, clean])
def test_a_classifier_has_averages_and_the_weights_asked_for(tmp_path: Path, make: Any) -> None:
    class Weights(Checkpoints):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[dict[str, Tensor]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: object) -> None:
            super().on_train_batch_end(trainer, pl_module)
            self.kept.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    weights = Weights()
    start = {name: p.detach().clone() for name, p in make().named_parameters()}
    tiny.trainer(tmp_path, 3, [EMA([0.5, 0.9]), weights]).fit(make(), tiny.data())
    checkpoint = tiny.load(tiny.last(tmp_path))
    for choice, decay in (("averaged", 0.5), ("0.9", 0.9), ("raw", 0.0)):
        system: System = make()
        system.load(checkpoint, choice)
        for name, parameter in system.named_parameters():
            average = start[name]
            for value in weights.kept:
                average = torch.lerp(average, value[name], 1 - decay)
            torch.testing.assert_close(parameter, average, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"weights='0\.7' are not in the checkpoint"):
        make().load(checkpoint, "0.7")


class BadAt:
    """Losses of a system that are not a number at some steps."""

    def __init__(self, system: System, steps: tuple[int, ...]) -> None:
        self.system, self.steps, self.original = system, steps, system.losses
        system.losses = self  # type: ignore[method-assign]

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        parts = self.original(batch)
        bad = self.system.trainer.global_step + 1 in self.steps
        return {**parts, "loss": parts["loss"] * float("nan")} if bad else parts


@pytest.mark.parametrize("make", [noisy, clean])
def test_a_classifier_skips_steps_with_bad_gradients_and_stops_after_too_many(tmp_path: Path, make: Any) -> None:
    system = make(max_skipped_steps=2)
    BadAt(system, (2, 4, 5))
    with pytest.raises(NonFiniteGradients, match="in 2 steps in a row, the last of them step 5"):
        tiny.trainer(tmp_path, 9).fit(system, tiny.data())
    assert system.skipped_steps == 3
    assert system.averages.num_updates == 2
    assert all(bool(p.isfinite().all()) for p in system.parameters())


def test_two_processes_train_a_classifier_on_the_gradients_of_both(tmp_path: Path) -> None:
    def train() -> None:
        made = tiny.trainer(tmp_path / "run", 3, devices=2, strategy="ddp")
        system = noisy()
        made.fit(system, tiny.data())
        torch.save(system.state_dict(), tmp_path / f"{made.global_rank}.pt")

    output = tmp_path / "output.txt"
    assert forked.wait(forked.fork(lambda: forked.in_two(train), output)) == 0, output.read_text()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert tiny.identical(first, second)
    assert not tiny.identical(first, dict(noisy().state_dict()))


# Guidance


@pytest.mark.usefixtures("trusted")
def test_a_trained_classifier_guides_a_model_without_classes(run: Path) -> None:
    judge = noisy()
    judge.load(tiny.load(tiny.last(run)))
    judge.eval()
    indices = list(range(20))

    def agreement(images: Tensor) -> float:
        found = judge(images, torch.zeros(20)).argmax(1)
        return float((found == torch.arange(20) % 10).float().mean())

    guided = model(guidance=guidance(run, scale=20.0)).sample(indices)
    assert agreement(model().sample(indices)) < 0.4
    assert agreement(guided) > 0.9


@pytest.mark.usefixtures("trusted")
def test_the_classifier_that_guides_is_the_averaged_one_and_stays_out_of_the_model(run: Path) -> None:
    guide = guidance(run)
    averaged = tiny.load(tiny.last(run))["state_dict"]
    assert tiny.identical({f"network.{n}": t for n, t in guide.classifier.network.state_dict().items()}, averaged)
    guided = model(guidance=guide)
    assert list(guided.state_dict()) == list(model().state_dict())
    assert len(list(guided.parameters())) == 1


@pytest.mark.usefixtures("trusted")
def test_a_classifier_of_another_schedule_or_size_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="another noise schedule or number of steps"):
        DiffusionModule(Blind(), DiscreteProcess(50), sampler=DDIM(5), guidance=guidance(run))
    larger = Blind()
    larger.image_size = 16
    with pytest.raises(ValueError, match=r"image_size=8, the model has image_size=16"):
        DiffusionModule(larger, DiscreteProcess(STEPS), sampler=DDIM(5), guidance=guidance(run))


@pytest.mark.usefixtures("trusted")
def test_predict_shows_the_classes_of_the_classifier_and_no_others(run: Path, tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, callbacks=[], logger=False)
    made.predict(model(guidance=guidance(run)), labels="3,3,7", out=str(tmp_path / "a"))
    assert len(list((tmp_path / "a").iterdir())) == 3
    with pytest.raises(ValueError, match="labels: the model is unconditional"):
        made.predict(model(), labels="3", out=str(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"labels: 12 must lie in 0 \.\. 9"):
        made.predict(model(guidance=guidance(run)), labels="3,12", out=str(tmp_path / "b"))


def test_a_classifier_that_the_package_has_needs_nobodys_trust(tmp_path: Path) -> None:
    network = {"image_size": 8, "in_channels": 1, "num_classes": 10, "width": 32, "multipliers": [1, 2]}
    network |= {"num_blocks": 1, "attention": [4], "head_channels": 32}
    held = NoisyClassifierModule(NoisyClassifier(**network))  # type: ignore[arg-type]
    config = {
        "class_path": "diffusion_lit.methods.classifier_guidance.NoisyClassifierModule",
        "init_args": {"network": {"class_path": "diffusion_lit.networks.NoisyClassifier", "init_args": network}},
    }
    torch.save({"state_dict": held.state_dict(), "config": {"model": config}}, tmp_path / "a.ckpt")
    assert TrainedClassifier(str(tmp_path / "a.ckpt")).num_classes == 10


# Refusals


def test_what_is_no_trained_classifier_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"guidance.checkpoint=.*there is no such file; train a classifier"):
        TrainedClassifier(str(tmp_path / "none.ckpt"))
    bare = tmp_path / "bare.ckpt"
    torch.save({"state_dict": {}}, bare)
    with pytest.raises(ValueError, match="carries no configuration"):
        TrainedClassifier(str(bare))
    other = tmp_path / "other.ckpt"
    config = {
        "class_path": "diffusion_lit.module.DiffusionModule",
        "init_args": {"network": {"class_path": "diffusion_lit.networks.UNet"}},
    }
    torch.save({"state_dict": {}, "config": {"model": config}}, other)
    with pytest.raises(ValueError, match="NoisyClassifierModule"):
        TrainedClassifier(str(other))
    with pytest.raises(Untrusted, match=HERE):
        TrainedClassifier(str(tiny.last(run)))


@pytest.mark.parametrize("make", [noisy, clean])
def test_data_without_labels_are_refused(make: Any) -> None:
    batch: Batch = {"image": torch.zeros(2, 1, 8, 8)}
    with pytest.raises(ValueError, match="no labels to train a classifier on"):
        make().losses(batch)


def test_a_classifier_generates_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="predict: a NoisyClassifierModule generates nothing; give --ckpt_path of a"):
        tiny.trainer(tmp_path, callbacks=[], logger=False).predict(noisy())
