"""Consistency losses: training from data, and distillation of a diffusion model."""

import copy
from abc import abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from diffusion_lit.checkpoint import load_model
from diffusion_lit.diffusion import Denoiser, LogNormal, Objective, Process, Seen
from diffusion_lit.diffusion.gradient import same_process
from diffusion_lit.diffusion.guidance import num_classes_of
from diffusion_lit.diffusion.objective import GatherFn
from diffusion_lit.diffusion.samplers.heun import heun_step
from diffusion_lit.frozen import Frozen
from diffusion_lit.methods.consistency.distance import Distance, PseudoHuber, Squared
from diffusion_lit.methods.consistency.pairs import Doubling, Neighbors, Pairs
from diffusion_lit.module import DiffusionModule
from diffusion_lit.records import describe
from diffusion_lit.types import Condition, Part


class PairWeight(Part):
    """A weight of the distance by the two times that are compared."""

    @abstractmethod
    def __call__(self, process: Process, t: Tensor, r: Tensor) -> Tensor:
        """Returns weights in the shape of t and r, r < t."""


def level(process: Process, t: Tensor) -> Tensor:
    """Returns sigma / alpha."""
    alpha, sigma = process.alpha_sigma(t)
    return sigma / alpha


class Unweighted(PairWeight):
    """1. Source: Song et al. 2023, section 5."""

    def __call__(self, process: Process, t: Tensor, r: Tensor) -> Tensor:
        return torch.ones_like(t)


class InverseGap(PairWeight):
    """1 / (s_t - s_r), with s = sigma / alpha. Source: Song & Dhariwal 2024 (iCT), section 3.1."""

    def __call__(self, process: Process, t: Tensor, r: Tensor) -> Tensor:
        return 1 / (level(process, t) - level(process, r))


