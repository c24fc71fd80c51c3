"""A mixture of two Gaussians, one a class: denoiser, classifier and conditional are known in closed form."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.conditioner import Labels
from diffusion_lit.diffusion import (
    DDIM,
    Ancestral,
    ClassifierFree,
    ClassifierGuidance,
    Cosine,
    Denoiser,
    DiscreteProcess,
    DPMSolver,
    Eps,
    FixedLarge,
    FixedSmall,
    Guidance,
    Heun,
    Linear,
    Sampler,
    V,
)
from diffusion_lit.types import Condition, DenoiseFn, Prediction, TimeDependentClassifier
from tests.diffusion.gaussian import Array, alpha_bars, linear_betas

PRIOR = np.array([0.3, 0.7])
MEANS = np.array([[-0.6, 0.2], [0.5, 0.1]])
VARIANCES = np.array([0.04, 0.09])
BARS = alpha_bars(linear_betas(1000))
PROCESS = DiscreteProcess()


class Mixture:
    """The mixture at table entry k, over images of shape (1, 1, 2)."""

    def __init__(self, bars: Array) -> None:
        self.bars = torch.from_numpy(bars)
        self.prior, self.means, self.variances = (torch.from_numpy(a) for a in (PRIOR, MEANS, VARIANCES))

    def joint(self, x: Tensor, k: Tensor) -> Tensor:
        """log p(x_k, y), (B, 2)."""
        bar = self.bars[k].reshape(-1, 1)
        spread = bar * self.variances + 1 - bar
        squared = (x.flatten(1)[:, None] - bar[..., None].sqrt() * self.means).square().sum(-1)
        return self.prior.log() - squared / (2 * spread) - (2 * math.pi * spread).log()

    def clean(self, x: Tensor, k: Tensor) -> Tensor:
        """E[x_0 | x_k, y] for both classes, (B, 2, 2)."""
        bar = self.bars[k].reshape(-1, 1, 1)
        gain = bar.sqrt() * self.variances[:, None] / (bar * self.variances[:, None] + 1 - bar)
        return self.means + gain * (x.flatten(1)[:, None] - bar.sqrt() * self.means)


class Network(nn.Module):
    """Predicts eps perfectly, for a class, or under the null label for the mixture."""

    image_size, in_channels, num_classes, has_null_label = 2, 1, 2, True

    def __init__(self, bars: Array = BARS) -> None:
        super().__init__()
        self.mixture = Mixture(bars)
        self.batches: list[int] = []

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.batches.append(len(x))
        k = time.long() + 1
        label = condition.get("label", torch.full((len(x),), -1))
        posterior = self.mixture.joint(x, k).softmax(1)
        weights = torch.cat([torch.eye(2, dtype=x.dtype)[label.clamp(min=0)], posterior], 1).reshape(-1, 2, 2)
        chosen = torch.where(label[:, None] < 0, weights[:, 1], weights[:, 0])
        x0 = (chosen[..., None] * self.mixture.clean(x, k)).sum(1).reshape(x.shape)
        bar = self.mixture.bars[k].reshape(-1, 1, 1, 1)
        return (x - bar.sqrt() * x0) / (1 - bar).sqrt()


class Unconditional(Network):
    num_classes, has_null_label = None, False  # type: ignore[assignment]

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        assert "label" not in condition
        return super().forward(x, time, condition)


class Wide(Unconditional):
    """A network whose x_0 often lies outside [-1, 1]."""

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return 0.8 * super().forward(x, time, condition)


class Classifier(TimeDependentClassifier):
    """p(y | x_k), as logits off by a constant, which a trained network's may be."""

    image_size, in_channels, num_classes = 2, 1, 2

    def __init__(self, bars: Array = BARS) -> None:
        super().__init__()
        self.mixture = Mixture(bars)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.mixture.joint(x, time.long() + 1) + 3.0


def denoiser(network: nn.Module | None = None, process: DiscreteProcess = PROCESS) -> Denoiser:
    return Denoiser(network or Network(), Eps(), process)


def guide(guidance: Guidance, denoise: Denoiser, condition: Condition) -> DenoiseFn:
    return guidance(denoise, condition, Labels())


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LABEL = torch.tensor([0, 1, 0, 1, 1, 0])


def seeded(x: Tensor, seed: int = 1) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def path(sampler: Sampler, denoise: DenoiseFn, process: DiscreteProcess = PROCESS) -> Tensor:
    x = images()
    return torch.stack([state.x_t for state in sampler.path(denoise, x, process, seeded(x))])


