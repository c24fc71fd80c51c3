"""Options that differ from those of the checkpoint that a run continues from: the new ones win, and are printed.

A checkpoint holds the settings of its optimisers and the state of its learning-rate schedules, which would replace
those of the configuration. Where the configuration has changed, the checkpoint is edited before it is restored: what
its optimisers have learned stays, and a schedule stands where the new configuration has it after as many steps.
"""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from diffusion_lit.optimization import TORCH_ERRORS, HeldCosine, named_errors, schedule_key, schedules
from diffusion_lit.parts import import_part, path_of

DESCRIBED = "optimization"
"""The entry of a checkpoint that says how its optimisers and schedules were made."""
TRAINER = "trainer_options"
"""The entry of a checkpoint that holds those options of its trainer that change results."""
_MOVING = (
    *("base_lrs", "last_epoch", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step", "verbose"),
    *("_batch_size", "_images_before", "_steps_before"),
)
"""What schedules hold besides their arguments, or what follows from the optimiser's."""
_KERNELS = ("foreach", "fused", "capturable", "differentiable")
"""How an optimiser computes, not what."""


class ChangedOptions(L.Callback):
    """Lets changed options win when a run continues, and prints each: its key, the old value and the new one.

    Raises:
        ValueError: When training starts, if a checkpoint cannot continue with the optimiser or schedule that the
            configuration asks for.
    """

    def __init__(self) -> None:
        self._checkpoint: dict[str, Any] | None = None
        self._described: list[dict[str, Any]] = []

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._checkpoint = checkpoint

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Optimisers and schedules are made, and their state is not restored yet.
        checkpoint, self._checkpoint = self._checkpoint, None
        made = _made(trainer)
        self._described = [described(optimizer, scheduler) for optimizer, scheduler in made]
        if checkpoint is None:
            return
        old, new = checkpoint.get("config"), getattr(pl_module, "config", None)
        if old and new:
            require_kept(old, new, "")
        changes = list(differences(old, new, "")) if old and new else []
        if TRAINER in checkpoint:
            changes += differences(checkpoint[TRAINER], options_of(trainer), "trainer")
        keys = optimizer_keys(pl_module, len(made))
        before = checkpoint.get(DESCRIBED) or inferred(checkpoint, self._described, keys)
        if len(before) == len(made):
            ours = tuple(f"model.{name}" for key in keys for name in (key, schedule_key(key)))
            changes = [change for change in changes if not change[0].startswith(ours)]
            changes += edit(checkpoint, made, before, self._described, keys)
        for key, was, now in changes:
            rank_zero_info(f"{key}: {was} -> {now}, from step {checkpoint['global_step'] + 1} on")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keys = optimizer_keys(pl_module, len(trainer.optimizers))
        for key, (_, scheduler) in zip(keys, _made(trainer), strict=True):
            if isinstance(scheduler, OneCycleLR) and not 0 <= trainer.max_steps <= scheduler.total_steps:
                raise ValueError(
                    f"model.{schedule_key(key)}: OneCycleLR ends after {scheduler.total_steps} steps, and the run "
                    f"does not with trainer.max_steps={trainer.max_steps}; make them agree"
                )
            for inner in schedules(scheduler):
                if isinstance(inner, HeldCosine) and 0 <= inner.T_max < trainer.max_steps:
                    rank_zero_info(
                        f"model.{schedule_key(key)}.T_max={inner.T_max}: from that step to "
                        f"trainer.max_steps={trainer.max_steps} the learning rate stays at eta_min={inner.eta_min}"
                    )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if "optimizer_states" in checkpoint:
            checkpoint[DESCRIBED] = copy.deepcopy(self._described)
            checkpoint[TRAINER] = options_of(trainer)


def options_of(trainer: L.Trainer) -> dict[str, Any]:
    """The options of a trainer that change results."""
    return {
        "precision": str(trainer.precision),
        "gradient_clip_val": getattr(trainer, "clip_norm", trainer.gradient_clip_val),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
    }


def inferred(
    checkpoint: Mapping[str, Any], now: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """How the optimisers of a checkpoint were made that does not say so, by its configuration and by what they hold.

    Args:
        checkpoint: Of an older version of this package, or of a plain trainer.
        now: How the new ones were made; their classes stand for those that are not known.
        keys: The arguments that made the optimisers.

    Returns:
        As `described`, for each optimiser of the checkpoint.
    """
    model = (checkpoint.get("config") or {}).get("model") or {}
    arguments_of = {n: part for n, part in (model.get("init_args") or {}).items() if isinstance(part, Mapping)}
    parts = {name: part.get("class_path") for name, part in arguments_of.items()}
    found, left = [], list(checkpoint["lr_schedulers"])
    for new, state, key in zip(now, checkpoint["optimizer_states"], keys, strict=False):
        group = {name: plain(value) for name, value in state["param_groups"][0].items()}
        group["lr"] = group.get("initial_lr", group.get("lr"))
        options = {name: group.get(name, value) for name, value in new["options"].items()}
        # Schedules mark the groups of their optimiser.
        schedule = plain(left.pop(0)) if "initial_lr" in group and left else None
        is_alike = schedule is not None and schedule.keys() == new["schedule"].keys()
        kind = parts.get(schedule_key(key)) or (new["lr_scheduler"] if is_alike else "another schedule")
        found.append({
            "optimizer": parts.get(key) or new["optimizer"],
            "options": options,
            "lr_scheduler": None if schedule is None else kind,
            "schedule": {} if schedule is None else {k: schedule.get(k, v) for k, v in new["schedule"].items()},
        })  # fmt: skip
    return found


def require_kept(old: Any, new: Any, key: str) -> None:
    """Raises ValueError if an option was changed that only the beginning of a run reads."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping) or old.get("class_path") != new.get("class_path"):
        return
    fixed = getattr(import_part(new["class_path"]), "only_at_start", ()) if "class_path" in new else ()
    for name in old.keys() & new.keys():
        if name == "init_args":
            for option in sorted(set(fixed) & set(old[name] or ()) & set(new[name] or ())):
                was, now = old[name][option], new[name][option]
                if was != now:
                    raise ValueError(
                        f"{key}.{option}: {_text(was)} -> {_text(now)}: only the beginning of a run reads it; leave it "
                        "as it was, or start a new run in another --trainer.default_root_dir"
                    )
        require_kept(old[name], new[name], key if name == "init_args" else f"{key}.{name}" if key else str(name))


def edit(
    checkpoint: dict[str, Any],
    made: Sequence[tuple[Optimizer, Any]],
    before: Sequence[Mapping[str, Any]],
    now: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
) -> list[tuple[str, str, str]]:
    """Gives a checkpoint the settings of new optimisers and schedules where they differ from its own, in place.

    Args:
        checkpoint: Not yet restored.
        made: The new optimisers, each with its schedule or None.
        before: How the checkpoint's were made.
        now: How the new ones were made.
        keys: The arguments that made the optimisers.

    Returns:
        The options that differ: key, old value, new value.

    Raises:
        ValueError: If the checkpoint cannot continue so.
    """
    changes: list[tuple[str, str, str]] = []
    left, states = list(checkpoint["lr_schedulers"]), []
    for i, (optimizer, scheduler) in enumerate(made):
        state = left.pop(0) if before[i]["lr_scheduler"] is not None else None
        if now[i] != before[i]:
            changes += changed_options(before[i], now[i], keys[i])
            _require_same_class(before[i], now[i], keys[i])
            if scheduler is not None:
                if any(before[i][name] != now[i][name] for name in ("lr_scheduler", "schedule")):
                    _require_steps_left(scheduler, checkpoint["global_step"], schedule_key(keys[i]))
                advance(scheduler, checkpoint["global_step"], schedule_key(keys[i]))
                state = scheduler.state_dict()
            checkpoint["optimizer_states"][i] = edited(checkpoint["optimizer_states"][i], optimizer)
            _require_possible(checkpoint["optimizer_states"][i], optimizer, keys[i])
        if scheduler is not None:
            states.append(state)
    checkpoint["lr_schedulers"] = states
    return changes


def _made(trainer: L.Trainer) -> list[tuple[Optimizer, Any]]:
    """The optimisers of a trainer, each with its schedule or None."""
    found = {id(config.scheduler.optimizer): config.scheduler for config in trainer.lr_scheduler_configs}
    return [(optimizer, found.get(id(optimizer))) for optimizer in trainer.optimizers]


def optimizer_keys(module: L.LightningModule, count: int) -> list[str]:
    """The arguments that make the optimisers of a module, for messages."""
    keys = list(getattr(module, "optimizer_keys", ()))
    return keys if len(keys) == count else [f"optimizer_{i}" for i in range(count)]


def described(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """How an optimiser and its schedule were made, as plain data; before their first step.

    Returns:
        "optimizer" and "lr_scheduler", import paths; "options" and "schedule", their arguments by name.
    """
    schedule = {} if scheduler is None else {k: v for k, v in scheduler.state_dict().items() if k not in _MOVING}
    kind: Any = CosineAnnealingLR if isinstance(scheduler, HeldCosine) else type(scheduler)
    return {
        "optimizer": path_of(type(optimizer)),
        "options": {name: plain(optimizer.defaults[name]) for name in arguments(optimizer)},
        "lr_scheduler": None if scheduler is None else path_of(kind),
        "schedule": plain(schedule),
    }


def arguments(optimizer: Optimizer) -> list[str]:
    """The arguments of an optimiser's class that its parameter groups hold."""
    return [name for name in inspect.signature(type(optimizer)).parameters if name in optimizer.defaults]


def plain(value: Any) -> Any:
    """Plain data of settings; what is none as its text, without an address in memory."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items() if name not in _MOVING}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> Iterator[tuple[str, str, str]]:
    """The options of an optimiser and its schedule that differ: key, old value, new value."""
    for part, inner, name in (("optimizer", "options", key), ("lr_scheduler", "schedule", schedule_key(key))):
        if before[part] != now[part]:
            yield f"model.{name}", str(before[part] or "null"), str(now[part] or "null")
        else:
            yield from differences(before[inner], now[inner], f"model.{name}")


def differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, str, str]]:
    """Where two trees of plain data differ: key, old value, new value."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("class_path") == new.get("class_path"):
        for name in {**old, **new}:
            inner = key if name == "init_args" else f"{key}.{name}" if key else str(name)
            yield from differences(old.get(name), new.get(name), inner)
    elif old != new:
        yield key, _text(old), _text(new)


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"])
    return "null" if value is None else str(value)


def _require_same_class(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> None:
    old, new = before["optimizer"], now["optimizer"]
    if old != new:
        raise ValueError(
            f"model.{key}: the checkpoint was trained by {old.rpartition('.')[2]}, from whose state "
            f"{new.rpartition('.')[2]} cannot continue; start a new run from its weights with --init_from, in another "
            "--trainer.default_root_dir"
        )


def _require_steps_left(scheduler: Any, steps: int, key: str) -> None:
    for inner in schedules(scheduler):
        if isinstance(inner, HeldCosine) and inner.T_max <= steps:
            raise ValueError(
                f"model.{key}.T_max={inner.T_max}: this schedule has ended at step {steps}, that of the checkpoint; "
                f"set --model.{key}.T_max to more than {steps}"
            )


def advance(scheduler: Any, steps: int, key: str) -> None:
    """Brings a new schedule to where it stands after so many steps; raises ValueError if it does not go so far."""
    with warnings.catch_warnings():
        # That the optimiser has made no step.
        warnings.simplefilter("ignore")
        for _ in range(steps):
            named_errors(key, scheduler.step)


def edited(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimiser in a checkpoint, with the settings of a new one, whose schedule stands at its place."""
    groups = []
    for old, new in zip(state["param_groups"], optimizer.param_groups, strict=False):
        defaults = optimizer.defaults
        # An optimiser may count in its groups; what it counts is not an argument, and stays.
        kept = {k for k in new if k in defaults and k not in arguments(optimizer) and new[k] == defaults[k]}
        fresh = {k: old.get(k, v) if k in kept else v for k, v in new.items() if k != "params"}
        groups.append({**fresh, "params": old["params"]})
    return {**state, "param_groups": groups + list(state["param_groups"][len(groups) :])}


def _require_possible(state: Mapping[str, Any], optimizer: Optimizer, key: str) -> None:
    """Raises ValueError unless an optimiser can make a step from a state that had other settings; tries it."""
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=False):
        for number, parameter in zip(group["params"], own["params"], strict=False):
            if number in state["state"]:
                _try_step(parameter, state["state"][number], group, optimizer, key)
                return


def _try_step(
    parameter: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], optimizer: Optimizer, key: str
) -> None:
    trial = torch.nn.Parameter(parameter.detach().cpu().clone())
    trial.grad = torch.zeros_like(trial)
    options = {name: group[name] for name in arguments(optimizer) if name not in _KERNELS}
    try:
        made: Any = type(optimizer)([trial], **options)
        made.state[trial] = {k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        made.step()
    except TORCH_ERRORS as error:
        raise ValueError(
            f"model.{key}: the checkpoint's state does not suffice for the changed options ({type(error).__name__}: "
            f"{error}); leave them as they were, or start a new run from its weights with --init_from, in another "
            "--trainer.default_root_dir"
        ) from error
