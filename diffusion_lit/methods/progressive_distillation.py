"""Progressive distillation: a student learns to do in one DDIM step what its teacher does in two, again and again.

    fit -c configs/progressive_cifar10.yaml --model.objective.teacher TEACHER

One run goes through all stages: after each, the student becomes the teacher and the number of steps N is halved.
Source: Salimans & Ho 2022, "Progressive distillation for fast sampling of diffusion models", algorithm 2.
"""

import copy
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffusion_lit.checkpoint import load_model
from diffusion_lit.diffusion import Denoiser, EvenTimes, Objective, Process, Seen, TruncatedSNR, Weighting
from diffusion_lit.diffusion.objective import GatherFn
from diffusion_lit.diffusion.process import expand
from diffusion_lit.frozen import Frozen
from diffusion_lit.module import DiffusionModule
from diffusion_lit.records import describe
from diffusion_lit.types import Condition, DenoiseFn


def stage_at(stages: Sequence[int], step: int) -> int:
    """Returns which stage, from 0, the training step after `step` steps belongs to; the last one does not end."""
    return min(sum(step >= end for end in accumulate(stages)), len(stages) - 1)


def check_stages(stages: Sequence[int]) -> list[int]:
    """Returns the lengths of the stages as a list; raises ValueError if there is none, or one below 1."""
    if not stages or min(stages) < 1:
        raise ValueError(
            f"stages={list(stages)} must hold the number of training steps of each stage, at least 1; the paper has "
            "13 stages, of 50000 steps and, for students of 2 and 1 steps, 100000"
        )
    return list(stages)


class LinearByStage(LambdaLR):
    """Lets the learning rate fall linearly to 0 in every stage, and start at its full value in the next.

    Args:
        optimizer: Whose learning rate it is.
        stages: Training steps of each stage, those of the objective.

    Raises:
        ValueError: If there is no stage, or one without steps.

    Source: Salimans & Ho 2022, appendix C.
    """

    def __init__(self, optimizer: Optimizer, stages: Sequence[int]) -> None:
        lengths = check_stages(stages)
        starts = [0, *accumulate(lengths)]

        def factor(step: int) -> float:
            stage = stage_at(lengths, step)
            return max(0.0, 1 - (step - starts[stage]) / lengths[stage])

        super().__init__(optimizer, factor)
        self.stages = list(lengths)


def two_steps(denoise: DenoiseFn, x_t: Tensor, process: Process, t: Tensor, middle: Tensor, s: Tensor) -> Tensor:
    """Returns the x_0 from which one DDIM step from t to s goes where the two of the teacher, by `middle`, go.

    With x_m the teacher's state at `middle`, and x_0(t) and x_0(m) its predictions, it is their mean with the weights
    (sigma_s / sigma_m) (alpha_m - sigma_m alpha_t / sigma_t) and alpha_s - sigma_s alpha_m / sigma_m: the target of
    the paper, (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t), without its cancellations.
    At s = 0 it is the second prediction.

    Args:
        denoise: The teacher.
        x_t: (B, ...).
        process: The forward process.
        t: Times of x_t, (B,).
        middle: Times below t, (B,).
        s: Times below `middle`, (B,), 0 included.

    Source: Salimans & Ho 2022, algorithm 2 and appendix G.
    """
    (alpha_t, sigma_t), (alpha_m, sigma_m), (alpha_s, sigma_s) = map(process.alpha_sigma, (t, middle, s))
    first = denoise(x_t, t).x0
    step = alpha_m - sigma_m / sigma_t * alpha_t
    x_m = expand(sigma_m / sigma_t, x_t) * x_t + expand(step, x_t) * first
    second = denoise(x_m, middle).x0
    weight_first, weight_second = sigma_s / sigma_m * step, alpha_s - sigma_s / sigma_m * alpha_m
    total = weight_first + weight_second
    return expand(weight_first / total, x_t) * first + expand(weight_second / total, x_t) * second


