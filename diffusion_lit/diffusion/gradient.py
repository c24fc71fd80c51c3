"""Guidance by a gradient: the score of a model, plus that of how well an image fits what is asked for.

    grad log p(x_t | c) = grad log p(x_t) + s grad log p(c | x_t)

Whatever tells how well an image fits is a `LogLikelihood`: a classifier, the agreement of an image with a text, the
distance from a given image. Some judge x_t itself and were trained on noisy images; others judge clean images and are
shown the x_0 that the model predicts from x_t.
"""

import inspect
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffusion_lit.conditioner import Conditioner
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.guidance import Guidance, num_classes_of, require_condition
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.diffusion.samplers.base import clip_x0
from diffusion_lit.frozen import Frozen
from diffusion_lit.types import Condition, DenoiseFn, Part, Prediction, TimeDependentClassifier


class LogLikelihood(Part):
    """log p(c | x) of a condition c for images x, up to a constant.

    One that has a network is a `torch.nn.Module` too and holds it as `Frozen`, so that the module that owns the
    guidance moves it and no checkpoint holds it.

    Attributes:
        clean: Whether it is shown the x_0 that the model predicts, and not x_t. The gradient is taken through the
            model then, which costs its backward pass.
        entries: Entries of an example that it needs, other than its label.
        num_classes: Number of classes if it needs a label.
    """

    clean: bool = False
    entries: tuple[str, ...] = ()
    num_classes: int | None = None

    def check(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Raises ValueError if it does not fit this denoiser and these conditions."""

    def prepare(self, given: Condition) -> Condition:
        """Computes once for all steps what depends on the condition alone, such as the embedding of a text.

        Args:
            given: What the images are to show: `entries`, `label` and whatever else was asked for, (B, ...) each.

        Returns:
            The condition of `__call__`.
        """
        return given

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Computes log p(c | x) in nats, (B,), differentiable in x; called without autocast.

        Args:
            x: x_t, or the predicted x_0 if `clean`, (B, C, H, W), at least float32; latents for a model of latents.
            t: The time in (0, 1], () or (B,), as samplers have it.
            condition: Output of `prepare`.
        """


class GradientGuidance(nn.Module, Guidance):
    """eps = eps - s sigma grad log p(c | x_t), for any `LogLikelihood`.

    x0 changes by s sigma^2 / alpha grad log p(c | x_t). For s = 1, a perfect network and a perfect likelihood, and a
    network that is not told c, this is E[x_0 | x_t, c] exactly.

    With DDIM this is the paper's algorithm 2. In ancestral sampling the mean a x_t + b x0 changes by

        b s sigma_t^2 / alpha_t grad = s sigma_ts^2 / alpha_ts grad,    sigma_ts^2 = beta_t and alpha_ts^2 = 1 - beta_t

    which gives the exact mean of q(x_s | x_t, c) at s = 1, for steps of any length. The paper's algorithm 1,
    s Sigma grad, is its limit for short steps: with the large variance it lacks the factor 1 / alpha_ts (1 to 1.01 in
    the 1000 steps of the linear schedule), and with a smaller variance its guidance is smaller too.

    Args:
        likelihood: Tells how well images fit the condition.
        scale: s; 0 is unguided.
        clip: Whether predictions of x_0 are clipped to [-1, 1] before they are guided. Set `clip` of the sampler to
            false then.

    Sources: Dhariwal & Nichol 2021, section 4, algorithms 1 and 2; Nichol et al. 2022 (GLIDE), section 2.4; for
    likelihoods of the predicted x_0, Bansal et al. 2023, eq. 6.
    """

    def __init__(self, likelihood: LogLikelihood, scale: float = 1.0, clip: bool = False) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.scale = scale
        self.clip = clip
        self.num_classes = likelihood.num_classes

    @property
    def entries(self) -> tuple[str, ...]:
        return self.likelihood.entries

    def check(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Raises ValueError if the likelihood does not fit the denoiser."""
        self.likelihood.check(denoiser, conditioner)

    def __call__(
        self, denoiser: Denoiser, condition: Condition, conditioner: Conditioner, given: Condition | None = None
    ) -> DenoiseFn:
        self.check(denoiser, conditioner)
        given = condition if given is None else given
        needed = (*self.entries, *(() if self.num_classes is None else ("label",)))
        require_condition(all(name in given for name in needed), self)
        if num_classes_of(denoiser.network) is None:
            condition = {name: value for name, value in condition.items() if name != "label"}
        # Tensors of inference mode cannot be differentiated, hence the clones.
        with torch.inference_mode(False):
            condition, given = _cloned(condition), _cloned(given)
            prepared = self.likelihood.prepare(given)
        process = denoiser.process
        denoise = clip_x0(denoiser.bind(condition), process) if self.clip else denoiser.bind(condition)

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            if self.scale == 0:
                return denoise(x_t, t)
            if self.likelihood.clean:
                prediction, gradient = self._through(denoise, x_t, t, prepared)
            else:
                prediction, gradient = denoise(x_t, t), self.gradient(x_t, t, prepared)
            alpha, sigma = process.alpha_sigma(t)
            shift = self.scale * gradient
            return Prediction(
                x0=prediction.x0 + expand(sigma**2 / alpha, x_t) * shift,
                eps=prediction.eps - expand(sigma, x_t) * shift,
                extra=prediction.extra,
            )

        return guided

    def gradient(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Returns the gradient of log p(c | x_t), in the shape and dtype of x_t, computed in at least float32."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().to(torch.promote_types(x_t.dtype, torch.float32)).requires_grad_()
            return self._slope(x, x, t.clone(), _cloned(condition)).to(x_t.dtype)

    def _through(self, denoise: DenoiseFn, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Prediction, Tensor]:
        """The prediction from x_t, and the gradient in x_t of log p(c | x_0) at the predicted x_0."""
        with torch.inference_mode(False), torch.enable_grad():
            x, t = x_t.detach().clone().requires_grad_(), t.clone()
            found = denoise(x, t)
            gradient = self._slope(x, found.x0.to(torch.promote_types(x.dtype, torch.float32)), t, condition)
        extra = None if found.extra is None else found.extra.detach()
        return Prediction(x0=found.x0.detach(), eps=found.eps.detach(), extra=extra), gradient

    def _slope(self, x: Tensor, shown: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The gradient in x of the log-likelihood of what is shown, which depends on x; in full precision."""
        with torch.autocast(x.device.type, enabled=False):
            (gradient,) = torch.autograd.grad(self.likelihood(shown, t, condition).sum(), x)
        return gradient


class NoisyClassification(nn.Module, LogLikelihood):
    """log p(y | x_t) by a classifier that was trained on noisy images.

    Args:
        classifier: Classifier of noisy images, which is not trained.
        process: The process that the classifier was trained on.

    Raises:
        ValueError: If the classifier takes no time.

    Source: Dhariwal & Nichol 2021, section 4.
    """

    def __init__(self, classifier: TimeDependentClassifier, process: Process) -> None:
        super().__init__()
        require_time(classifier)
        self.classifier = Frozen(classifier)
        self.process = process
        self.num_classes = num_classes_of(classifier)

    def check(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Raises ValueError if the classifier has other images, noise or classes than the denoiser."""
        what = {"image_size": "images", "in_channels": "channels", "num_classes": "classes"}
        require_same_noise("classifier", self.classifier.network, self.process, denoiser, what)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        time = self.process.network_time(t).to(x.device).expand(len(x))
        log_p: Tensor = self.classifier(x.to(float_type(self.classifier.network, x)), time).log_softmax(1)
        return log_p.gather(1, condition["label"].to(x.device)[:, None]).squeeze(1)


class ClassifierGuidance(GradientGuidance):
    """Guidance by a classifier that was trained on noisy images.

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
        likelihood = NoisyClassification(classifier, process)
        super().__init__(likelihood, scale, clip)
        self.classifier = likelihood.classifier
        self.process = process


def _cloned(condition: Condition) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in condition.items()}


def float_type(network: nn.Module, x: Tensor) -> torch.dtype:
    """The precision of a network's weights; of one without weights, that of x, at least float32."""
    floating = (p.dtype for p in network.parameters() if p.is_floating_point())
    return next(floating, torch.promote_types(x.dtype, torch.float32))


def require_same_noise(
    what: str, judge: nn.Module, process: Process, denoiser: Denoiser, names: Mapping[str, str]
) -> None:
    """Raises ValueError if a network that judges noisy images was made for others than a denoiser sees.

    Args:
        what: What the network is called in messages.
        judge: The network.
        process: What it was trained on.
        denoiser: What it is to guide.
        names: Attributes that both networks may have and then agree in, each with what it counts.
    """
    for name, things in names.items():
        ours, theirs = getattr(denoiser.network, name, None), getattr(judge, name, None)
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                f"guidance: the {what} was trained for {things} {name}={theirs}, the model has {name}={ours}; "
                f"train a {what} with {name}={ours}"
            )
    if not same_process(process, denoiser.process):
        raise ValueError(
            f"guidance: the {what} was trained on another noise schedule or number of steps than the model; "
            "train one with the model's own --model.process"
        )


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