SAMPLERS = [
    DDIM(20, clip=False),
    DDIM(20, eta=0.7, clip=True),
    Ancestral(20, FixedLarge(), clip=False),
    Ancestral(20, FixedSmall(), clip=True),
    DPMSolver(20, order=3, clip=True),
    Heun(21, clip=False),
]
sampled = pytest.mark.parametrize(
    "sampler", SAMPLERS, ids=["ddim", "eta 0.7, clipped", "large", "small, clipped", "order 3, clipped", "heun"]
)


# Classifier guidance


@sampled
def test_a_perfect_classifier_at_scale_1_gives_the_conditional_trajectory(sampler: Sampler) -> None:
    guided = guide(ClassifierGuidance(Classifier(), PROCESS), denoiser(Unconditional()), {"label": LABEL})
    conditional = denoiser().bind({"label": LABEL})
    torch.testing.assert_close(path(sampler, guided), path(sampler, conditional), rtol=0, atol=1e-9)


def test_a_classifier_at_scale_1_gives_the_conditional_denoiser_at_times_of_their_own() -> None:
    t = torch.tensor([1, 2, 50, 400, 900, 1000], dtype=torch.float64) / 1000
    x_t = images(seed=3)
    found = guide(ClassifierGuidance(Classifier(), PROCESS), denoiser(Unconditional()), {"label": LABEL})(x_t, t)
    k = (t * 1000).round().long()
    x0 = Mixture(BARS).clean(x_t, k)[torch.arange(6), LABEL].reshape(x_t.shape)
    torch.testing.assert_close(found.x0, x0, rtol=1e-9, atol=1e-9)
    bar = torch.from_numpy(BARS)[k].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(bar.sqrt() * found.x0 + (1 - bar).sqrt() * found.eps, x_t, rtol=0, atol=1e-12)


def test_ancestral_samples_have_the_moments_of_the_class_asked_for() -> None:
    x = images(1600)
    label = torch.tensor([0, 1]).repeat(800)
    guided = guide(ClassifierGuidance(Classifier(), PROCESS), denoiser(Unconditional()), {"label": label})
    found = Ancestral(None, FixedSmall(), clip=False)(guided, x, PROCESS, seeded(x)).reshape(800, 2, 2)
    np.testing.assert_allclose(found.mean(0), MEANS, atol=4 * 0.3 / math.sqrt(800))
    np.testing.assert_allclose(found.var(0).mean(-1), VARIANCES, rtol=0.12)


def gradient(x: Tensor, k: int, label: Tensor) -> Tensor:
    """grad log p(y | x_k) from the scores of Gaussians: that of the class less the mixture's."""
    mixture = Mixture(BARS)
    bar = BARS[k]
    scores = -(x.flatten(1)[:, None] - math.sqrt(bar) * mixture.means) / (bar * mixture.variances + 1 - bar)[:, None]
    posterior = mixture.joint(x, torch.full((len(x),), k)).softmax(1)
    found: Tensor = scores[torch.arange(len(x)), label] - (posterior[..., None] * scores).sum(1)
    return found.reshape(x.shape)


def test_eps_moves_as_in_algorithm_2_and_the_mean_as_in_algorithm_1_but_for_the_step_s_own_shrinkage() -> None:
    k, scale = 700, 2.5
    x, t, s = images(), torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.699, dtype=torch.float64)
    plain = denoiser(Unconditional()).bind({})
    guided = guide(ClassifierGuidance(Classifier(), PROCESS, scale), denoiser(Unconditional()), {"label": LABEL})
    expected = -scale * math.sqrt(1 - BARS[k]) * gradient(x, k, LABEL)
    torch.testing.assert_close(guided(x, t).eps - plain(x, t).eps, expected, rtol=1e-8, atol=1e-10)
    sampler = Ancestral()
    moved = [sampler.step(f, x, PROCESS, t, s, lambda: torch.zeros_like(x))[0] for f in (guided, plain)]
    beta = linear_betas(1000)[k - 1]
    expected = scale * beta / math.sqrt(1 - beta) * gradient(x, k, LABEL)
    torch.testing.assert_close(moved[0] - moved[1], expected, rtol=1e-7, atol=1e-10)


