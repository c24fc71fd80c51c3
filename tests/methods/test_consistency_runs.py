"""Runs of consistency models: resumed, on two processes, sampled and scored from a checkpoint alone."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.checkpoint import load_model
from diffusion_lit.configuration import build
from diffusion_lit.diffusion import EDM, DenoisingLoss, LogNormal, Preconditioned, VarianceExploding
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.methods.consistency import (
    Boundary,
    ConsistencyDistillation,
    ConsistencyTraining,
    Doubling,
    Fixed,
    InverseOutput,
    Multistep,
    Neighbors,
    PseudoHuber,
    Shrinking,
    Squared,
    SquareRoot,
    TimeSearch,
    Unweighted,
)
from diffusion_lit.metrics import Pixels
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.records import RESULTS, read_records
from tests import forked, tiny
from tests.tiny import identical, last, load

NETWORK = {
    "class_path": "diffusion_lit.networks.UNet",
    "init_args": {
        "image_size": 8,
        "in_channels": 1,
        "width": 16,
        "multipliers": [1, 2],
        "num_blocks": 1,
        "attention": [],
        "num_groups": 8,
    },
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a diffusion model that has hardly been trained."""
    run = tmp_path_factory.mktemp("teacher")
    model = tiny.module(
        process=VarianceExploding(),
        parameterization=Preconditioned(0.75),
        objective=DenoisingLoss(EDM(0.75), LogNormal()),
        sampler=Multistep(),
    )
    model.config = {
        "model": {
            "class_path": "diffusion_lit.module.DiffusionModule",
            "init_args": {
                "network": NETWORK | {"init_args": NETWORK["init_args"] | {"attention": [4]}},  # type: ignore[operator]
                "process": {"class_path": "diffusion_lit.diffusion.process.VarianceExploding"},
                "parameterization": {
                    "class_path": "diffusion_lit.diffusion.parameterization.Preconditioned",
                    "init_args": {"sigma_data": 0.75},
                },
                "sampler": {"class_path": "diffusion_lit.methods.consistency.sampling.Multistep"},
            },
        }
    }
    tiny.trainer(run, 2).fit(model, tiny.data())
    return last(run)


KINDS = ["training", "improved", "easy", "distillation"]


def objective(kind: str, teacher: Path) -> ConsistencyTraining:
    if kind == "training":
        return ConsistencyTraining(Neighbors(SquareRoot(2, 8, 6)), Squared(), Unweighted(), decay=0.9)
    if kind == "improved":
        return ConsistencyTraining(Neighbors(Doubling(2, 8, 6), noise=LogNormal(-1.1, 2.0)))
    if kind == "easy":
        return ConsistencyTraining(Shrinking(stage_steps=2), PseudoHuber(0.0), InverseOutput(0.75))
    return ConsistencyDistillation(str(teacher), Neighbors(Fixed(6)), decay=0.95)


def module(kind: str, teacher: Path) -> DiffusionModule:
    return tiny.module(
        process=VarianceExploding(),
        parameterization=Preconditioned(0.75) if kind == "easy" else Boundary(0.75),
        objective=objective(kind, teacher),
        sampler=Multistep(2),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_has_the_bits_of_one_that_was_not_stopped(tmp_path: Path, teacher: Path, kind: str) -> None:
    whole, first, rest = (module(kind, teacher) for _ in range(3))
    settings: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2}
    tiny.trainer(tmp_path / "whole", 6, **settings).fit(whole, tiny.data())
    tiny.trainer(tmp_path / "parts", 3, **settings).fit(first, tiny.data())
    tiny.trainer(tmp_path / "parts", 6, **settings).fit(rest, tiny.data(), ckpt_path="last")
    a, b = (load(last(tmp_path / name)) for name in ("whole", "parts"))
    for key in ("state_dict", "current_model_state", "averages", "optimizer_states", "objective"):
        assert identical(a[key], b[key]), key
    assert a["objective"]["step"] == 6
    average = {n.removeprefix("target."): p for n, p in a["objective"].items() if n.startswith("target.")}
    assert bool(average) == (kind in ("training", "distillation"))
    raw = {n.removeprefix("denoiser.network."): p for n, p in a["current_model_state"].items()}
    assert all(not torch.equal(p, raw[name]) for name, p in average.items() if p.numel() > 100)