class InverseOutput(PairWeight):
    """1 / c_out(t)^2 = 1 / s^2 + 1 / d^2, of EDM's preconditioning.

    Args:
        sigma_data: Standard deviation d of the data, above 0.

    Source: Geng et al. 2025 (ECT), code.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not sigma_data > 0:
            raise ValueError(f"weight.sigma_data={sigma_data} must be above 0; 0.5 is usual for images")
        self.sigma_data = sigma_data

    def __call__(self, process: Process, t: Tensor, r: Tensor) -> Tensor:
        return level(process, t) ** -2 + self.sigma_data**-2


class ConsistencyTraining(Objective):
    """Compares predictions at two times of one trajectory, the earlier one without gradient; trained from data alone.

        w(t, r) d(f(x_t, t), f_target(x_r, r)),    x_t and x_r with the same noise; where r = 0 the target is x_0

    Both predictions have the same dropout mask. The defaults are those of improved training (iCT).

    Args:
        pairs: The times t and r; by default iCT's, `Neighbors(Doubling(), noise=LogNormal(-1.1, 2.0))`.
        distance: d.
        weight: w.
        decay: mu of the target's average; 0: the target is the network itself. With a `Curriculum` it is what its
            `decay` makes of mu.

    Raises:
        ValueError: If `decay` lies outside [0, 1).

    Sources: Song et al. 2023, algorithm 3; Song & Dhariwal 2024 (iCT).
    """

    def __init__(
        self,
        pairs: Pairs | None = None,
        distance: Distance = PseudoHuber(),
        weight: PairWeight = InverseGap(),
        decay: float = 0.0,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"objective.decay={decay} must lie in [0, 1); 0 is for a target without average")
        if pairs is None:
            pairs = Neighbors(Doubling(), noise=LogNormal(-1.1, 2.0))
        # Of its own: it counts the steps of this run.
        self.times: Pairs = copy.deepcopy(pairs)
        self.distance = distance
        self.weight = weight
        self.decay = decay
        self._target: Frozen | None = None
        self._restored: dict[str, Tensor] = {}

    def check(self, process: Process) -> None:
        self.times.check(process)

    def begin(self, denoiser: Denoiser) -> None:
        self.distance.load()

    def losses_at(self, denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        process = denoiser.process
        r = self.times.before(t, process)
        x_t = process.perturb(x0, eps, t)
        require_one_mask(denoiser)
        with same_draws(x0.device):
            predicted = denoiser(x_t, t, condition).x0
        # After the prediction: its weights, cast for autocast and remembered there, need gradients.
        with torch.no_grad():
            later = torch.where(r > 0, r, t)
            x_r = self.earlier(x0, eps, x_t, t, later, process, condition)
            target = self.target(denoiser)(x_r, later, condition).x0
            target = torch.where((r > 0).reshape(-1, *[1] * (x0.ndim - 1)), target, x0)
        return self.weight(process, t, r).to(x0.dtype) * self.distance(predicted, target)

    def earlier(
        self, x0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor, r: Tensor, process: Process, condition: Condition
    ) -> Tensor:
        """Returns the point of x_t's trajectory at r, (B, ...)."""
        return process.perturb(x0, eps, r)

    def target(self, denoiser: Denoiser) -> nn.Module:
        """Returns the denoiser whose predictions are the target, in the mode of the one that is trained."""
        if self.decay == 0:
            return denoiser
        if self._target is None:
            # Validation may be the first to ask; what it makes cannot be changed in place later.
            with torch.inference_mode(False):
                network = copy.deepcopy(denoiser.network)
                self._target = Frozen(Denoiser(network, denoiser.parameterization, denoiser.process))
            self._restore()
        if self._target.network.training != denoiser.training:
            self._target.network.train(denoiser.training)
        return self._target

    @torch.no_grad()
    def stepped(self, step: int, denoiser: Denoiser, seen: Seen, gather: GatherFn) -> None:
        """Moves the target's average, and goes on to the next step of the curriculum."""
        if self.decay > 0:
            self.target(denoiser)
            new = [p.detach() for p in denoiser.network.parameters()]
            torch._foreach_lerp_([*self._parameters().values()], new, 1 - self.times.decay(self.decay))
        self.times.step += 1

    def trained(self, steps: int) -> None:
        self.times.step = steps

    def _parameters(self) -> dict[str, Tensor]:
        """Parameters of the target's average, by name; those of a checkpoint as long as there is no target."""
        if self._target is None:
            return self._restored
        network: nn.Module = self._target.network.get_submodule("network")
        return {name: p.detach() for name, p in network.named_parameters()}

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "step": torch.tensor(self.times.step),
            **{f"target.{name}": p for name, p in self._parameters().items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.times.step = int(state.get("step", torch.tensor(0)))
        self._restored = {n.removeprefix("target."): p for n, p in state.items() if n.startswith("target.")}
        if self._target is not None:
            self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        for name, p in self._parameters().items():
            if name in self._restored:
                p.copy_(self._restored[name])
        self._restored = {}


class ConsistencyDistillation(ConsistencyTraining):
    """Consistency with a diffusion model: x_r is where one step of Heun's method takes x_t, by a trained teacher.

    Start from the teacher's weights with `--init_from`.

    Args:
        teacher: Checkpoint of a `DiffusionModule` with the same process, images and classes; it may have any
            parameterization. Only training needs the file; without it the loss of a trained model is that of training
            from data, and a warning says so.
        pairs: The times t and r, r > 0.
        distance: d.
        weight: w.
        decay: mu of the target's average; 0: the target is the network itself.

    Raises:
        ValueError: If `decay` lies outside [0, 1); when training begins, if the teacher does not fit.

    Source: Song et al. 2023, algorithm 2.
    """

    def __init__(
        self,
        teacher: str,
        pairs: Pairs = Neighbors(),
        distance: Distance = Squared(),
        weight: PairWeight = Unweighted(),
        decay: float = 0.0,
    ) -> None:
        super().__init__(pairs, distance, weight, decay)
        self.teacher = teacher
        self._teacher: Frozen | None = None
        self._device: torch.device | None = None
        self._absent = False

    def begin(self, denoiser: Denoiser) -> None:
        super().begin(denoiser)
        if self._teacher is None:
            teacher = self.load_teacher()
            check_teacher(teacher, denoiser)
            self._teacher = Frozen(teacher)

    def _begin_or_warn(self, denoiser: Denoiser) -> None:
        try:
            self.begin(denoiser)
        except FileNotFoundError as error:
            if denoiser.training:
                raise
            self._absent = True
            rank_zero_warn(f"{error}; without it the loss is that of training from data")

    def load_teacher(self) -> Denoiser:
        """Returns the teacher, with its averaged weights."""
        path = Path(self.teacher).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"objective.teacher={self.teacher}: there is no such file; train a teacher first, or give another by "
                "--model.objective.teacher"
            )
        return load_model(path, DiffusionModule).denoiser

    def losses_at(self, denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self._teacher is None and not self._absent:
            self._begin_or_warn(denoiser)
        return super().losses_at(denoiser, x0, eps, t, condition)

    def earlier(
        self, x0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor, r: Tensor, process: Process, condition: Condition
    ) -> Tensor:
        teacher = self._teacher
        if teacher is None:
            return super().earlier(x0, eps, x_t, t, r, process, condition)
        if self._device != x_t.device:
            teacher.to(x_t.device)
            self._device = x_t.device
        return heun_step(lambda x, time: teacher(x, time, condition), x_t, process, t, r)[0]


def check_teacher(teacher: Denoiser, denoiser: Denoiser) -> None:
    """Raises ValueError if a teacher has other images, classes or noise levels than the denoiser."""
    for name, what in (("image_size", "images"), ("in_channels", "channels")):
        ours, theirs = getattr(denoiser.network, name, None), getattr(teacher.network, name, None)
        if ours != theirs and None not in (ours, theirs):
            raise ValueError(
                f"objective.teacher was trained for {what} of {name}={theirs}, the model has {name}={ours}; "
                f"set --model.network.{name} {theirs}"
            )
    if num_classes_of(teacher.network) not in (None, num_classes_of(denoiser.network)):
        raise ValueError(
            f"objective.teacher has num_classes={num_classes_of(teacher.network)}, the model has "
            f"num_classes={num_classes_of(denoiser.network)}; make them agree"
        )
    if not same_process(teacher.process, denoiser.process):
        theirs, ours = (settings(describe(d.process)) for d in (teacher, denoiser))
        raise ValueError(
            f"objective.teacher was trained on another process, {theirs}, than the model's, {ours}; "
            "set --model.process and its options to the teacher's"
        )


def settings(described: Any) -> str:
    """A described part in one line, such as VarianceExploding(sigma_max=80.0, sigma_min=0.002)."""
    rest = ", ".join(f"{name}={value}" for name, value in described.items() if name != "class")
    return f"{described['class']}({rest})"


def same_draws(device: torch.device) -> AbstractContextManager[None]:
    """A context after which the generators of the host and of a device are rewound to where they were before it."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def require_one_mask(denoiser: Denoiser) -> None:
    """Raises ValueError if the two predictions cannot have the same dropout mask."""
    if denoiser.run is None or not denoiser.training:
        return
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in denoiser.network.modules()):
        raise ValueError(
            "trainer.compile: a compiled network draws other dropout masks with and without gradients, and both sides "
            "of a consistency loss need the same; set --model.network.dropout 0, or --trainer.compile null"
        )
