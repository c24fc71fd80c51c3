"""Every option and callback of Lightning has a row in docs/trainer_options.md, and does what the row says."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import callbacks as C
from lightning.pytorch.strategies import FSDPStrategy

from diffusion_lit import cli
from diffusion_lit.callbacks import EMA, Checkpoints, ProgressBar, Report, Scalars
from diffusion_lit.parts import REFUSED as REFUSED_NAMES
from diffusion_lit.trainer import Trainer
from diffusion_lit.trainer_options import CALLBACKS as CALLBACK_REASONS
from tests import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`"),
]
CUT, END = 3, 5
VALIDATED: dict[str, Any] = {"limit_val_batches": 2, "val_check_interval": 2}
REFUSED: dict[str, list[Any]] = {
    "accelerator": ["tpu", "mps", "what"],
    "strategy": ["fsdp", "deepspeed", "ddp_spawn", "ddp_fork", "ddp_notebook", "what", FSDPStrategy()],
    "precision": ["64-true", "16-true", "bf16-true"],
    "fast_dev_run": [True, 1, 3],
    "max_epochs": [0, 5],
    "min_epochs": [1],
    "max_steps": [None, -2, 0.5],
    "min_steps": [-1],
    "max_time": ["soon", "12", {"weekdays": 1}],
    "limit_train_batches": [1, 0.5],
    "limit_val_batches": [-1, 1.5],
    "limit_test_batches": [-1, 1.5],
    "limit_predict_batches": [2],
    "overfit_batches": [1, 0.5, None],
    "val_check_interval": [0, -1, 0.5, 1.0, "00:00:01:00", {"minutes": 1}],
    "check_val_every_n_epoch": [0, 1, 5],
    "log_every_n_steps": [-1],
    "enable_checkpointing": [False],
    "accumulate_grad_batches": [0, -1],
    "gradient_clip_val": [-1.0],
    "profiler": ["what", "xla"],
    "barebones": [True],
    "sync_batchnorm": [True],
    "reload_dataloaders_every_n_epochs": [1],
    "model_registry": ["name"],
    "devices": [0, -1, "what", "0", [0, 0], None],
    "num_nodes": [0],
}
"""Values that the constructor refuses."""
SAME: dict[str, dict[str, Any]] = {
    "accelerator": {"accelerator": "auto"},
    "strategy": {"strategy": "single_device"},
    "devices": {"devices": "auto"},
    "num_nodes": {"num_nodes": 1},
    "precision": {"precision": 32},
    "logger": {"logger": False},
    "callbacks": {"callbacks": [C.LambdaCallback()]},
    "max_steps": {},
    "min_steps": {"min_steps": 1},
    "max_time": {"max_time": {"hours": 1}},
    "limit_val_batches": VALIDATED,
    "limit_test_batches": {"limit_test_batches": 1},
    "val_check_interval": {"val_check_interval": 1, "limit_val_batches": 0.5},
    "num_sanity_val_steps": {"num_sanity_val_steps": 2, **VALIDATED},
    "log_every_n_steps": {"log_every_n_steps": 0},
    "enable_checkpointing": {"enable_checkpointing": True},
    "enable_progress_bar": {"enable_progress_bar": True},
    "enable_model_summary": {"enable_model_summary": True},
    "gradient_clip_algorithm": {"gradient_clip_algorithm": "norm"},
    "deterministic": {"deterministic": "warn"},
    "benchmark": {"benchmark": True},
    "inference_mode": {"inference_mode": False, **VALIDATED},
    "use_distributed_sampler": {"use_distributed_sampler": True},
    "profiler": {"profiler": "simple"},
    "detect_anomaly": {"detect_anomaly": True},
    "plugins": {"plugins": [LightningEnvironment()]},
    "sync_batchnorm": {"sync_batchnorm": False},
    "default_root_dir": {},
    "enable_autolog_hparams": {"enable_autolog_hparams": False},
}
"""Options that work and do not change what is learnt."""
OTHER: dict[str, dict[str, Any]] = {
    "accumulate_grad_batches": {"accumulate_grad_batches": 2},
    "gradient_clip_val": {"gradient_clip_val": 0.01},
    "precision": {"precision": "bf16-mixed"},
}
"""Options that work and change what is learnt."""
CALLBACKS: dict[str, Callable[[Path], list[L.Callback]]] = {
    "Callback": lambda run: [L.Callback()],
    "EarlyStopping": lambda run: [C.EarlyStopping("val/loss", patience=100)],
    "LambdaCallback": lambda run: [C.LambdaCallback()],
    "LearningRateMonitor": lambda run: [C.LearningRateMonitor()],
    "ModelCheckpoint": lambda run: [
        C.ModelCheckpoint(every_n_train_steps=2, save_top_k=-1),
        C.ModelCheckpoint(monitor="val/loss", filename="best"),
        C.ModelCheckpoint(train_time_interval=timedelta(hours=1)),
    ],
    "ModelSummary": lambda run: [C.ModelSummary()],
    "ThroughputMonitor": lambda run: [C.ThroughputMonitor(lambda batch: len(batch["image"]))],
    "Timer": lambda run: [C.Timer({"hours": 1})],
    "TQDMProgressBar": lambda run: [C.TQDMProgressBar()],
}
REFUSED_CALLBACKS: dict[str, list[Callable[[], L.Callback]]] = {
    "BackboneFinetuning": [C.BackboneFinetuning],
    "BaseFinetuning": [type("Mine", (C.BaseFinetuning,), {"__module__": "mine"})],
    "BatchSizeFinder": [C.BatchSizeFinder],
    "EMAWeightAveraging": [C.EMAWeightAveraging],
    "GradientAccumulationScheduler": [lambda: C.GradientAccumulationScheduler({0: 2})],
    "LearningRateFinder": [C.LearningRateFinder],
    "ModelCheckpoint": [lambda: C.ModelCheckpoint(save_last=True), lambda: C.ModelCheckpoint(every_n_epochs=2)],
    "ModelPruning": [lambda: C.ModelPruning("l1_unstructured", amount=0.5)],
    "OnExceptionCheckpoint": [lambda: C.OnExceptionCheckpoint(".")],
    "SpikeDetection": [C.SpikeDetection],
    "StochasticWeightAveraging": [lambda: C.StochasticWeightAveraging(1e-2)],
    "Timer": [lambda: C.Timer("00:01:00:00", interval="epoch")],
    "WeightAveraging": [C.WeightAveraging],
    "EarlyStopping": [lambda: C.EarlyStopping("val/loss")],
}


def test_a_refused_callback_is_refused_by_its_name_alone_before_its_arguments_matter(tmp_path: Path) -> None:
    """In a file too, which may name it."""
    refused = tuple(CALLBACK_REASONS)
    names = {name for name in C.__all__ if issubclass(getattr(C, name), refused)}
    assert names == set(REFUSED_NAMES)
    for name in names:
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"trainer: {{callbacks+: [{name}]}}")
        path = f"lightning.pytorch.callbacks.{name}"
        for words in (["--trainer.callbacks+", name], ["--trainer.callbacks+", path], ["-c", str(file)]):
            with pytest.raises(ValueError, match=rf"^trainer\.callbacks: {name} is not supported: .*(set|with|out)\b"):
                cli.CLI(["fit", "-c", "digits", *words])


def rows(repository: Path, title: str) -> dict[str, tuple[str, str]]:
    """A table of the document: what it says of each name, and its remark."""
    text = (repository / "docs" / "trainer_options.md").read_text()
    part = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return {m[1]: (m[2], m[3]) for m in re.finditer(r"^\| `(\w+)` \| ([\w ]+) \|(.*)\|$", part, re.MULTILINE)}


def fit(run_dir: Path, steps: Any, callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    """Trains, or continues to train, a tiny model."""
    trainer = tiny.trainer(run_dir, steps, [*callbacks, EMA([0.9]), Scalars(), Checkpoints()], **options)
    trainer.fit(tiny.module(network=tiny.network(width=8)), tiny.data(), ckpt_path="last")
    return trainer


@pytest.fixture(autouse=True)
def torch_s_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Some options set them for the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of a run without any option."""
    place = tmp_path_factory.mktemp("plain")
    fit(place, END)
    return tiny.load(tiny.last(place))


