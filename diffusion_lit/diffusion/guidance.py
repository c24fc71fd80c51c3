"""Guidance: trading diversity for fidelity to a class.

A guidance turns a denoiser and a condition into the `DenoiseFn` that a sampler calls, so that every sampler works with
every guidance. What it changes is the score, and with it both views at once:

    x_t = alpha x0 + sigma eps,    score = -eps / sigma

Weights that add up to 1 keep this equation when they are applied to x0 and eps alike; a change of eps by d goes with a
change of x0 by -sigma / alpha d.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.types import Condition, DenoiseFn, Prediction


class Guidance(ABC):
    """A function of a denoiser.

    Attributes:
        num_classes: Of the labels that it understands where that does not depend on the network; None: it does.
    """

    num_classes: int | None = None

    def check(self, denoiser: Denoiser) -> None:  # noqa: B027
        """Raises ValueError if the denoiser cannot be guided so."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, condition: Condition) -> DenoiseFn:
        """Binds a condition.

        Args:
            denoiser: What is guided.
            condition: With "label", int64, (B,), on the device of the images.

        Returns:
            (x_t, t) -> Prediction, with x0 and eps that agree.

        Raises:
            ValueError: If the condition has no label, or the denoiser cannot be guided so.
        """


def num_classes_of(network: nn.Module) -> int | None:
    """How many classes a network has been told of; None: it takes no labels."""
    return cast("int | None", getattr(network, "num_classes", None))


def label_of(condition: Condition, guidance: Guidance) -> Tensor:
    """The label of a condition; raises ValueError if there is none."""
    if "label" not in condition:
        raise ValueError(
            f"{type(guidance).__name__} guides towards a label and was given none; ask for classes with --labels, or "
            "leave --model.init_args.guidance out"
        )
    return condition["label"]