def test_the_paper_s_ancestral_rule_converges_to_ours_at_first_order() -> None:
    errors = []
    for total in (64, 128, 256):
        betas = linear_betas(total, 0.1 / total, 20 / total)
        bars, process = alpha_bars(betas), DiscreteProcess(total, Linear(0.1 / total, 20 / total))
        guidance = ClassifierGuidance(Classifier(bars), process)
        guided = guide(guidance, denoiser(Unconditional(bars), process), {"label": LABEL})
        x = images()
        still = torch.zeros_like(x)
        ours = Ancestral(clip=False)(guided, x, process, lambda: still)  # noqa: B023
        # Dhariwal & Nichol 2021, algorithm 1, with Sigma = beta; noise, the same in both, is left out.
        plain, mixture = denoiser(Unconditional(bars), process).bind({}), Mixture(bars)
        for k in range(total, 0, -1):
            y = x.clone().requires_grad_()
            log_p = mixture.joint(y, torch.full((6,), k)).log_softmax(1)[torch.arange(6), LABEL].sum()
            (grad,) = torch.autograd.grad(log_p, y)
            t = torch.tensor(k / total, dtype=torch.float64)
            mean, _ = Ancestral(clip=False).step(plain, x, process, t, t - 1 / total, lambda: still)  # noqa: B023
            x = mean + betas[k - 1] * grad
        errors.append((x - ours).abs().max().item())
    assert errors[-1] < 0.04
    np.testing.assert_allclose(np.array(errors[:-1]) / np.array(errors[1:]), 2, atol=0.7)


@pytest.mark.parametrize(("steps", "most"), [(1000, 1.0102), (250, 1.04105)])
def test_the_mean_moves_by_at_most_so_much_more_than_in_algorithm_1_with_the_large_variance(
    steps: int, most: float
) -> None:
    sampler = Ancestral(steps, clip=False)
    times, x = sampler.times(PROCESS), images()
    plain = denoiser(Unconditional()).bind({})
    guided = guide(ClassifierGuidance(Classifier(), PROCESS), denoiser(Unconditional()), {"label": LABEL})
    factors = []
    for i in [0, 1, *range(2, steps, steps // 25), steps - 1]:
        k, j = (round(float(time) * 1000) for time in times[i : i + 2])
        step = (x, PROCESS, times[i], times[i + 1], lambda: torch.zeros_like(x))
        moved = sampler.step(guided, *step)[0] - sampler.step(plain, *step)[0]
        # Sigma = beta of the step, 1 - alpha_ts^2.
        factors.append(float(moved.norm() / ((1 - BARS[k] / BARS[j]) * gradient(x, k, LABEL)).norm()))
        assert factors[-1] == pytest.approx(math.sqrt(BARS[j] / BARS[k]), rel=1e-6)
    assert min(factors) > 1
    assert max(factors) <= most
    assert max(factors) == pytest.approx(most, abs=1e-4)


def test_a_classifier_also_sharpens_a_network_that_knows_the_label_itself() -> None:
    network = Network()
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[2]["label"]))
    guide(ClassifierGuidance(Classifier(), PROCESS), denoiser(network), {"label": LABEL})(images(), torch.tensor(0.5))
    assert torch.equal(seen[0], LABEL)