class ProgressiveDistillation(Objective):
    """The weighted squared error between the student's x_0 and that of two DDIM steps of its teacher.

    In stage j of S, j from 0, the student takes N = last_steps 2^(S - 1 - j) steps, and the teacher 2 N. The student
    starts from the teacher's weights. A checkpoint carries the teacher's weights and N, so that a run continues in any
    stage, without the file of its first teacher.

    Without a teacher, which is in `test`, the error is that of clean data, at the times of the student.

    Args:
        teacher: Checkpoint of the first teacher, a `DiffusionModule` with the process, the parameterization and the
            shapes of the student; its averaged weights are used.
        stages: Training steps of each stage.
        last_steps: Steps N of the last student.
        weighting: Weight w(t), as for `DenoisingLoss`: the error of x_0 has the weight w(t) SNR(t). `TruncatedSNR` and
            `Velocity` are the paper's.

    Raises:
        ValueError: If there is no stage, one without steps, or last_steps < 1.

    Source: Salimans & Ho 2022, algorithm 2.
    """

    only_at_start = ("teacher",)

    def __init__(
        self,
        teacher: str,
        stages: Sequence[int] = (*[50_000] * 11, 100_000, 100_000),
        last_steps: int = 1,
        weighting: Weighting = TruncatedSNR(),
    ) -> None:
        if last_steps < 1:
            raise ValueError(f"objective.last_steps={last_steps} must be at least 1")
        self.path = teacher
        self.stages = check_stages(stages)
        self.last_steps = last_steps
        self.weighting = weighting
        self._weights: dict[str, Tensor] = {}
        self._teacher: Denoiser | None = None
        self._set_steps(last_steps)

    def _steps_in(self, stage: int) -> int:
        """N of a stage."""
        return self.last_steps * int(2 ** (len(self.stages) - 1 - stage))

    def _set_steps(self, steps: int) -> None:
        self.steps = steps
        self.times = EvenTimes(steps)

    def check(self, process: Process) -> None:
        """Raises ValueError if the process has not the times of the first teacher."""
        first = 2 * self._steps_in(0)
        if process.num_steps is None and first * process.first_time > 1:
            raise ValueError(
                f"objective: the first teacher takes {first} steps, but the first time of the process is "
                f"{process.first_time:g}; give fewer objective.stages"
            )
        if process.num_steps is not None and process.num_steps % first:
            raise ValueError(
                f"objective: the first teacher takes {first} steps, which does not divide the {process.num_steps} of "
                f"the process; give objective.stages and last_steps so that last_steps 2^(number of stages) does"
            )

    def start(self, denoiser: Denoiser) -> None:
        """Gives the student the weights of the first teacher.

        Raises:
            FileNotFoundError: If the teacher's checkpoint does not exist.
            ValueError: If the teacher has another process, parameterization or shapes than the student.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"objective.teacher={self.path}: there is no such file; train a teacher, and give its checkpoint by "
                "--model.objective.teacher"
            )
        teacher = load_model(path, DiffusionModule).denoiser
        for name in ("process", "parameterization"):
            given, own = (describe(getattr(d, name)) for d in (teacher, denoiser))
            if given != own:
                raise ValueError(
                    f"objective.teacher={self.path} was trained with the {name} {given}, and the student has {own}; "
                    f"set --model.{name} to the teacher's"
                )
        given, own = ({n: tuple(v.shape) for n, v in d.network.state_dict().items()} for d in (teacher, denoiser))
        different = sorted(n for n in given.keys() | own.keys() if given.get(n) != own.get(n))
        if different:
            n = different[0]
            raise ValueError(
                f"objective.teacher={self.path} has another network: {len(different)} tensors differ, first {n}: "
                f"{given.get(n, 'missing')}, and {own.get(n, 'missing')} in the student; give the student the "
                "network options of its teacher"
            )
        denoiser.network.load_state_dict(teacher.network.state_dict())
        self._promote(denoiser, 0)

    def _promote(self, denoiser: Denoiser, stage: int) -> None:
        """Makes the student, as it is, the teacher of a stage."""
        self._weights = {n: v.detach().clone() for n, v in denoiser.network.state_dict().items()}
        self._teacher = None
        self._set_steps(self._steps_in(stage))

    def _teacher_of(self, denoiser: Denoiser) -> Denoiser:
        """The teacher, on the student's device; made at the first use of its weights."""
        if self._teacher is None:
            network = Frozen(copy.deepcopy(denoiser.network))
            network.network.load_state_dict(self._weights)
            self._weights = dict(network.network.state_dict())
            self._teacher = Denoiser(network, denoiser.parameterization, denoiser.process)
        return self._teacher

    def losses_at(self, denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        process = denoiser.process
        x_t = process.perturb(x0, eps, t)
        if self._weights:
            teacher = self._teacher_of(denoiser)
            middle, s = t - 0.5 / self.steps, (t - 1 / self.steps).clamp(min=0)
            with torch.no_grad():
                target = two_steps(teacher.bind(condition), x_t, process, t, middle, s)
        elif denoiser.training and torch.is_grad_enabled():
            raise RuntimeError("the student has no teacher: train it by diffusion_lit.trainer.Trainer, which loads one")
        else:
            target = x0
        weight = self.weighting(process, t) * process.log_snr(t).exp()
        error: Tensor = (target - denoiser(x_t, t, condition).x0).square().flatten(1).mean(1)
        return weight.to(x0.dtype) * error

    def trained(self, steps: int) -> None:
        self._set_steps(self._steps_in(stage_at(self.stages, max(steps - 1, 0))))

    def stepped(self, step: int, denoiser: Denoiser, seen: Seen, gather: GatherFn) -> None:
        """Makes the student the next teacher at the end of a stage.

        Raises:
            ValueError: If the options of a run that continues have another student at this step than the run.
        """
        steps = self._steps_in(stage_at(self.stages, step - 1))
        if steps != self.steps:
            raise ValueError(
                f"objective.stages={self.stages} and last_steps={self.last_steps} have a student of {steps} steps at "
                f"step {step} of the training, and the run has one of {self.steps}; change only the lengths of stages "
                "that are still to come"
            )
        stage = stage_at(self.stages, step)
        if self._steps_in(stage) != self.steps:
            self._promote(denoiser, stage)

    def state_dict(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self.steps), **{f"teacher.{n}": v for n, v in self._weights.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if "steps" in state:
            self._set_steps(int(state["steps"]))
            prefix = "teacher."
            self._weights = {n.removeprefix(prefix): v.clone() for n, v in state.items() if n.startswith(prefix)}
            self._teacher = None
