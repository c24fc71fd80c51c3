"""Which weights a module holds, and what its checkpoints hold."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from diffusion_lit.averaging import WeightAverages
from diffusion_lit.checkpoint import AVERAGED, RAW, choose_weights
from diffusion_lit.data.fitting import check_same_classes
from diffusion_lit.lightning import attached_trainer, rewind_to_step
from diffusion_lit.recorded import NotRecorded, configuration_of
from diffusion_lit.types import Part
from diffusion_lit.upgrade import FORMAT

SEED = "seed_everything"
"""The section that holds the seed of a run."""


@dataclass(frozen=True)
class Loaded:
    """Where the weights of a system are from.

    Attributes:
        path: The checkpoint; None if it is not known.
        step: Training steps behind the weights; None if it is not known.
        weights: "raw", or the decay of the average, as a string.
    """

    path: Path | None
    step: int | None
    weights: str


class Weighted(L.LightningModule, Part):
    """A LightningModule whose weights may be averaged, and whose checkpoints hold raw and averaged weights.

    Attributes:
        averages: Averages of the weights, set by the `ema` section; None: there are none.
        config: The resolved configuration that checkpoints carry, set by the command line; empty: they carry what is
            `recorded` of the module's parts.
        loaded: Where the weights are from; None: they were not loaded, or are being trained.
        skipped_steps: Steps that were skipped so far.
        skipped_in_a_row: Steps that were skipped since the last one that was not.
        class_names: Names of the classes that the module was trained on, in their order; None: they are not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.averages: WeightAverages | None = None
        self.config: dict[str, Any] = {}
        self.loaded: Loaded | None = None
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.class_names: list[str] | None = None
        self._notes: list[str] = []

    def averaged_weights(self, name: str | None = None) -> AbstractContextManager[None]:
        """A context in which the module holds averaged weights, where there are any.

        Every callback that looks at the model uses it. It may be entered again while the same average is active.

        Args:
            name: Which average, as `str(decay)`, or "raw"; None: the primary one.

        Raises:
            ValueError: If there is no such average.
            RuntimeError: If another average is active.
        """
        if self.averages is None or name == RAW:
            return nullcontext()
        if name in (None, AVERAGED):
            name = self.averages.primary
        if name == self.averages.active:
            return nullcontext()
        if name not in map(str, self.averages.decays):
            raise ValueError(f"weights={name!r} are not averaged; there are {[str(d) for d in self.averages.decays]}")
        return self.averages.swapped(self, name)

    @contextmanager
    def only_weights(self, name: str) -> Iterator[None]:
        """A context in which the module holds one set of weights and `averaged_weights` changes nothing.

        Args:
            name: "averaged", "raw", or the decay of an average.

        Raises:
            ValueError: If the module does not have these weights.
        """
        if self.averages is None and name not in (AVERAGED, self.weights_name):
            raise ValueError(f"weights={name!r}: the model has only {self.weights_name!r}")
        averages, loaded = self.averages, self.loaded
        with self.averaged_weights(name):
            if averages is not None:
                self.averages, self.loaded = None, Loaded(None, None, averages.active or RAW)
            try:
                yield
            finally:
                self.averages, self.loaded = averages, loaded

    @property
    def weights_name(self) -> str:
        """Which weights the module holds: "raw", or the decay of an average, as a string."""
        if self.averages is not None:
            return self.averages.active or RAW
        return RAW if self.loaded is None else self.loaded.weights

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, no gradients and the trainer's precision; the modes are restored afterwards."""
        modes = [(m, m.training) for m in self.modules()]
        trainer = attached_trainer(self)
        precision = nullcontext() if trainer is None else trainer.precision_plugin.forward_context()
        self.eval()
        try:
            with torch.no_grad(), precision:
                yield
        finally:
            for m, training in modes:
                m.training = training

    def load(self, checkpoint: Mapping[str, Any], weights: str = AVERAGED, path: Path | str | None = None) -> None:
        """Takes over the weights of a checkpoint, to sample from or to score.

        Args:
            checkpoint: From `read_checkpoint`.
            weights: "averaged", "raw", or the decay of an average.
            path: Where the checkpoint is from, for records.

        Raises:
            ValueError: If its tensors are not those of this module, a weight is not finite, or it lacks these weights.
        """
        state = choose_weights(checkpoint, weights)
        self._check_fits(state, checkpoint)
        self.averages = None
        self.load_state_dict(state)
        self.class_names = checkpoint.get("class_names")
        name = checkpoint.get("weights", RAW) if weights == AVERAGED else weights
        self.loaded = Loaded(None if path is None else Path(path), checkpoint.get("global_step"), name)

    def initialize(self, checkpoint: Mapping[str, Any], weights: str = AVERAGED) -> list[str]:
        """Takes over the weights of a checkpoint as the start of another run.

        An embedding for another number of entries, such as classes, keeps its random start.

        Args:
            checkpoint: The content of the checkpoint.
            weights: Which of its weights; see `choose_weights`.

        Returns:
            The names of the tensors that keep their random start.

        Raises:
            ValueError: If the tensors are not those of this module, or a weight is not finite.
        """
        own, given = self.state_dict(), choose_weights(checkpoint, weights)
        embeddings = {
            f"{name}.weight" for name, module in self.named_modules() if isinstance(module, torch.nn.Embedding)
        }
        fresh = [n for n in embeddings & own.keys() if n not in given or given[n].shape != own[n].shape]
        state = {name: tensor for name, tensor in given.items() if name not in fresh} | {n: own[n] for n in fresh}
        self._check_fits(state, checkpoint)
        self.load_state_dict(state)
        return sorted(fresh)

    def recorded(self) -> dict[str, Any]:
        """The configuration of a module that Python put together, and of its data, as the command line would have it.

        What of it is not recorded is said once. Data of other packages are left out.
        """
        notes: list[str] = []
        config: dict[str, Any] = {}
        trainer = attached_trainer(self)
        for name, part in (("model", self), ("data", getattr(trainer, "datamodule", None))):
            left_out: list[str] = []
            try:
                if isinstance(part, Part):
                    config[name] = configuration_of(part, name, left_out)
                    # The command line sets seeds from its own.
                    seed = config[name]["init_args"].pop("seed", 0)
                    config.setdefault(SEED, seed if 0 <= seed < 2**32 else 0)
            except NotRecorded as error:
                notes.append(f"checkpoints carry no configuration of the {name} ({error})")
            notes += [f"{key} is a function: it is not recorded, and its default is used instead" for key in left_out]
        for note in notes:
            if note not in self._notes:
                rank_zero_info(note)
        self._notes = notes
        return config

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """`state_dict` becomes the primary average, which is what a reader of weights wants.

        The raw weights, from which training continues, and further averages are stored beside it.
        """
        checkpoint["format"] = FORMAT
        checkpoint["config"] = self.config or self.recorded()
        checkpoint["class_names"] = self.class_names
        checkpoint["weights"] = RAW if self.averages is None else self.averages.primary
        training = "optimizer_states" in checkpoint
        if training:
            checkpoint["skipped_steps"] = [self.skipped_steps, self.skipped_in_a_row]
        if self.averages is None:
            return
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **self.averages.average()}
        if training:
            checkpoint["current_model_state"] = self.averages.raw(self)
            checkpoint["averages"] = self.averages.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Training continues from the raw weights; a plain Lightning trainer evaluates the primary average.

        Raises:
            ValueError: If the checkpoint's tensors are not those of this module, or a weight is not finite.
        """
        self._check_fits(checkpoint["state_dict"], checkpoint)
        trained = checkpoint.get("class_names") or self.class_names
        self.class_names = None if trained is None else check_same_classes(self.class_names or trained, trained)
        trainer = attached_trainer(self)
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            self.averages = None
            self.loaded = Loaded(None, checkpoint.get("global_step"), checkpoint.get("weights", RAW))
            return
        self.loaded = None
        rewind_to_step(checkpoint, trainer.accumulate_grad_batches)
        self.skipped_steps, self.skipped_in_a_row = checkpoint.get("skipped_steps", (0, 0))
        if "averages" in checkpoint:
            primary = checkpoint["state_dict"]
            # The `ema` section makes the averages from these.
            checkpoint["averages"] = {**checkpoint["averages"], "primary": primary}
            checkpoint["state_dict"] = {**primary, **checkpoint["current_model_state"]}
            self._check_fits(checkpoint["state_dict"], checkpoint)
        for name in ("optimizer_states", "averages", "objective"):
            _require_finite(checkpoint.get(name), name)

    def _check_fits(self, state: Mapping[str, Tensor], checkpoint: Mapping[str, Any]) -> None:
        own = {name: _shape(name, value) for name, value in self.state_dict().items()}
        shapes = {name: _shape(name, value) for name, value in state.items()}
        wrong = sorted(name for name in own.keys() | shapes.keys() if own.get(name) != shapes.get(name))
        if wrong:
            name = wrong[0]
            kind = str((checkpoint.get("config") or {}).get("model", {}).get("class_path", "")).rpartition(".")[2]
            if kind not in ("", type(self).__name__):
                raise ValueError(
                    f"the checkpoint is of {kind} and not of {type(self).__name__}, the model that was asked for; give "
                    "another checkpoint"
                )
            raise ValueError(
                f"the checkpoint is of another architecture: {len(wrong)} of {len(own)} tensors differ, first {name}: "
                f"{shapes.get(name, 'missing')} in the checkpoint, {own.get(name, 'missing')} in this model; "
                "give the options that the model was trained with"
            )
        broken = [name for name, _ in self.named_parameters() if not bool(state[name].isfinite().all())]
        if broken:
            raise ValueError(
                f"{len(broken)} weights of the checkpoint are not finite, first {broken[0]}: training had diverged "
                "before it was written; take an earlier checkpoint"
            )


def _require_finite(value: Any, key: str) -> None:
    """Raises ValueError if a number in what training continues from is not finite."""
    if isinstance(value, Mapping | list):
        for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            _require_finite(inner, f"{key}.{name}")
    elif isinstance(value, Tensor | float) and not bool(torch.as_tensor(value).isfinite().all()):
        raise ValueError(
            f"the checkpoint's {key} is not finite: training had diverged before it was written; take an earlier "
            "checkpoint"
        )


def _shape(name: str, value: Tensor) -> tuple[int, ...]:
    """The shape of a tensor; () for what a module keeps in a form of its own, such as a vocabulary, of any size."""
    return () if name.endswith(_EXTRA_STATE_KEY_SUFFIX) else tuple(value.shape)
