"""Any configuration either trains two steps or ends in one line that says what to change."""

import contextlib
import io
import os
import shutil
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from diffusion_lit import cli
from tests import tiny
from tests.test_cli import CPU, QUIET, fit_args

PATIENCE = 120
SEED = int(os.environ.get("DIFFUSION_LIT_SEED", "0"))
PARTS = 8
MANY = int(os.environ.get("DIFFUSION_LIT_FUZZ", "2000"))
D = "diffusion_lit.diffusion."
M = "model."


def part(name: str, **arguments: Any) -> st.SearchStrategy[Any]:
    """A part by its class path, some of its arguments given."""
    given = st.fixed_dictionaries({}, optional=arguments)
    path = name if "." in name else D + name
    return given.map(lambda chosen: {"class_path": path, "init_args": chosen} if chosen else {"class_path": path})


whole = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 100, 1000, 1001, 10**9])
real = st.sampled_from([-1.0, 0.0, 1e-30, 1e-4, 0.02, 0.5, 0.999, 1.0, 1.5, 3.0, 1e30, float("inf"), float("nan")])
junk: st.SearchStrategy[Any] = st.sampled_from(["", "many", None, True, [], {}, [1], "Linear", -0.5, "runs/nowhere"])
steps = st.sampled_from([-1, 0, 1, 2, 5, 17, 101, 1001, 10**9])
grid = st.one_of(
    *(part(name) for name in ("Uniform", "Quadratic", "Spanning", "Trailing", "Leading")),
    part("LogSNR", lambda_min=real | st.just(-5.1)),
    part("Karras", sigma_min=real, sigma_max=real, rho=real),
)
fixed = st.one_of(part("FixedLarge"), part("FixedSmall"))
schedule = st.one_of(
    part("Linear", beta_start=real, beta_end=real),
    part("ScaledLinear", beta_start=real, beta_end=real),
    part("Cosine", offset=real),
    part("Sqrt", offset=real),
    part("Sigmoid", start=real, end=real, tau=real),
)
weighting = st.one_of(part("Simple"), part("Velocity"), part("MinSNR", gamma=real), part("Variational", variance=fixed))
sampler = st.one_of(
    part("DDIM", steps=steps | st.none(), eta=real, grid=grid, clip=st.booleans()),
    part("DPMSolver", steps=steps, order=st.sampled_from([0, 1, 2, 3, 4]), grid=grid, clip=st.booleans()),
    part("PLMS", steps=steps, grid=grid, clip=st.booleans()),
    part("Heun", steps=steps, grid=grid, clip=st.booleans()),
    part("Ancestral", steps=steps, variance=fixed | part("LearnedRange"), grid=grid, clip=st.booleans()),
)
optimizer = st.one_of(
    part("torch.optim.AdamW", lr=real, weight_decay=real, betas=st.lists(real, min_size=2, max_size=2)),
    part("torch.optim.SGD", lr=real, momentum=real, nesterov=st.booleans()),
    part("torch.optim.RAdam", lr=real),
)
rate = st.one_of(
    st.none(),
    part("torch.optim.lr_scheduler.LinearLR", start_factor=real, total_iters=whole),
    part("torch.optim.lr_scheduler.CosineAnnealingLR", T_max=whole, eta_min=real),
    part("torch.optim.lr_scheduler.StepLR", step_size=whole, gamma=real),
)
numbers = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8]), max_size=4)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    M + "network.width": st.sampled_from([-8, 0, 1, 8, 12, 16, 24]),
    M + "network.image_size": st.sampled_from([0, 4, 8, 16]),
    M + "network.in_channels": st.sampled_from([-1, 0, 1, 3]),
    M + "network.out_channels": st.sampled_from([None, 0, 1, 2, 3]),
    M + "network.multipliers": numbers,
    M + "network.attention": numbers,
    M + "network.num_blocks": st.sampled_from([-1, 0, 1, 2]),
    M + "network.num_groups": st.sampled_from([-1, 0, 1, 3, 8]),
    M + "network.num_heads": st.sampled_from([-1, 0, 1, 2, 3]),
    M + "network.dropout": real,
    M + "process.num_steps": st.sampled_from([-1, 0, 1, 2, 3, 10, 100, 1000]),
    M + "process.network_steps": st.sampled_from([-1, 0, 1, 10, 1000, None]),
    M + "process.schedule": schedule,
    M + "parameterization": st.one_of(*(part(name) for name in ("Eps", "X0", "V", "PosteriorMean"))),
    M + "objective": st.one_of(
        part("DenoisingLoss", weighting=weighting),
        part("Hybrid", weight=real),
        part("VariationalBound", times=part("LossSecondMoment", history=whole, uniform=real)),
    ),
    M + "sampler": sampler,
    M + "optimizer": optimizer,
    M + "lr_scheduler": rate,
    M + "guidance": st.none() | part("ClassifierFree", scale=real, rescale=real, interval=st.lists(real, max_size=3)),
    M + "max_skipped_steps": st.sampled_from([None, -1, 0, 1, 5]),
    "data.batch_size": st.sampled_from([-1, 0, 1, 2, 3, 8, 17]),
    "data.num_workers": st.sampled_from([-1, 0]),
    "data.flip": st.booleans(),
    "data.eval_batch_size": st.sampled_from([-1, 0, 100]),
    "ema.decays": st.lists(real, max_size=3),
    "ema.warmup": st.booleans(),
    "evaluation.training_num_images": st.sampled_from([-1, 0, 1, 2, 3]),
    "evaluation.seed": st.sampled_from([-1, 0, 5]),
    "evaluation.training_sampler": st.none() | sampler,
    "evaluation.every_n_steps": st.sampled_from([-1, 0, 1, 2, None]),
    "evaluation.num_images": st.sampled_from([-1, 0, 1, 4]),
    "evaluation.batch_size": st.sampled_from([-1, 0, 1, 2]),
    "evaluation.sampler": st.none() | sampler,
    "sample_grid.every_n_steps": st.sampled_from([-1, 0, 1, 2, None]),
    "sample_grid.num_images": st.sampled_from([-1, 0, 1, 2]),
    "sample_grid.batch_size": st.sampled_from([-1, 0, 1, 2]),
    "sample_grid.sampler": sampler,
    "checkpoints.every_n_steps": st.sampled_from([-1, 0, 1, 2]),
    "checkpoints.keep_every_n_steps": st.sampled_from([-1, 0, 1, None]),
    "checkpoints.keep_at_most": st.sampled_from([-1, 0, 1, None]),
    "trainer.accumulate_grad_batches": st.sampled_from([-1, 0, 1, 2, 3]),
    "trainer.gradient_clip_val": st.none() | real,
    "trainer.log_every_n_steps": st.sampled_from([-1, 0, 1, 2]),
    "trainer.val_check_interval": st.sampled_from([-1, 0, 1, 2, 0.5]),
    "trainer.limit_val_batches": st.sampled_from([-1, 0, 1, 0.001]),
    "trainer.precision": st.sampled_from(["32-true", "bf16-mixed", "16-mixed", "64-true", "8", "half"]),
    "seed_everything": st.sampled_from([-1, 0, 2**32 - 1, 2**32, 2**64, True, None]),
}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A few options of the digits recipe, by dotted key, with values good and bad."""
    keys = draw(st.lists(st.sampled_from(sorted(OPTIONS)), min_size=1, max_size=3, unique=True))
    return {key: draw(st.one_of(*8 * [OPTIONS[key]], junk)) for key in keys}


def nested(options: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in options.items():
        *folders, leaf = key.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    return tree


def said(options: dict[str, Any]) -> list[tuple[set[str], set[str]]]:
    """For each value that was set, at any depth: the keys on its path, and how a message may write the value.

    A part's keys are its class's name too; of a list, one element will do.
    """
    found = []

    def walk(value: Any, path: set[str]) -> None:
        if isinstance(value, dict) and value:
            name = str(value.get("class_path", "")).rpartition(".")[2]
            for key, inner in value.items():
                walk(inner, path | ({key} if key not in ("class_path", "init_args") else set()) | ({name} - {""}))
            return
        written = {"null"} if value is None else {"''"} if value == "" else set()
        for v in [value, *(value if isinstance(value, list) else [])]:
            written |= {str(v), str(v).lower(), v.rpartition(".")[2] if isinstance(v, str) else str(v)}
        found.append((path, written - {""}))

    for key, value in options.items():
        walk(value, {key.rpartition(".")[2]})
    return found


def names_what_is_wrong(options: dict[str, Any], line: str) -> bool:
    """Whether a refusal names a key that was set with its value, or an option to set."""
    pairs = said(options)
    return " --" in line or any(
        any(key in line for key in keys) and any(value in line for value in values) for keys, values in pairs
    )


def hung(*_: object) -> None:
    raise AssertionError(f"not done in {PATIENCE} s")


def run(options: dict[str, Any]) -> str | None:
    """Trains two steps; returns the line of a refusal."""
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(PATIENCE)
    place = Path(tempfile.mkdtemp())
    said = io.StringIO()
    rare = ["--sample_grid.batch_size", "2", "--evaluation.at_start", "false"]
    try:
        (place / "fuzz.yaml").write_text(yaml.safe_dump(nested(options)))
        args = fit_args(place / "run", *QUIET, *rare, "-c", str(place / "fuzz.yaml"), *CPU)
        with warnings.catch_warnings(), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            try:
                cli.main(args)
            except SystemExit as end:
                if end.code != 2:
                    raise
                lines = said.getvalue().splitlines()
                assert [line for line in lines if "error: " in line] == lines[-1:]
                assert lines[-1].startswith("diffusion_lit: error: ")
                return lines[-1].removeprefix("diffusion_lit: error: ")
        assert tiny.load(tiny.last(place / "run"))["global_step"] == 2
        return None
    finally:
        signal.alarm(0)
        shutil.rmtree(place)


def check(options: dict[str, Any]) -> None:
    line = run(options)
    if line is not None:
        assert "Traceback" not in line
        assert len(line) < 900
        assert names_what_is_wrong(options, line), line


common = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    print_blob=False,
)


def test_the_fuzzer_tells_good_refusals_from_bad_ones() -> None:
    options = {"ema.decays": [0.5, 3.0], "evaluation.sampler": {"class_path": D + "DDIM", "init_args": {"eta": -1.0}}}
    for line in ("ema.decays=[0.5, 3.0] must", "decays: 3.0 is", "sampler.eta=-1.0 must", "DDIM: -1.0 is", "set --x.y"):
        assert names_what_is_wrong(options, line)
    good = ("ema.decays=[0.5, 3.0] must", "decays: 3.0 is", "sampler.eta=-1.0 must", "DDIM: -1.0 is", "set --x.y")
    bad = ("3.0 is too large", "decays must be below 1", "eta=0.5", "expected a number", "evaluation.sampler failed")
    assert [line for line in good if not names_what_is_wrong(options, line)] == []
    assert [line for line in bad if names_what_is_wrong(options, line)] == []


@settings(common, max_examples=8, derandomize=True)
@given(configurations())
def test_a_configuration_trains_or_is_refused_in_one_line(options: dict[str, Any]) -> None:
    check(options)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_many_configurations_train_or_are_refused_in_one_line(part: int) -> None:
    tried = settings(common, max_examples=MANY // PARTS)(given(configurations())(check))
    seed(PARTS * SEED + part)(tried)()
