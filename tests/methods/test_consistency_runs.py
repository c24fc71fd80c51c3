"""Runs of consistency models: resumed, on two processes, sampled and scored from a checkpoint alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_lit.checkpoint import load_model
from diffusion_lit.configuration import build
from diffusion_lit.diffusion import EDM, DenoisingLoss, LogNormal, Preconditioned, VarianceExploding
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.methods.consistency import (
    Boundary,
    ConsistencyDistillation,
    ConsistencyTraining,
    Doubling,
    Multistep,
    Neighbors,
    TimeSearch,
)
from diffusion_lit.metrics import Pixels
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.records import RESULTS, read_records
from tests import tiny
from tests.tiny import last, load

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


def improved() -> DiffusionModule:
    """From data alone, with the parts that the teacher's network has."""
    return tiny.module(
        process=VarianceExploding(),
        parameterization=Boundary(0.75),
        objective=ConsistencyTraining(Neighbors(Doubling(2, 8, 6), noise=LogNormal(-1.1, 2.0))),
        sampler=Multistep(2),
    )


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


@pytest.mark.further
def test_times_are_searched_for_in_test_and_known_ones_are_not_scored_again(tmp_path: Path, teacher: Path) -> None:
    model = improved()
    model.config = {}
    tiny.trainer(tmp_path, 1).fit(model, tiny.data())
    table = TimeSearch(levels=8, steps=2)
    for _ in range(2):
        evaluation = Evaluation(
            extractor=Pixels(), num_images=16, batch_size=16, table=table, cache_dir=str(tmp_path / "cache")
        )
        tiny.trainer(tmp_path, 1, [evaluation], limit_test_batches=1).test(
            improved(), tiny.data(), ckpt_path=str(last(tmp_path))
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
    model = improved()
    reported: list[tuple[int, int]] = []
    one: Tensor = model.sample([0], sampler=Multistep(1))
    two = model.sample([0], sampler=Multistep(2), on_step=lambda done, total: reported.append((done, total)))
    assert not torch.equal(one, two)
    assert reported == [(1, 2), (2, 2)]


def test_a_trained_model_is_scored_at_the_levels_that_it_was_trained_at_last(tmp_path: Path) -> None:
    model = improved()
    tiny.trainer(tmp_path, 4).fit(model, tiny.data())
    assert isinstance(model.objective, ConsistencyTraining)
    assert model.objective.times.step == 4
    for fresh, kwargs in ((improved(), {}), (improved(), {"ckpt_path": str(last(tmp_path))})):
        if not kwargs:
            fresh.load(load(last(tmp_path)))
        tiny.trainer(tmp_path / "scored", 1, [], limit_test_batches=1).test(fresh, tiny.data(), **kwargs)
        assert isinstance(fresh.objective, ConsistencyTraining)
        assert isinstance(fresh.objective.times, Neighbors)
        # Two stages of two steps have 2 and 4 intervals; the third has 8.
        assert len(fresh.objective.times.levels(fresh.process)) == 9