class ClassifierFree(Guidance):
    """eps = (1 + w) eps_c - w eps_u, from one network that knows the label and, with the null label, does not.

    Both predictions come from one call of twice the batch; where only the label's own is needed, of the batch itself.

    Args:
        scale: w as in the paper: 0 is the plain conditional model, -1 the unconditional one. Many programs give
            s = 1 + w, which is 1 for the plain conditional model.
        interval: Guided are times in (lo, hi], 0 <= lo < hi <= 1, t = 0 being clean data; at others the conditional
            prediction stands alone. Source: Kynkäänniemi et al. 2024, eq. 5.
        rescale: phi, in [0, 1]: how far the standard deviation of each x0, which a large w inflates, is brought back to
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

    def check(self, denoiser: Denoiser) -> None:
        """Raises ValueError if the network takes no labels, or was never trained without them."""
        network = denoiser.network
        if num_classes_of(network) is None:
            raise ValueError(
                f"guidance: the model's {type(network).__name__} takes no labels; leave --model.init_args.guidance "
                "out, or train a network with num_classes"
            )
        if not getattr(network, "has_null_label", False):
            raise ValueError(
                "guidance: the model was trained without label dropout and has no unconditional half; train it with "
                "the network's label_dropout above 0 (0.1 is usual), or use classifier guidance"
            )

    def __call__(self, denoiser: Denoiser, condition: Condition) -> DenoiseFn:
        self.check(denoiser)
        label = label_of(condition, self)
        null = torch.full_like(label, cast(int, num_classes_of(denoiser.network)))
        both = {name: torch.cat([value, null if name == "label" else value]) for name, value in condition.items()}

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


class ClassifierGuidance(Guidance):
    """eps = eps - s sigma grad log p(y | x_t), with a classifier that was trained on noisy images.

    x0 moves along, by s sigma^2 / alpha grad log p(y | x_t). Where s = 1, network and classifier are perfect and the
    network does not know the label, this is E[x_0 | x_t, y] exactly.

    DDIM then does what the paper's algorithm 2 says. In ancestral sampling the mean a x_t + b x0 moves by

        b s sigma_t^2 / alpha_t grad = s sigma_ts^2 / alpha_ts grad,    sigma_ts^2 = beta_t and alpha_ts^2 = 1 - beta_t

    which is the exact mean of q(x_s | x_t, y) at s = 1, for steps of any length. The paper's algorithm 1, s Sigma grad,
    is its limit for short steps: with the large variance it lacks the factor 1 / alpha_ts (1 to 1.01 in the 1000 steps
    of the linear schedule), and with a smaller variance the guidance shrinks along with it.

    Args:
        classifier: Called as classifier(x_t, time), time as for networks, float32, (B,); gives logits,
            (B, num_classes). It has `num_classes` and `image_size`. It is not trained any further.
        process: What the classifier was trained on.
        scale: s; 0 is unguided.

    Raises:
        ValueError: If the classifier takes no time.

    Source: Dhariwal & Nichol 2021, section 4, algorithms 1 and 2.
    """

    def __init__(self, classifier: nn.Module, process: Process, scale: float = 1.0) -> None:
        require_time(classifier)
        self.classifier = classifier.eval().requires_grad_(False)
        self.process = process
        self.scale = scale
        self.num_classes = num_classes_of(classifier)

    def check(self, denoiser: Denoiser) -> None:
        """Raises ValueError if the classifier knows other images, noise or classes than the denoiser."""
        network = denoiser.network
        for name, what in (("image_size", "images"), ("in_channels", "channels"), ("num_classes", "classes")):
            ours, theirs = getattr(network, name, None), getattr(self.classifier, name, None)
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(
                    f"guidance: the classifier was trained for {what} {name}={theirs}, the model has {name}={ours}; "
                    f"train a classifier with {name}={ours}"
                )
        if not same_process(self.process, denoiser.process):
            raise ValueError(
                "guidance: the classifier was trained on another noise schedule or number of steps than the model; "
                "train one with the model's own --model.init_args.process"
            )

    def __call__(self, denoiser: Denoiser, condition: Condition) -> DenoiseFn:
        self.check(denoiser)
        label = label_of(condition, self)
        if num_classes_of(denoiser.network) is None:
            condition = {name: value for name, value in condition.items() if name != "label"}

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            prediction: Prediction = denoiser(x_t, t, condition)
            if self.scale == 0:
                return prediction
            alpha, sigma = denoiser.process.alpha_sigma(t)
            shift = self.scale * self.gradient(x_t, t, label)
            return Prediction(
                x0=prediction.x0 + expand(sigma**2 / alpha, x_t) * shift,
                eps=prediction.eps - expand(sigma, x_t) * shift,
                extra=prediction.extra,
            )

        return guided

    def gradient(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The gradient of log p(label | x_t), in the shape of x_t; in float32 under any precision of the network."""
        # In inference mode nothing could be differentiated, not even weights that are moved there.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x_t.device.type, enabled=False):
            x = x_t.detach().clone().to(torch.promote_types(x_t.dtype, torch.float32)).requires_grad_()
            time = self.process.network_time(t.clone()).to(x.device).expand(len(x))
            log_p = self.classifier.to(x.device)(x, time).log_softmax(1)
            chosen = log_p.gather(1, label.to(x.device).clone()[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, x)
        return gradient.to(x_t.dtype)


def require_time(classifier: nn.Module) -> None:
    """Raises ValueError if a classifier cannot be told how noisy its images are."""
    parameters = inspect.signature(classifier.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if len(positional) < 2 and not any(p.kind == p.VAR_POSITIONAL for p in positional):
        raise ValueError(
            f"{type(classifier).__name__} takes no time: it was trained on clean images, and what it says of the noisy "
            "ones that guidance shows it means nothing; train a NoisyClassifier with fit --model NoisyClassifierModule"
        )


def same_process(a: Process, b: Process) -> bool:
    """Whether two processes have the same times, the same noise at each, and tell it to networks in the same way."""
    steps: tuple[Any, Any] = getattr(a, "num_steps", None), getattr(b, "num_steps", None)
    if type(a) is not type(b) or steps[0] != steps[1]:
        return False
    t = torch.linspace(0, 1, (steps[0] or 1000) + 1, dtype=torch.float64)[1:]
    tables = [torch.stack([*p.alpha_sigma(t), p.network_time(t).double()]) for p in (a, b)]
    return torch.allclose(tables[0], tables[1], rtol=1e-9, atol=1e-12)
