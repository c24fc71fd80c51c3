"""Values that no option takes, for every option of a recipe: one line that names the key, or the run starts.

Nothing is trained: the model, the data and the trainer are made.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from diffusion_lit import cli
from diffusion_lit.configuration import Merge
from diffusion_lit.errors import LONG, report
from diffusion_lit.methods.progressive_distillation import ProgressiveDistillation
from diffusion_lit.parts import signature
from diffusion_lit.requests import Requests
from diffusion_lit.trainer import Trainer
from tests import systems, tiny
from tests.test_changed_options import make, one
from tests.test_cli import CPU, SMALL, tree

VALUES = ["null", "0", "-1", str(10**19), "1e400", ".nan", "x" * 5000, "[]"]
RECIPES = ["digits", "ddgan_digits", "cifar10"]


def options(config: Any, key: str = "") -> Iterator[str]:
    """The keys of all values in a configuration."""
    if isinstance(config, dict):
        for name, value in config.items():
            inner = key if name == "init_args" else f"{key}.{name}" if key else name
            if name != "class_path":
                yield from options(value, inner)
    else:
        yield key


def refusal(make: Callable[[], object]) -> str | None:
    """The message with which something is refused; None if it is not."""
    try:
        make()
    except ValueError as error:
        return str(error)
    return None


def outcome(args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What a command line that is not run ends with: nothing, or its one line."""
    capfd.readouterr()
    try:
        cli.CLI.parts(args)
    except Exception as error:
        with pytest.raises(SystemExit) as end:
            report(error)
        said = capfd.readouterr().err
        assert end.value.code == 2, (args[-1], said)
        assert "Traceback" not in said
        [line] = [line for line in said.splitlines() if line.startswith("diffusion_lit: error: ")]
        return line
    return ""


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_value_of_another_kind_than_an_option_s_is_refused_by_its_key(recipe: str) -> None:
    below = tree("fit", "-c", recipe)
    slots = cli.command_slots("fit")
    keys = [*options(below), *(f"trainer.{name}" for name in signature(Trainer).slots)]
    assert len(keys) > 100
    refused = 0
    for key in keys:
        for value in VALUES:
            said = refusal(partial(Merge(typed=True).sections, below, {key: value}, slots))
            refused += said is not None
            assert said is None or re.match(rf"{re.escape(key)}(\[0\])?[=:]", said), (key, value[:20], said[:300])
    assert refused > len(keys)


@pytest.mark.few(8)
@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("trainer.process_timeout", "null", "trainer.process_timeout=null: must be a number"),
        ("trainer.process_timeout", "1e30", r"trainer\.process_timeout=1e\+30 must be above 0 seconds, and at most"),
        ("trainer.max_steps", "null", "trainer.max_steps=null: must be a whole number"),
        ("trainer.overfit_batches", "null", "trainer.overfit_batches=null: must be"),
        ("trainer.detect_anomaly", "null", "trainer.detect_anomaly=null: must be true or false"),
        (
            "trainer.val_check_interval",
            "0",
            "trainer.val_check_interval=0 must be a whole number of batches, at least 1",
        ),
        ("trainer.devices", str(10**19), "trainer.devices=10000000000000000000: must be"),
        ("model.optimizer.lr", "null", "model.optimizer.lr=null: must be a number"),
        ("model.optimizer.betas", "null", "model.optimizer.betas=null: must be"),
        ("model.optimizer.betas", "[0.9]", r"model.optimizer.betas=\[0.9\]: must be 2 values"),
        ("model.optimizer.eps", "null", "model.optimizer.eps=null: must be a number"),
        ("model.optimizer.weight_decay", "null", "model.optimizer.weight_decay=null: must be a number"),
        ("model.network.num_blocks", "1000000", "num_blocks=1000000 must be at most"),
        ("model.network.width", str(10**10), "model.network.width=10000000000: must be below 2.31"),
        ("model.process.num_steps", str(10**9), "process.num_steps=1000000000 must lie in 1 .. 1000000"),
        ("data.batch_size", str(10**9), "batch_size=1000000000 must be at most"),
        ("evaluation.batch_size", str(2**30), "evaluation.batch_size=1073741824 must be at most 1048576"),
        ("trainer.logger", "0", r"trainer.logger\[0\]=0: must be Logger"),
    ],
)
def test_a_value_is_refused_with_its_key(option: str, value: str, line: str, capfd: pytest.CaptureFixture[str]) -> None:
    said = outcome(["fit", "-c", "digits", *SMALL, *CPU, "--trainer.logger", "false", f"--{option}={value}"], capfd)
    assert re.search(line, said), said