class Keep(L.Callback):
    """Writes what each process ends with."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        torch.save((pl_module.state_dict(), pl_module.objective.state_dict()), self.place / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("kind", ["training", "distillation"])
def test_two_processes_end_with_the_same_weights_and_the_same_target(tmp_path: Path, teacher: Path, kind: str) -> None:
    def train() -> None:
        callbacks = [EMA([0.9]), Scalars(), Checkpoints(), Keep(tmp_path)]
        tiny.trainer(tmp_path, 3, callbacks, devices=2, strategy="ddp").fit(module(kind, teacher), tiny.data())

    assert forked.wait(forked.fork(lambda: forked.in_two(train), tmp_path / "output.txt")) == 0, (
        tmp_path / "output.txt"
    ).read_text()
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert identical(one, other)
    assert one[1]["step"] == 3


def configuration(teacher: str) -> dict[str, Any]:
    return {
        "class_path": "diffusion_lit.module.DiffusionModule",
        "init_args": {
            "network": NETWORK,
            "process": "VarianceExploding",
            "parameterization": {"class_path": "Boundary", "init_args": {"sigma_data": 0.75}},
            "objective": {"class_path": "ConsistencyDistillation", "init_args": {"teacher": teacher}},
            "sampler": {"class_path": "Multistep", "init_args": {"steps": 2}},
        },
    }


def test_a_checkpoint_makes_images_without_its_teacher(tmp_path: Path, teacher: Path) -> None:
    moved = tmp_path / "teacher.ckpt"
    moved.write_bytes(teacher.read_bytes())
    model = build(configuration(str(moved)), DiffusionModule)
    model.config = {"model": configuration(str(moved))}
    tiny.trainer(tmp_path / "run", 1).fit(model, tiny.data())
    moved.unlink()
    loaded = load_model(last(tmp_path / "run"), DiffusionModule)
    images = loaded.sample([3, 5])
    assert images.shape == (2, 1, 8, 8)
    # Image i depends on the seed and i alone.
    torch.testing.assert_close(loaded.sample([5]), images[1:])
    assert loaded.evaluations(None) == 2
    # It can be scored, too.
    with pytest.warns(
        UserWarning, match=r"teacher\.ckpt: there is no such file.* the loss is that of training from data"
    ):
        tiny.trainer(tmp_path / "scored", 1, [], limit_test_batches=1).test(loaded, tiny.data())
    again = tiny.trainer(tmp_path / "more", 1)
    with pytest.raises(FileNotFoundError, match=r"objective\.teacher=.*teacher\.ckpt: there is no such file"):
        again.fit(build(configuration(str(moved)), DiffusionModule), tiny.data())


def test_a_teacher_for_other_images_is_refused_before_training(tmp_path: Path, teacher: Path) -> None:
    model = tiny.module(
        network=UNet(16, 1, width=16, multipliers=[1, 2], num_blocks=1, attention=[], num_groups=8),
        process=VarianceExploding(),
        parameterization=Boundary(0.75),
        objective=ConsistencyDistillation(str(teacher)),
        sampler=Multistep(),
    )
    with pytest.raises(ValueError, match=r"objective\.teacher was trained for images of image_size=8"):
        tiny.trainer(tmp_path, 1).fit(model, tiny.data())


def test_times_are_searched_for_in_test_and_known_ones_are_not_scored_again(tmp_path: Path, teacher: Path) -> None:
    model = module("improved", teacher)
    model.config = {}
    tiny.trainer(tmp_path, 1).fit(model, tiny.data())
    table = TimeSearch(levels=8, steps=2)
    for _ in range(2):
        evaluation = Evaluation(
            extractor=Pixels(), num_images=16, batch_size=16, table=table, cache_dir=str(tmp_path / "cache")
        )
        tiny.trainer(tmp_path, 1, [evaluation], limit_test_batches=1).test(
            module("improved", teacher), tiny.data(), ckpt_path=str(last(tmp_path))
        )
    records = read_records(tmp_path / RESULTS)
    scored = [tuple(record["sampler"]["grid"]["indices"]) for record in records]
    assert scored[0] == (0, 7)
    assert len(scored) == len(set(scored)) <= 7
    assert all(indices[0] == 0 and indices[-1] == 7 for indices in scored)
    text = (tmp_path / "table_times.md").read_text()
    best = min(records[1:], key=lambda record: record["scores"]["frechet/pixels"])
    assert f"| {', '.join(map(str, best['sampler']['grid']['indices']))} |" in text


def test_images_of_one_and_two_evaluations_differ_and_are_reported_step_by_step(teacher: Path) -> None:
    model = module("improved", teacher)
    reported: list[tuple[int, int]] = []
    one: Tensor = model.sample([0], sampler=Multistep(1))
    two = model.sample([0], sampler=Multistep(2), on_step=lambda done, total: reported.append((done, total)))
    assert not torch.equal(one, two)
    assert reported == [(1, 2), (2, 2)]
