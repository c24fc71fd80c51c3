"""An image tower and a text tower learn which text belongs to which image, and then guide a model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.checkpoint import load_model
from diffusion_lit.conditioner import Labels
from diffusion_lit.conditioners import Text
from diffusion_lit.data import ImageData
from diffusion_lit.data.captioned_digits import CaptionedDigits
from diffusion_lit.diffusion import DDIM, Denoiser, DiscreteProcess, Eps, GradientGuidance
from diffusion_lit.loggers import read_curves
from diffusion_lit.methods.clip_guidance import CLIPGuidance, CLIPScore, ImageText, ImageTextModule, TextAgreement
from diffusion_lit.metrics.scores import Evidence
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import TextEncoder
from diffusion_lit.text import encode_text
from diffusion_lit.types import Condition, Network, TimeDependentClassifier
from tests import forked, tiny

HERE = "tests.methods.test_clip_guidance"
STEPS = 100


class Linear(TimeDependentClassifier):
    """An image tower small enough for a test, always with the same weights."""

    image_size, in_channels, num_classes = 8, 1, 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(65, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        features: Tensor = self.layers(torch.cat([x.flatten(1), time[:, None] / STEPS], 1))
        return features


class Blind(Network):
    """A model that takes all for noise and knows no texts."""

    image_size, in_channels = 8, 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        return x * self.weight


def towers(noisy: bool = True, **kwargs: Any) -> ImageTextModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ImageText(Linear(), Text(TextEncoder(200, 14, 16, depth=1, num_heads=2, head_channels=8)))

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.01)

    module = ImageTextModule(network, DiscreteProcess(STEPS), noisy, optimizer, **kwargs)
    encoder = {"vocabulary": 200, "length": 14, "width": 16, "depth": 1, "num_heads": 2, "head_channels": 8}
    text = {
        "class_path": "diffusion_lit.conditioners.Text",
        "init_args": {"encoder": {"class_path": "diffusion_lit.networks.TextEncoder", "init_args": encoder}},
    }
    network_config = {"image": {"class_path": f"{HERE}.Linear"}, "text": text}
    arguments = {
        "network": {"class_path": "diffusion_lit.methods.clip_guidance.ImageText", "init_args": network_config},
        "process": {"class_path": "diffusion_lit.diffusion.DiscreteProcess", "init_args": {"num_steps": STEPS}},
        "noisy": noisy,
    }
    path = "diffusion_lit.methods.clip_guidance.ImageTextModule"
    module.config = {"model": {"class_path": path, "init_args": arguments}}
    return module


def data(**kwargs: Any) -> ImageData:
    return ImageData(CaptionedDigits(), **{"batch_size": 64, "eval_batch_size": 600, **kwargs})


def train(run: Path, noisy: bool, steps: int) -> Path:
    callbacks = [EMA([0.9]), Scalars(), Checkpoints()]
    tiny.trainer(run, steps, callbacks, log_every_n_steps=20).fit(towers(noisy), data())
    return run


@pytest.fixture(scope="module")
def noised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers of noisy images, trained for 250 steps."""
    return train(tmp_path_factory.mktemp("noised"), True, 250)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers of clean images, trained for 150 steps."""
    return train(tmp_path_factory.mktemp("clean"), False, 150)


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image tower of these tests is not the package's: a person would trust it by name."""
    import diffusion_lit.methods.clip_guidance as room

    def load(path: Any, base: Any) -> Any:
        return load_model(path, base, trust=[HERE])

    monkeypatch.setattr(room, "load_model", load)


def model(**kwargs: Any) -> DiffusionModule:
    return DiffusionModule(Blind(), DiscreteProcess(STEPS), sampler=DDIM(10), **kwargs)


# Training


def test_the_loss_is_the_mean_of_both_cross_entropies_of_scaled_products() -> None:
    module = towers(noisy=False)
    module.start(data(), torch.device("cpu"))
    texts = ["a bold three", "seven", "the digit 4"]
    image = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        parts = module.losses({"image": image, "caption": encode_text(texts)})
        f = module.network.image(image, torch.zeros(3))
        g = module.network.projection(module.network.text.encode(texts)[:, 0])
    for i in range(3):
        products = [[float(a @ b / a.norm() / b.norm()) / 0.07 for b in g] for a in f]
        of_image = math.log(sum(math.exp(products[i][j]) for j in range(3))) - products[i][i]
        of_text = math.log(sum(math.exp(products[j][i]) for j in range(3))) - products[i][i]
        assert float(parts["losses"][i]) == pytest.approx((of_image + of_text) / 2, abs=1e-4)
    assert float(parts["loss"]) == pytest.approx(float(parts["losses"].mean()))


@pytest.mark.further
def test_towers_learn_and_know_the_more_the_less_noise_there_is(noised: Path) -> None:
    curves = read_curves(noised)
    quarters = [curves[f"train/loss_{name}"][-1][1] for name in ("t_0.00_0.25", "t_0.25_0.50", "t_0.75_1.00")]
    assert quarters == sorted(quarters)
    assert quarters[0] < math.log(64) - 0.7


def test_the_factor_of_the_products_is_limited() -> None:
    network = towers().network
    assert float(network.scale.detach()) == pytest.approx(1 / 0.07)
    network.log_scale.data.fill_(9.0)
    assert float(network.scale.detach()) == 100


@pytest.mark.further
def test_towers_resume_bit_for_bit(tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "whole", 4).fit(towers(), data())
    for steps in (2, 4):
        tiny.trainer(tmp_path / "parts", steps).fit(towers(), data(), ckpt_path="last")
    a, b = (tiny.load(tiny.last(tmp_path / name)) for name in ("whole", "parts"))
    for name in ("state_dict", "current_model_state", "averages", "optimizer_states"):
        assert tiny.identical(a[name], b[name]), name