@pytest.mark.parametrize(
    ("system", "line"),
    [
        (make(lr=-1.0), r"^model\.optimizer: Invalid learning rate: -1.0"),
        (make(betas=(0.9, 1.5)), r"^model\.optimizer: Invalid beta parameter"),
        (make(eps=-1.0), r"^model\.optimizer: Invalid epsilon"),
        (make(weight_decay=-1.0), r"^model\.optimizer: Invalid weight_decay"),
        (make(capturable=True), r"^model\.optimizer\.capturable=True needs parameters on a GPU"),
        (make(arguments={"T_max": 0}), r"^model\.lr_scheduler: T_max=0, .* must be at least 1"),
        (make(arguments={"T_max": 5, "last_epoch": 3}), r"^model\.lr_scheduler: last_epoch must be -1"),
    ],
)
def test_settings_of_optimisers_are_refused_with_their_key_when_training_starts(
    system: Any, line: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=line):
        tiny.trainer(tmp_path, 2).fit(one(system), tiny.data())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_more_images_than_a_directory_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_images=1000000000000000 must be at most"):
        Requests(10**15, 64)


def test_a_long_value_is_quoted_in_part(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report(ValueError(f"key={'x' * 5000} is too long"))
    assert len(capfd.readouterr().err) < LONG + 100


@pytest.mark.parametrize("control", ["\x1b[2J", "\x9b2J", "\b", "\x00", "\u202e", "\udcff"])
def test_what_a_terminal_would_obey_is_escaped_in_errors_warnings_and_messages(
    control: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        report(ValueError(f"a{control}b.png cannot be read"))
    escaped = control.encode("unicode_escape").decode()
    assert capfd.readouterr().err == f"diffusion_lit: error: a{escaped}b.png cannot be read\n"
    record = logging.LogRecord("x", logging.INFO, "", 0, "left out: %s\n", (f"a{control}b",), None)
    assert cli._shown(record)
    assert record.getMessage() == f"left out: a{escaped}b\n"
    shown = cli._format_warning(warnings.formatwarning, f"a{control}b", UserWarning, "f.py", 1)
    assert f"a{escaped}b" in shown
    assert control not in shown


def test_what_a_part_of_a_part_refuses_is_said_alone(capfd: pytest.CaptureFixture[str]) -> None:
    given = [
        "--model.sampler.steps",
        "null",
        "--model.sampler.grid",
        "Levels",
        "--model.sampler.grid.indices",
        "[0, 22]",
    ]
    said = outcome(["fit", "-c", "ct_digits", *given], capfd)
    assert said.startswith("diffusion_lit: error: grid.indices=[0, 22] must end at the last level, 39: ")
    assert said.endswith("; append 39")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"conditioner": "ClassContext", "conditioner.num_classes": "0"},
            "conditioner.num_classes=0 and width=512 must",
        ),
        ({"guidance": "ClassifierFree", "guidance.rescale": "-1"}, "guidance.rescale=-1"),
        (
            {"guidance": "TrainedClassifier", "guidance.checkpoint": "none.ckpt"},
            "guidance.checkpoint=none.ckpt: there is",
        ),
        ({"codec": "FirstStage"}, "codec: there is no first stage"),
    ],
)
def test_what_an_optional_part_says_is_all_that_is_said(
    options: dict[str, str], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [word for key, value in options.items() for word in (f"--model.{key}", value)]
    said = outcome(["fit", "-c", "digits_cfg", *CPU, *words], capfd)
    assert said.startswith(f"diffusion_lit: error: {line}"), said
    assert "Union" not in said


OF_SYSTEMS: dict[Callable[..., object], list[str]] = {
    tiny.module: ["max_skipped_steps", "seed"],
    systems.ddgan: ["max_skipped_steps", "seed", "r1_gamma", "r1_every"],
    systems.autoencoder: ["max_skipped_steps", "seed"],
    partial(ProgressiveDistillation, "teacher.ckpt"): ["last_steps", "stages"],
}


@pytest.mark.parametrize("make", OF_SYSTEMS, ids=["diffusion", "ddgan", "autoencoder", "distillation"])
def test_settings_of_whole_systems_are_taken_or_refused_with_their_names(make: Callable[..., object]) -> None:
    for name in OF_SYSTEMS[make]:
        # Configurations have no other kinds of values: see above.
        for value in (-1e300, float("inf"), float("nan")) if name == "r1_gamma" else (-1, 0, 10**19):
            said = refusal(partial(make, **{name: [value] if name == "stages" else value}))
            assert said is None or name in said, (name, value, said)
            assert said is not None or (value >= 0 and value < float("inf")) or name == "seed", (name, value)