class Convolutional(TimeDependentClassifier):
    """A classifier with weights, whose precision autocast would lower."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(2, 64), nn.Linear(64, 2)
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(x.flatten(1) + time[:, None] / 1000)
        self.dtypes.add(h.dtype)
        out: Tensor = self.last(h.sin())
        return out


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_gradient_is_float32_and_there_while_gradients_are_off(mode: Callable[[], torch.no_grad]) -> None:
    classifier = Convolutional()
    guidance = ClassifierGuidance(classifier, PROCESS)
    x, t = images().float(), torch.tensor(0.5, dtype=torch.float64)
    plain = guidance.gradient(x, t, {"label": LABEL})
    with mode(), torch.autocast("cpu", torch.bfloat16):
        x = x + 0
        found = guidance.gradient(x, t + 0, {"label": LABEL + 0})
        assert guidance.gradient(x.bfloat16(), t, {"label": LABEL}).dtype == torch.bfloat16
    assert classifier.dtypes == {torch.float32}
    assert torch.equal(plain, found)
    assert not found.requires_grad
    # By central differences.
    h, direction = 1e-2, torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    time = torch.full((6,), 499.0)

    def log_p(x: Tensor) -> Tensor:
        return classifier(x, time).log_softmax(1)[torch.arange(6), LABEL]  # type: ignore[no-any-return]

    slope = (log_p(x + h * direction) - log_p(x - h * direction)) / (2 * h)
    torch.testing.assert_close((found * direction).flatten(1).sum(1), slope, rtol=2e-2, atol=1e-3)


def test_clipping_before_guidance_is_the_authors_rule() -> None:
    # guided-diffusion, `ddim_sample` with `clip_denoised`: condition_score on a clipped prediction, no more clips.
    k, j, scale = 900, 700, 3.0
    x, t, s = 3 * images(), torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    bar, before = BARS[k], BARS[j]
    network = denoiser(Wide())
    plain_x0 = network.bind({})(x, t).x0.clamp(-1, 1)
    assert (plain_x0.abs() == 1).any()
    eps = (x - math.sqrt(bar) * plain_x0) / math.sqrt(1 - bar)
    eps = eps - math.sqrt(1 - bar) * scale * gradient(x, k, LABEL)
    x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
    assert (x0.abs() > 1).any()
    expected = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
    guided = guide(ClassifierGuidance(Classifier(), PROCESS, scale, clip=True), network, {"label": LABEL})
    found, found_x0 = DDIM(clip=False).step(guided, x, PROCESS, t, s, seeded(x))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_x0, x0, rtol=1e-9, atol=1e-9)


def test_a_module_that_owns_the_guidance_moves_its_classifier_and_neither_trains_nor_saves_it() -> None:
    classifier = Convolutional().train()
    owner = nn.ModuleDict({"guidance": ClassifierGuidance(classifier, PROCESS)})
    assert not owner.state_dict()
    assert not list(owner.parameters())
    owner.train().double()
    assert not classifier.training
    assert classifier.first.weight.dtype == torch.float64


# Classifier-free guidance


@sampled
@pytest.mark.parametrize(("scale", "label"), [(0.0, LABEL), (-1.0, torch.full((6,), -1))], ids=["w 0", "w -1"])
def test_scale_0_is_the_conditional_and_scale_minus_1_the_unconditional_model(
    sampler: Sampler, scale: float, label: Tensor
) -> None:
    guided = guide(ClassifierFree(scale), denoiser(), {"label": LABEL})
    expected = denoiser().bind({"label": label})
    torch.testing.assert_close(path(sampler, guided), path(sampler, expected), rtol=0, atol=1e-10)


def test_the_scale_is_the_paper_s() -> None:
    x_t, t = images(), torch.tensor(0.6, dtype=torch.float64)
    eps_c, eps_u = (denoiser().bind(c)(x_t, t).eps for c in ({"label": LABEL}, {}))
    found = guide(ClassifierFree(1.5), denoiser(), {"label": LABEL})(x_t, t)
    torch.testing.assert_close(found.eps, 2.5 * eps_c - 1.5 * eps_u)
    alpha, sigma = math.sqrt(BARS[600]), math.sqrt(1 - BARS[600])
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x_t)


def test_on_a_perfect_model_it_is_classifier_guidance_with_scale_1_plus_w() -> None:
    sampler = DDIM(15)
    free = guide(ClassifierFree(0.8), denoiser(), {"label": LABEL})
    by_classifier = guide(ClassifierGuidance(Classifier(), PROCESS, 1.8), denoiser(Unconditional()), {"label": LABEL})
    torch.testing.assert_close(path(sampler, free), path(sampler, by_classifier), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("scale", "interval", "batches"),
    [
        (2.0, (0.0, 1.0), [12, 12, 12, 12]),
        (2.0, (0.2, 0.6), [6, 12, 12, 6]),
        (2.0, (0.251, 0.751), [12, 12, 6, 6]),
        (0.0, (0.0, 1.0), [6, 6, 6, 6]),
    ],
)
def test_a_step_is_one_call_of_twice_the_batch_inside_the_interval_and_of_the_batch_outside(
    scale: float, interval: tuple[float, float], batches: list[int]
) -> None:
    network = Network()
    # At times 0.751, 0.501, 0.251 and 0.001.
    path(DDIM(4), guide(ClassifierFree(scale, interval), denoiser(network), {"label": LABEL}))
    assert network.batches == batches


def test_each_image_of_its_own_time_is_guided_by_its_own_time() -> None:
    x_t = images()
    t = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.6, 0.301], dtype=torch.float64)
    for guidance in (ClassifierFree(3.0, (0.3, 0.6)), ClassifierFree(3.0, (0.3, 0.6), rescale=0.7)):
        together = guide(guidance, denoiser(), {"label": LABEL})(x_t, t)
        for i in range(6):
            inside = i in (1, 4, 5)
            alone = guide(guidance if inside else ClassifierFree(0.0), denoiser(), {"label": LABEL[i : i + 1]})
            torch.testing.assert_close(together.x0[i : i + 1], alone(x_t[i : i + 1], t[i]).x0)
            torch.testing.assert_close(together.eps[i : i + 1], alone(x_t[i : i + 1], t[i]).eps)


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescaling_brings_the_deviation_of_x0_back(phi: float) -> None:
    x_t, t = images(), torch.tensor(0.5, dtype=torch.float64)
    plain = denoiser().bind({"label": LABEL})(x_t, t).x0
    wide = guide(ClassifierFree(4.0), denoiser(), {"label": LABEL})(x_t, t).x0
    found = guide(ClassifierFree(4.0, rescale=phi), denoiser(), {"label": LABEL})(x_t, t)

    def deviation(x0: Tensor) -> float:
        return float(x0.flatten()[0] - x0.flatten()[1]) / math.sqrt(2)

    factors = [abs(deviation(p) / deviation(w)) for p, w in zip(plain, wide, strict=True)]
    expected = torch.stack([(phi * f + 1 - phi) * w for f, w in zip(factors, wide, strict=True)])
    torch.testing.assert_close(found.x0, expected)
    alpha, sigma = math.sqrt(BARS[500]), math.sqrt(1 - BARS[500])
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x_t)


def test_without_any_signal_left_nothing_is_divided_by_it() -> None:
    """alpha is 5e-5 at the end of the cosine schedule: x0 off eps would be all rounding errors."""
    process = DiscreteProcess(schedule=Cosine())

    class Velocity(nn.Module):
        num_classes, has_null_label = 2, True

        def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            return -0.1 * (condition["label"].reshape(-1, 1, 1, 1) + 2) * torch.ones_like(x)

    guided = guide(ClassifierFree(1.0), Denoiser(Velocity(), V(), process), {"label": LABEL})
    x0 = guided(images().float(), torch.tensor(1.0, dtype=torch.float64)).x0
    expected = 2 * 0.1 * (LABEL + 2.0) - 0.1
    torch.testing.assert_close(x0, expected.reshape(-1, 1, 1, 1).expand_as(x0), rtol=0, atol=1e-3)


def test_what_else_the_network_put_out_is_the_conditional_s() -> None:
    class Talkative(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
            prediction = super().forward(x_t, t, condition)
            return Prediction(prediction.x0, prediction.eps, extra=condition["label"].double())

    guided = guide(ClassifierFree(2.0), Talkative(Network(), Eps(), PROCESS), {"label": LABEL})
    extra = guided(images(), torch.tensor(0.5)).extra
    assert extra is not None
    assert torch.equal(extra, LABEL.double())


# What does not fit


class Plain(nn.Module):
    image_size, in_channels = 2, 1

    def forward(self, x: Tensor) -> Tensor:
        return x


class NoDropout(Network):
    has_null_label = False


class Large(Classifier):
    image_size = 64


class Thousand(Classifier):
    num_classes = 1000


def misfits() -> Iterator[tuple[str, Callable[[], object]]]:
    def bind(guidance: Guidance, network: nn.Module, label: bool = True) -> Callable[[], object]:
        return lambda: guide(guidance, denoiser(network), {"label": LABEL} if label else {})

    yield "Unconditional makes no unconditional predictions", bind(ClassifierFree(), Unconditional())
    yield "NoDropout makes no unconditional.*--model.conditioner.dropout 0.1", bind(ClassifierFree(), NoDropout())
    yield "was given none.*--labels", bind(ClassifierFree(), Network(), label=False)
    yield "was given none.*--labels", bind(ClassifierGuidance(Classifier(), PROCESS), Network(), label=False)
    yield "image_size=64, the model has image_size=2", bind(ClassifierGuidance(Large(), PROCESS), Network())
    yield "num_classes=1000, the model has num_classes=2", bind(ClassifierGuidance(Thousand(), PROCESS), Network())
    for other in (DiscreteProcess(999), DiscreteProcess(schedule=Cosine())):
        yield "another noise schedule", bind(ClassifierGuidance(Classifier(), other), Network())
    yield "Plain takes no time: it was trained on clean images", lambda: ClassifierGuidance(Plain(), PROCESS)  # type: ignore[arg-type]
    yield r"interval=\[0.5, 0.5\]", lambda: ClassifierFree(1.0, (0.5, 0.5))
    yield r"interval=\[0, 1000\]", lambda: ClassifierFree(1.0, (0, 1000))
    yield "rescale=1.5", lambda: ClassifierFree(1.0, rescale=1.5)


@pytest.mark.parametrize(("message", "make"), list(misfits()))
def test_what_does_not_fit_is_refused_in_one_line(message: str, make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_process_given_anew_is_the_same_process() -> None:
    guidance = ClassifierGuidance(Classifier(), DiscreteProcess(1000, Linear(1e-4, 0.02)))
    guidance.check(denoiser(), Labels())