@pytest.mark.further
def test_two_processes_contrast_the_images_of_both(tmp_path: Path) -> None:
    """The first step's weights, with clean images, are those of one process with the whole batch."""

    def run(name: str, **options: Any) -> Any:
        def work() -> None:
            made = tiny.trainer(tmp_path / name, 1, [], gradient_clip_val=None, logger=False, **options)
            module = ImageTextModule(
                towers(noisy=False).network,
                DiscreteProcess(STEPS),
                False,
                lambda parameters: torch.optim.SGD(parameters, lr=1.0),
            )
            made.fit(module, data(batch_size=32))
            torch.save({n: p.detach() for n, p in module.named_parameters()}, tmp_path / f"{name}{made.global_rank}.pt")

        return work

    output = tmp_path / "output.txt"
    two = run("two", devices=2, strategy="ddp")
    assert forked.wait(forked.fork(lambda: forked.in_two(two), output)) == 0, output.read_text()
    assert forked.wait(forked.fork(run("one"), output)) == 0, output.read_text()
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("one0", "two0", "two1"))
    start = dict(towers(noisy=False).network.named_parameters(prefix="network"))
    assert tiny.identical(first, second)
    for name, weight in one.items():
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-5)
    moved = [name for name, weight in one.items() if not torch.allclose(weight, start[name], atol=1e-6)]
    assert {"network.log_scale", "network.projection.weight", "network.image.layers.0.weight"} <= set(moved)


def test_data_without_captions_are_refused() -> None:
    with pytest.raises(ValueError, match="no captions to learn from"):
        towers().losses({"image": torch.zeros(2, 1, 8, 8)})


# Guidance


@pytest.mark.further
@pytest.mark.parametrize("run", ["noised", "clean"])
def test_guidance_makes_images_agree_with_their_texts_in_the_eyes_of_other_towers(
    run: str, noised: Path, clean: Path
) -> None:
    own, other = (noised, clean) if run == "noised" else (clean, noised)
    texts = [f"a {name}" for name in ("zero", "one", "four", "seven")] * 4
    condition = {"caption": encode_text(texts)}
    guided = model(guidance=CLIPGuidance(str(tiny.last(own)), scale=20.0))
    assert guided.entries == ("caption",)
    assert guided.guidance is not None
    score = CLIPScore(str(tiny.last(other)))

    def mean(images: Tensor) -> float:
        levels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
        columns = score.per_image(guided, levels, condition)
        return score(Evidence(levels.flatten(1).float(), columns=columns), nn.Module())["clip_score"]  # type: ignore[arg-type]

    images = guided.sample(range(16), condition=condition)
    assert mean(images) > mean(model().sample(range(16), condition={})) + 0.2


@pytest.mark.few(1)
@pytest.mark.parametrize("noisy", [True, False])
def test_the_gradient_is_that_of_the_scaled_product_by_central_differences(noisy: bool) -> None:
    module = towers(noisy).double().eval()
    module.start(data(), torch.device("cpu"))
    agreement = TextAgreement(module.network, module.process, noisy)
    text = agreement.prepare({"caption": encode_text(["a three", "a bold 7"])})
    x, h = torch.randn(2, 1, 8, 8, dtype=torch.float64), 1e-5
    direction = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    t = torch.tensor(0.37, dtype=torch.float64)
    network = module.network

    def product(x: Tensor) -> Tensor:
        time = torch.full((2,), 36.0 if noisy else 0.0)
        f = network.image(x, time)
        g = network.projection(network.text.encode(["a three", "a bold 7"])[:, 0])
        found: Tensor = (f * g).sum(1) / f.norm(dim=1) / g.norm(dim=1) / 0.07
        return found

    guidance = GradientGuidance(agreement)
    slope = (product(x + h * direction) - product(x - h * direction)) / (2 * h)
    found = (guidance.gradient(x, t, text) * direction).flatten(1).sum(1)
    torch.testing.assert_close(found, slope, rtol=2e-3, atol=1e-3)


def test_towers_that_guide_stay_out_of_the_model(noised: Path) -> None:
    guided = model(guidance=CLIPGuidance(str(tiny.last(noised))))
    assert list(guided.state_dict()) == list(model().state_dict())
    assert len(list(guided.parameters())) == 1


def test_a_prompt_is_needed_and_other_models_are_refused(noised: Path, clean: Path, tmp_path: Path) -> None:
    guidance = CLIPGuidance(str(tiny.last(noised)))
    with pytest.raises(ValueError, match="CLIPGuidance guides towards a condition and was given none; set texts with"):
        model(guidance=guidance).sample([0], condition={})
    larger = Blind()
    larger.image_size = 16
    for run in (noised, clean):
        with pytest.raises(ValueError, match="CLIP was trained for images image_size=8, the model has image_size=16"):
            CLIPGuidance(str(tiny.last(run))).check(Denoiser(larger, Eps(), DiscreteProcess(STEPS)), Labels())
    other = Denoiser(Blind(), Eps(), DiscreteProcess(50))
    with pytest.raises(ValueError, match="another noise schedule"):
        guidance.check(other, Labels())
    CLIPGuidance(str(tiny.last(clean))).check(other, Labels())
    with pytest.raises(FileNotFoundError, match=r"guidance.checkpoint=.*fit --model ImageTextModule"):
        CLIPGuidance(str(tmp_path / "none.ckpt"))
    with pytest.raises(ValueError, match="CLIPScore needs a model of texts"):
        CLIPScore(str(tiny.last(clean))).per_image(nn.Module(), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), {})