def differ(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    same = ("state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers", "global_step")
    return [name for name in same if not tiny.identical(a[name], b[name])]


def test_every_option_and_callback_of_lightning_has_a_row_and_is_tried(repository: Path) -> None:
    options, callbacks = rows(repository, "Options"), rows(repository, "Callbacks")
    assert {*options} == {*inspect.signature(L.Trainer).parameters}
    assert {*callbacks} == {*C.__all__}
    for table, refused, works in (
        (options, {*REFUSED}, {*SAME, *OTHER}),
        (callbacks, {*REFUSED_CALLBACKS}, {*CALLBACKS}),
    ):
        for name, (state, remark) in table.items():
            assert state in ("works", "refused", "in part"), name
            assert name in refused or state == "works" or name in ("callbacks", "gradient_clip_algorithm"), name
            assert name in works or state == "refused" or "not tried" in remark, name
            assert name not in works or state != "refused", name


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_refused_value_is_named_with_its_option(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=name) as refusal:
        fit(tmp_path, **{"steps": 2, **({"steps": value} if name == "max_steps" else {name: value})})
    error = refusal.value
    assert isinstance(error, ValueError) or type(error).__name__ == "MisconfigurationException"
    assert len(str(error)) < 500
    assert not list(tmp_path.rglob("*.ckpt"))


def test_options_that_work_change_nothing_together_and_continue_exactly(tmp_path: Path, plain: dict[str, Any]) -> None:
    together: dict[str, Any] = {}
    for name, options in SAME.items():
        # One of the two, of which Lightning warns.
        together |= {} if name == "benchmark" else options
    for steps in (CUT, END):
        fit(tmp_path, steps, **{**together, "logger": tiny.logger(tmp_path)})
    assert differ(plain, tiny.load(tiny.last(tmp_path))) == []


@pytest.mark.few(1)
@pytest.mark.parametrize("name", SAME)
def test_an_option_that_works_changes_nothing_and_continues_exactly(
    name: str, tmp_path: Path, plain: dict[str, Any]
) -> None:
    for steps in (CUT, END):
        fit(tmp_path, steps, **SAME[name])
    assert differ(plain, tiny.load(tiny.last(tmp_path))) == []


@pytest.mark.few(1)
@pytest.mark.parametrize("name", OTHER)
def test_an_option_that_changes_what_is_learnt_continues_exactly(
    name: str, tmp_path: Path, plain: dict[str, Any]
) -> None:
    for steps in (CUT, END):
        fit(tmp_path / "parts", steps, **OTHER[name])
    fit(tmp_path / "whole", END, **OTHER[name])
    whole = tiny.load(tiny.last(tmp_path / "whole"))
    assert differ(whole, tiny.load(tiny.last(tmp_path / "parts"))) == []
    assert differ(whole, plain) != []


@pytest.mark.parametrize(
    ("name", "make"), [(name, make) for name, makers in REFUSED_CALLBACKS.items() for make in makers]
)
def test_a_refused_callback_is_named(name: str, make: Callable[[], L.Callback], tmp_path: Path) -> None:
    callback = make()
    with pytest.raises(
        ValueError, match=rf"^trainer\.callbacks: {type(callback).__name__}[. ].*; |: {name}"
    ) as refusal:
        fit(tmp_path, 2, [callback])
    assert len(str(refusal.value)) < 400


@pytest.mark.few(1)
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_that_works_changes_nothing_and_continues_exactly(
    name: str, tmp_path: Path, plain: dict[str, Any]
) -> None:
    bar = {"enable_progress_bar": True} if name == "TQDMProgressBar" else {}
    for steps in (CUT, END):
        fit(tmp_path / "parts", steps, CALLBACKS[name](tmp_path), **VALIDATED, **bar)
    assert differ(plain, tiny.load(tiny.last(tmp_path / "parts"))) == []
    if name in ("ThroughputMonitor",):
        return
    fit(tmp_path / "whole", END, CALLBACKS[name](tmp_path), **VALIDATED, **bar)
    assert tiny.rows(tmp_path / "parts") == tiny.rows(tmp_path / "whole")


def test_early_stopping_stops_a_continued_run_where_it_stops_an_uninterrupted_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stopping() -> list[L.Callback]:
        return [C.EarlyStopping("val/loss", mode="max", patience=2), Report()]

    whole = fit(tmp_path / "whole", 50, stopping(), limit_val_batches=1, val_check_interval=2)
    for steps in (3, 5, 50):
        parts = fit(tmp_path / "parts", steps, stopping(), limit_val_batches=1, val_check_interval=2)
    assert whole.global_step == parts.global_step == 6
    said = [line for line in caplog.messages if "stopped after" in line]
    assert len(said) == 2
    assert all(line.startswith("stopped after step 6: Monitored metric val/loss did not improve") for line in said)
    assert differ(*(tiny.load(tiny.last(tmp_path / place)) for place in ("whole", "parts"))) == []


def test_a_run_whose_time_is_up_continues_exactly(tmp_path: Path, plain: dict[str, Any]) -> None:
    class Slow(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == 2:
                timer = next(c for c in trainer.callbacks if isinstance(c, C.Timer))  # type: ignore[attr-defined]
                timer._offset = 10**9

    stopped = fit(tmp_path, END, [Slow()], max_time={"hours": 1})
    assert stopped.global_step == 3
    fit(tmp_path, END)
    assert differ(plain, tiny.load(tiny.last(tmp_path))) == []


def test_a_checkpoint_of_model_checkpoint_continues_exactly(tmp_path: Path, plain: dict[str, Any]) -> None:
    fit(tmp_path / "first", END, CALLBACKS["ModelCheckpoint"](tmp_path), **VALIDATED)
    [other] = (tmp_path / "first" / "checkpoints").glob("*step=2.ckpt")
    trainer = tiny.trainer(tmp_path / "second", END)
    trainer.fit(tiny.module(network=tiny.network(width=8)), tiny.data(), ckpt_path=str(other))
    assert differ(plain, tiny.load(tiny.last(tmp_path / "second"))) == []


def test_another_progress_bar_replaces_ours(tmp_path: Path) -> None:
    bars = [ProgressBar(), C.TQDMProgressBar()]
    assert tiny.trainer(tmp_path, callbacks=bars, enable_progress_bar=True).progress_bar_callback is bars[1]
    assert tiny.trainer(tmp_path, callbacks=bars[:1], enable_progress_bar=True).progress_bar_callback is bars[0]
    assert tiny.trainer(tmp_path, callbacks=bars[:1], enable_progress_bar=False).progress_bar_callback is None


@pytest.mark.parametrize(("command", "option"), [("validate", "limit_val_batches"), ("test", "limit_test_batches")])
def test_an_evaluation_without_a_batch_is_refused(command: str, option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^trainer\.{option}=0 leaves nothing to do"):
        getattr(tiny.trainer(tmp_path, 1, None, **{option: 0}), command)(tiny.module(), tiny.data())


def test_a_trainer_made_without_options_counts_steps(tmp_path: Path) -> None:
    trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu", devices=1, logger=False, max_steps=3)
    assert (trainer.max_epochs, trainer.check_val_every_n_epoch, trainer.max_steps) == (-1, None, 3)


JOB = {"JOB_ID": "7", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}


@pytest.mark.parametrize(
    ("variables", "options", "line"),
    [
        ({"NTASKS": "2"}, {}, "SLURM_NTASKS=2 inside a SLURM job, but srun has not started"),
        ({"NTASKS": "2", "NTASKS_PER_NODE": "2"}, {"devices": 2}, "SLURM_NTASKS=2 .*SLURM_JOB_NAME=interactive"),
        ({"NTASKS": "1"}, {"devices": 2}, "devices=2 and trainer.num_nodes=1 inside a SLURM job"),
        ({"NTASKS": "1"}, {"num_nodes": 2}, "num_nodes=2 inside a SLURM job"),
        ({"NTASKS": "2", "STEP_ID": "4294967290"}, {"devices": 2}, "srun has not started this process"),
        ({"NTASKS": "2", "NTASKS_PER_NODE": "2", "STEP_ID": "0"}, {}, "make 1 processes, but .* SLURM_NTASKS=2"),
        ({"NTASKS": "1", "STEP_ID": "0"}, {"devices": 2}, "make 2 processes, but .* SLURM_NTASKS=1"),
    ],
)
def test_a_slurm_job_whose_processes_will_not_come_is_refused_at_once(
    variables: dict[str, str], options: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**JOB, **variables}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(ValueError, match=line):
        tiny.trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("variables", "options", "world"),
    [
        ({"NTASKS": "1"}, {}, 1),
        ({"NTASKS": "1", "STEP_ID": "0"}, {}, 1),
        ({"NTASKS": "2", "NTASKS_PER_NODE": "2", "STEP_ID": "0"}, {"devices": 2}, 2),
        ({"NTASKS": "2", "JOB_NAME": "interactive"}, {}, 1),
        ({"NTASKS": "2", "JOB_NAME": "interactive", "STEP_ID": "4294967290"}, {"devices": 2}, 2),
        ({"NTASKS": "2"}, {"devices": 2, "plugins": [LightningEnvironment()]}, 2),
        ({}, {"devices": 2}, 2),
    ],
)
def test_a_slurm_job_that_is_started_right_and_the_remedies_are_accepted(
    variables: dict[str, str], options: dict[str, Any], world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**JOB, **variables}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert tiny.trainer(tmp_path, **options).world_size == world
