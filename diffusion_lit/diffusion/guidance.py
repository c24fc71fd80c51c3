"""Guidance: trading diversity for fidelity to a condition.

A guidance turns a denoiser and a condition into the `DenoiseFn` that samplers call, so that every sampler works with
every guidance. It changes the score, and with it both parts of a prediction:

    x_t = alpha x0 + sigma eps,    score = -eps / sigma

Weights that add up to 1 keep this equation when they are applied to x0 and eps alike; a change of eps by d implies a
change of x0 by -sigma / alpha d.
"""

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from diffusion_lit.conditioner import Conditioner
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.diffusion.samplers.base import clip_x0
from diffusion_lit.frozen import Frozen
from diffusion_lit.types import Condition, DenoiseFn, Part, Prediction, TimeDependentClassifier


class Guidance(Part):
    """A function of a denoiser and a condition. Subclasses that hold networks are modules, which move with their owner.

    Attributes:
        num_classes: Number of classes if it does not depend on the network; None: it does.
    """

    num_classes: int | None = None

    def check(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Raises ValueError if the guidance does not work with this denoiser and these conditions."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, condition: Condition, conditioner: Conditioner) -> DenoiseFn:
        """Returns (x_t, t) -> Prediction, with x0 and eps that agree.

        Args:
            denoiser: The denoiser to guide.
            condition: Output of the conditioner, on the device of the images.
            conditioner: The conditioner, which knows the null condition.

        Raises:
            ValueError: If the condition is empty, or the guidance does not work with this denoiser.
        """


def num_classes_of(network: nn.Module) -> int | None:
    """Returns the number of classes of a network; None: it takes no labels."""
    return cast("int | None", getattr(network, "num_classes", None))


def _require(present: bool, guidance: Guidance) -> None:
    if not present:
        raise ValueError(
            f"{type(guidance).__name__} guides towards a condition and was given none; set classes with --labels, "
            "or remove --model.guidance"
        )


class ClassifierFree(Guidance):
    """eps = (1 + w) eps_c - w eps_u, from one network that predicts with the condition and with the null condition.

    Both predictions are made in one call with twice the batch; where the guidance is off, one call with the batch.

    Args:
        scale: w as in the paper: 0 is the conditional model, -1 the unconditional one. Many programs use s = 1 + w,
            which is 1 for the conditional model.
        interval: Times (lo, hi] with guidance, 0 <= lo < hi <= 1, where t = 0 is clean data; elsewhere the conditional
            prediction is used. Source: Kynkäänniemi et al. 2024, eq. 5.
        rescale: phi, in [0, 1]: how far the standard deviation of each x0, which a large w increases, is reduced to
            that of the conditional prediction. Source: Lin et al. 2024, eqs. 15 and 16.

    Raises:
        ValueError: If the interval or rescale is out of range.

    Source: Ho & Salimans 2022, eq. 6.
    """

    def __init__(self, scale: float = 1.0, interval: Sequence[float] = (0.0, 1.0), rescale: float = 0.0) -> None:
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"guidance.interval={list(interval)} must be two times, 0 <= lo < hi <= 1; [0, 1] guides always"
            )
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance.rescale={rescale} must lie in [0, 1]; 0 is off, Lin et al. use 0.7")
        self.scale = scale
        self.low, self.high = interval
        self.rescale = rescale

    def check(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Raises ValueError if the network has not learned to predict from the null condition."""
        if not conditioner.has_null(denoiser.network):
            raise ValueError(
                f"guidance: the model's {type(denoiser.network).__name__} makes no unconditional predictions; train "
                "it with --model.conditioner.dropout 0.1, use classifier guidance, or remove --model.guidance"
            )

    def __call__(self, denoiser: Denoiser, condition: Condition, conditioner: Conditioner) -> DenoiseFn:
        self.check(denoiser, conditioner)
        _require(bool(condition), self)
        null = conditioner.null(condition)
        both = {name: torch.cat([value, null[name]]) for name, value in condition.items()}

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            inside = (t > self.low) & (t <= self.high)
            if self.scale == 0 or not bool(inside.any()):
                return denoiser(x_t, t, condition)  # type: ignore[no-any-return]
            prediction = denoiser(torch.cat([x_t, x_t]), t if t.ndim == 0 else t.repeat(2), both)
            (x0_c, x0_u), (eps_c, eps_u) = prediction.x0.chunk(2), prediction.eps.chunk(2)
            w = expand(torch.where(inside, self.scale, 0.0).to(x_t.device), x_t)
            x0, eps = x0_c + w * (x0_c - x0_u), eps_c + w * (eps_c - eps_u)
            if self.rescale:
                x0 = torch.where(w == 0, x0, self._rescaled(x0, x0_c))
                alpha, sigma = denoiser.process.alpha_sigma(t)
                eps = (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)
            extra = None if prediction.extra is None else prediction.extra[: len(x_t)]
            return Prediction(x0=x0, eps=eps, extra=extra)

        return guided

    def _rescaled(self, x0: Tensor, x0_c: Tensor) -> Tensor:
        dims = tuple(range(1, x0.ndim))
        ratio = x0_c.std(dims, keepdim=True) / x0.std(dims, keepdim=True).clamp(min=1e-8)
        return self.rescale * ratio * x0 + (1 - self.rescale) * x0


class ClassifierGuidance(nn.Module, Guidance):
    """eps = eps - s sigma grad log p(y | x_t), with a classifier that was trained on noisy images.

    x0 changes by s sigma^2 / alpha grad log p(y | x_t). For s = 1, a perfect network and a perfect classifier, and a
    network without labels, this is E[x_0 | x_t, y] exactly.

    With DDIM this is the paper's algorithm 2. In ancestral sampling the mean a x_t + b x0 changes by

        b s sigma_t^2 / alpha_t grad = s sigma_ts^2 / alpha_ts grad,    sigma_ts^2 = beta_t and alpha_ts^2 = 1 - beta_t

    which gives the exact mean of q(x_s | x_t, y) at s = 1, for steps of any length. The paper's algorithm 1,
    s Sigma grad, is its limit for short steps: with the large variance it lacks the factor 1 / alpha_ts (1 to 1.01 in
    the 1000 steps of the linear schedule), and with a smaller variance its guidance is smaller too.

    Args:
        classifier: Classifier of noisy images, which is not trained.
        process: The process that the classifier was trained on.
        scale: s; 0 is unguided.
        clip: Whether predictions of x_0 are clipped to [-1, 1] before they are guided, as in the authors' code, which
            does not clip after it. Set `clip` of the sampler to false then.

    Raises:
        ValueError: If the classifier takes no time.

    Source: Dhariwal & Nichol 2021, section 4, algorithms 1 and 2.
    """

    def __init__(
        self, classifier: TimeDependentClassifier, process: Process, scale: float = 1.0, clip: bool = False
    ) -> None:
        super().__init__()
        require_time(classifier)
        self.classifier = Frozen(classifier)
        self.process = process
        self.scale = scale
        self.clip = clip
        self.num_classes = num_classes_of(classifier)

    def check(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Raises ValueError if the classifier has other images, noise or classes than the denoiser."""
        network, classifier = denoiser.network, self.classifier.network
        for name, what in (("image_size", "images"), ("in_channels", "channels"), ("num_classes", "classes")):
            ours, theirs = getattr(network, name, None), getattr(classifier, name, None)
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(
                    f"guidance: the classifier was trained for {what} {name}={theirs}, the model has {name}={ours}; "
                    f"train a classifier with {name}={ours}"
                )
        if not same_process(self.process, denoiser.process):
            raise ValueError(
                "guidance: the classifier was trained on another noise schedule or number of steps than the model; "
                "train one with the model's own --model.process"
            )

    def __call__(self, denoiser: Denoiser, condition: Condition, conditioner: Conditioner) -> DenoiseFn:
        self.check(denoiser, conditioner)
        _require("label" in condition, self)
        label = condition["label"]
        if num_classes_of(denoiser.network) is None:
            condition = {name: value for name, value in condition.items() if name != "label"}
        process = denoiser.process
        denoise = clip_x0(denoiser.bind(condition), process) if self.clip else denoiser.bind(condition)

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            prediction = denoise(x_t, t)
            if self.scale == 0:
                return prediction
            alpha, sigma = process.alpha_sigma(t)
            shift = self.scale * self.gradient(x_t, t, label)
            return Prediction(
                x0=prediction.x0 + expand(sigma**2 / alpha, x_t) * shift,
                eps=prediction.eps - expand(sigma, x_t) * shift,
                extra=prediction.extra,
            )

        return guided

    def gradient(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Returns the gradient of log p(label | x_t), in the shape of x_t, computed in the classifier's precision."""
        # A tensor of inference mode cannot be differentiated, hence the clones.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x_t.device.type, enabled=False):
            x = x_t.detach().clone().to(self._dtype(x_t)).requires_grad_()
            time = self.process.network_time(t.clone()).to(x.device).expand(len(x))
            log_p = self.classifier(x, time).log_softmax(1)
            chosen = log_p.gather(1, label.to(x.device).clone()[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, x)
        return gradient.to(x_t.dtype)

    def _dtype(self, x_t: Tensor) -> torch.dtype:
        floating = (p.dtype for p in self.classifier.network.parameters() if p.is_floating_point())
        return next(floating, torch.promote_types(x_t.dtype, torch.float32))


def require_time(classifier: nn.Module) -> None:
    """Raises ValueError if a classifier does not take the time of its images."""
    parameters = inspect.signature(classifier.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if len(positional) < 2 and not any(p.kind == p.VAR_POSITIONAL for p in positional):
        raise ValueError(
            f"{type(classifier).__name__} takes no time: it was trained on clean images, and its output for noisy "
            "images means nothing; train a NoisyClassifier with fit --model NoisyClassifierModule"
        )


def same_process(a: Process, b: Process) -> bool:
    """Returns whether two processes have the same times, noise levels and times of the network."""
    if type(a) is not type(b) or a.num_steps != b.num_steps:
        return False
    t = torch.linspace(0, 1, (a.num_steps or 1000) + 1, dtype=torch.float64)[1:]
    tables = [torch.stack([*p.alpha_sigma(t), p.network_time(t).double()]) for p in (a, b)]
    return torch.allclose(tables[0], tables[1], rtol=1e-9, atol=1e-12)
