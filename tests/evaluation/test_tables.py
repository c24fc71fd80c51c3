"""Tables are filled for a checkpoint in `test`, and what is on record is not evaluated again."""

import csv
import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion_lit.callbacks import EMA, Checkpoints
from diffusion_lit.data import Digits
from diffusion_lit.diffusion import DDIM, X0, ClassifierFree, DiscreteProcess
from diffusion_lit.evaluation import (
    AverageTable,
    DDIMTable,
    Evaluation,
    GuidanceTable,
    Likelihood,
    SamplerTable,
    StepTable,
    Table,
    tables,
)
from diffusion_lit.evaluation.measure import newest_record
from diffusion_lit.evaluation.table import Forecast
from diffusion_lit.evaluation.tables import NETWORKS, PUBLISHED
from diffusion_lit.images import from_uint8
from diffusion_lit.metrics import Agreement, FrechetDistance, Pixels, PrecisionRecall
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.records import RESULTS, describe, read_records
from diffusion_lit.types import Condition, Network
from tests import tiny

SAMPLERS = ("Ancestral", "DDIM", "DPMSolver", "Heun")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a run of three steps with a snapshot of each."""
    callbacks = [EMA([0.9, 0.5]), Checkpoints(keep_every_n_steps=1)]
    tiny.trainer(tmp_path / "run", 3, callbacks, logger=False).fit(tiny.module(), tiny.data())
    return tiny.last(tmp_path / "run")


def fill(
    checkpoint: Path, table: Table, model: DiffusionModule | None = None, more: Any = (), **settings: Any
) -> list[dict[str, str]]:
    """Fills a table and returns the rows of its .csv file."""
    run_dir = checkpoint.parent.parent
    given = {"scores": None, "extractor": Pixels(4), "num_images": 12, "batch_size": 6, **settings}
    made = tiny.trainer(
        run_dir, callbacks=[Evaluation(**given, table=table), *more], logger=False, limit_test_batches=1
    )
    made.test(model or tiny.module(), tiny.data(), str(checkpoint))
    with (run_dir / f"table_{table.name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_ddims_table_has_every_cell_once_and_only_new_cells_are_computed(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    rows = fill(checkpoint, DDIMTable([2, 10], [0.0, 1.0]))
    assert [(row["row"], row["column"]) for row in rows] == [
        (name, steps) for name in ("0", "1", "sigma-hat") for steps in ("2", "10")
    ]
    assert [row["evaluations"] for row in rows] == ["2", "10"] * 3
    records = read_records(run / RESULTS)
    assert [record["scores"]["frechet/pixels"] for record in records] == [float(row["frechet/pixels"]) for row in rows]
    assert [record["sampler"]["class"] for record in records] == ["DDIM"] * 4 + ["Ancestral"] * 2
    assert all(record["sampler"]["grid"]["class"] == "Quadratic" for record in records)
    assert not any(record["sampler"]["clip"] for record in records)
    text = (run / "table_ddim.md").read_text()
    assert "| eta \\ steps | 2 | 10 |" in text
    with Image.open(run / "table_ddim.png") as picture:
        assert picture.size == (990, 495)

    # A wider table: only the new cells are computed.
    rows_of_more = fill(checkpoint, DDIMTable([2, 3, 10], [0.0, 1.0]))
    records = read_records(run / RESULTS)
    assert [record["evaluations"] for record in records[6:]] == [3, 3, 3]
    same = [row["frechet/pixels"] for row in rows_of_more if row["column"] != "3"]
    assert same == [row["frechet/pixels"] for row in rows]
    # Another number of images is another table.
    fill(checkpoint, DDIMTable([2], [0.0], sigma_hat=False), num_images=6)
    assert len(read_records(run / RESULTS)) == 10


@pytest.mark.parametrize(
    "forged",
    [
        *[
            {name: value}
            for name in ("time", "scores", "num_images", "evaluations")
            for value in (None, [1], "x", True)
        ],
        *[{"scores": {"fid": value}} for value in (None, "1", [1], True, float("nan"), float("inf"), 10**400)],
        *[{"time": "2026-01-01T00:00:00"}, {"scores": {}}, {"num_images": 0}, {"num_images": 1.5}],
        *[{"process_seconds": value} for value in (None, "1", float("nan"))],
        *[{"names": value} for value in (None, "x", [1])],
    ],
    ids=lambda forged: str(forged)[:60],
)
def test_a_record_that_is_no_result_is_passed_over(forged: dict[str, Any], tmp_path: Path) -> None:
    good = {
        **{"key": 1, "time": "2026-01-01T00:00:00+00:00", "scores": {"fid": 1.5}, "num_images": 4},
        **{"evaluations": 0, "process_seconds": 1, "names": ["a"]},
    }
    (tmp_path / RESULTS).write_text(f"{json.dumps(good)}\n{json.dumps({**good, **forged})}\n")
    assert newest_record(tmp_path, {"key": 1}, ["names"]) == good


def test_a_record_with_other_scores_is_named(checkpoint: Path) -> None:
    path = checkpoint.parent.parent / RESULTS
    fill(checkpoint, DDIMTable([2, 3], [0.0], sigma_hat=False))
    first, second = path.read_text().splitlines()
    path.write_text(first.replace('frechet/pixels": ', 'fid": ', 1) + f"\n{second}\n")
    with pytest.raises(ValueError, match=r"results\.jsonl: the results of a table differ in their scores \('f"):
        fill(checkpoint, DDIMTable([2, 3], [0.0], sigma_hat=False))


def test_published_values_stand_only_beside_their_own_data_features_process_and_network(checkpoint: Path) -> None:
    rows = fill(checkpoint, DDIMTable([10], [0.0]))
    assert [row["published"] for row in rows] == ["", ""]
    text = (checkpoint.parent.parent / "table_ddim.md").read_text()
    assert "13.36" not in text
    assert "published" not in text

    table = DDIMTable()
    paper = DiffusionModule(UNet(), sampler=DDIM(2))
    record: dict[str, Any] = {
        "references": [{"name": "CIFAR-10 train"}],
        "scores": {"fid": 5.0},
        "process": describe(DiscreteProcess()),
    }
    assert table.compares(paper, record)
    assert not DDIMTable(published=None).compares(paper, record)
    assert not DDIMTable(published="celeba64").compares(paper, record)
    assert not table.compares(DiffusionModule(UNet(width=64), sampler=DDIM(2)), record)
    for name, value in (
        ("references", [{"name": "Digits train"}]),
        ("references", [{"name": "data/cifar100 (train)"}]),
        ("references", []),
        ("scores", {"frechet/pixels": 5.0}),
        ("process", describe(DiscreteProcess(500))),
        ("process", {**record["process"], "schedule": {"class": "Cosine"}}),
    ):
        assert not table.compares(paper, {**record, name: value}), name
    for published, name, same in (
        ("cifar10", "data/cifar-10 (train)", True),
        ("celeba64", "data/CelebA/64 (train)", True),
        ("celeba64", "data/celeba_hq (train)", False),
        ("celeba64", "data/CelebA-HQ (train)", False),
    ):
        names = NETWORKS | {published: sum(p.numel() for p in paper.denoiser.parameters())}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "NETWORKS", names)
            found = DDIMTable(published=cast(Any, published)).compares(
                paper, {**record, "references": [{"name": name}]}
            )
        assert found == same, name


@pytest.mark.further
def test_where_published_values_apply_they_stand_in_brackets_with_their_source(checkpoint: Path) -> None:
    class Always(DDIMTable):
        def compares(self, *_: Any) -> bool:
            return True

    rows = fill(checkpoint, Always([2, 10], [0.0, 1.0]))
    assert [row["published"] for row in rows] == ["", "13.36", "", "41.07", "", "367.43"]
    text = (checkpoint.parent.parent / "table_ddim.md").read_text()
    assert "(13.36)" in text
    assert "In brackets the FID that Song et al. 2021 published for cifar10" in text


@pytest.mark.further
def test_every_sampler_is_scored_with_no_more_evaluations_than_its_column_says(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    rows = fill(checkpoint, SamplerTable([2, 5]))
    records = read_records(run / RESULTS)
    names = list(dict.fromkeys(row["row"] for row in rows))
    assert {sampler["class"] for sampler in (record["sampler"] for record in records)} == set(SAMPLERS)
    assert len(rows) == len(records) == 2 * len(names)
    for row, record in zip(rows, records, strict=True):
        wanted = int(row["column"])
        assert int(row["evaluations"]) == (wanted - 1 + wanted % 2 if row["row"] == "Heun" else wanted)
        assert float(row["frechet/pixels"]) == record["scores"]["frechet/pixels"]
    text = (run / "table_samplers.md").read_text()
    assert "| sampler \\ evaluations | 2 | 5 |" in text
    assert (run / "table_samplers.png").is_file()
    # Chosen samplers, and one cell more: only that one is computed.
    again = fill(checkpoint, SamplerTable([2, 3], {"DDIM": DDIM(7)}))
    assert again[0]["frechet/pixels"] == next(row["frechet/pixels"] for row in rows if row["row"] == "DDIM")
    assert [record["evaluations"] for record in read_records(run / RESULTS)[len(rows) :]] == [3]


@pytest.mark.further
def test_averages_and_steps_have_tables_too(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    rows = fill(checkpoint, AverageTable())
    assert [row["row"] for row in rows] == ["0.5", "0.9", "raw"]
    assert len({row["frechet/pixels"] for row in rows}) == 3
    assert [record["weights_name"] for record in read_records(run / RESULTS)] == ["0.5", "0.9", "raw"]
    rows = fill(checkpoint, StepTable())
    assert [row["row"] for row in rows] == ["1", "2", "3"]
    records = read_records(run / RESULTS)[3:]
    # The last step's primary average is scored already.
    assert [record["step"] for record in records] == [1, 2]
    assert Path(records[0]["checkpoint"]).name == "step_00000001.ckpt"
    assert {"table_averages.png", "table_steps.png"} <= {path.name for path in run.iterdir()}


@pytest.mark.further
def test_what_comes_after_a_table_of_other_weights_sees_the_checkpoints_own(checkpoint: Path, tmp_path: Path) -> None:
    def bound(place: Path, more: bool) -> dict[str, float]:
        likelihood = Likelihood("train", num_images=4, num_terms=3)
        if more:
            fill(checkpoint, AverageTable(["raw"]), more=[likelihood])
        else:
            made = tiny.trainer(place, callbacks=[likelihood], logger=False, limit_test_batches=1)
            made.test(tiny.module(), tiny.data(), str(checkpoint))
        [record] = [r for r in read_records(place / RESULTS) if r["what"] == "likelihood"]
        assert record["weights_name"] == "0.9"
        scores: dict[str, float] = record["scores"]
        return scores

    assert bound(checkpoint.parent.parent, True) == bound(tmp_path / "alone", False)


def test_a_table_says_how_many_cells_are_left_and_how_long_they_take(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forecast = Forecast([10, 20, 100])
    assert str(forecast) == "cell 1 of 3"
    forecast.add(10, None)  # On record: its time says nothing.
    assert str(forecast) == "cell 2 of 3"
    forecast.add(20, 6.0)
    assert str(forecast) == "cell 3 of 3, about 00:30 left"
    with caplog.at_level("INFO"):
        fill(checkpoint, DDIMTable([2, 10], [0.0], sigma_hat=False))
    said = [message for message in (r.getMessage() for r in caplog.records) if message.startswith("table ddim:")]
    assert said[0] == "table ddim: 0, 2 (cell 1 of 2)"
    assert re.fullmatch(r"table ddim: 0, 10 \(cell 2 of 2, about \d\d:\d\d left\)", said[1])


@pytest.mark.further
def test_values_that_are_not_positive_are_drawn_too(checkpoint: Path) -> None:
    class Opposite(FrechetDistance):
        def __call__(self, *args: Any) -> dict[str, float]:
            return {"opposite": -super().__call__(*args)["frechet/pixels"]}

    for table in (DDIMTable([2, 3], [0.0], sigma_hat=False), AverageTable(["0.9"]), AverageTable(["raw"])):
        assert all(float(row["opposite"]) < 0 for row in fill(checkpoint, table, scores=[Opposite()]))


# Guidance


class Means(Network):
    """Takes every image for the mean digit of its class, and without a class for the mean zero."""

    image_size, in_channels, num_classes, has_null_label = 8, 1, 10, True

    def __init__(self) -> None:
        super().__init__()
        digits = Digits().load("train").batch(range(1797))
        images = from_uint8(digits["image"])
        means = [images[digits["label"] == label].mean(0) for label in range(10)]
        self.means = nn.Parameter(torch.stack([*means, means[0]]))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        return self.means[(condition or {})["label"]]


def means(guided: bool = True) -> DiffusionModule:
    guidance = ClassifierFree(0.5) if guided else None
    return DiffusionModule(Means(), DiscreteProcess(20), X0(), sampler=DDIM(2), guidance=guidance)


def means_checkpoint(place: Path) -> Path:
    path = place / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": means().state_dict()}, path)
    return path


def test_the_conditional_model_is_recognised_and_the_unconditional_one_is_not(tmp_path: Path) -> None:
    checkpoint, model = means_checkpoint(tmp_path), means()
    scores = [FrechetDistance(), Agreement(), PrecisionRecall()]
    settings: dict[str, Any] = {"scores": scores, "extractor": Pixels(), "num_images": 100, "num_real": 1797}
    rows = fill(checkpoint, GuidanceTable([0.0, -1.0]), model, **settings)
    conditional, unconditional = ({name: float(v or 0) for name, v in row.items() if "/" in name} for row in rows)
    assert [row["row"] for row in rows] == ["0", "-1"]
    assert conditional["agreement_real/pixels"] > 0.95
    assert conditional["agreement/pixels"] == 1
    assert unconditional["agreement/pixels"] == 0.1
    assert conditional["frechet/pixels"] < unconditional["frechet/pixels"]
    assert conditional["precision/pixels"] == unconditional["precision/pixels"] == 1
    assert conditional["recall/pixels"] < 0.1
    records = read_records(tmp_path / "run" / RESULTS)
    assert [record["guidance"]["scale"] for record in records] == [0.0, -1.0]
    assert model.guidance.scale == 0.5, "the model's own scale is back"  # type: ignore[union-attr]
    text = (tmp_path / "run" / "table_guidance.md").read_text()
    assert "| scale | frechet/pixels | agreement/pixels | agreement_real/pixels |" in text
    assert (tmp_path / "run" / "table_guidance.png").stat().st_size > 1000


def test_a_model_without_guidance_has_no_such_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"table: the model is not guided; choose a guidance by --model\.guidance"):
        fill(means_checkpoint(tmp_path), GuidanceTable(), means(guided=False))


# Refusals


def test_the_published_values_are_complete() -> None:
    for rows in PUBLISHED.values():
        assert list(rows) == ["0", "0.2", "0.5", "1", "sigma-hat"]
        assert all(list(row) == [10, 20, 50, 100, 1000] for row in rows.values())
        for row in rows.values():
            assert list(row.values()) == sorted(row.values(), reverse=True)


def test_what_makes_no_table_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    held = tiny.load(checkpoint)
    del held["averages"]
    torch.save(held, tmp_path / "plain.ckpt")
    for make, message in (
        (lambda: DDIMTable(steps=[]), "make no table"),
        (lambda: DDIMTable(etas=[1.5]), "eta=1.5 must lie in"),
        (lambda: SamplerTable(evaluations=[]), "make no table"),
        (lambda: SamplerTable(evaluations=[0]), "from 1 on"),
        (lambda: SamplerTable(samplers={}), "of 0 samplers make no table"),
        (lambda: GuidanceTable([]), "give at least one of --evaluation.table.scales"),
        (lambda: StepTable().cells(tmp_path / "checkpoints" / "last.ckpt"), "holds no step_<n>.ckpt"),
        (lambda: AverageTable().cells(tmp_path / "plain.ckpt"), "holds no averages"),
        (lambda: fill(checkpoint, DDIMTable([2000])), "column 2000: .*steps=2000 must lie in 1 .. 100"),
        (lambda: fill(checkpoint, SamplerTable([200])), "choose others by --evaluation.table.evaluations"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    made = tiny.trainer(tmp_path, callbacks=[Evaluation(None, Pixels(2), 4, 4, table=DDIMTable())], logger=False)
    with pytest.raises(ValueError, match="table: give --ckpt_path CHECKPOINT"):
        made.test(tiny.module(), tiny.data())


def test_a_row_is_named_by_as_many_digits_as_its_number_has() -> None:
    scales = [0.1, 0.123456789, 1e-7, 1.0, 16777217.0, 1 / 3]
    rows = [cell.row for cell in GuidanceTable(scales).cells(Path())]
    assert [float(row) for row in rows] == scales
    assert rows[:4] == ["0.1", "0.123456789", "1e-07", "1"]
    assert {cell.row for cell in DDIMTable([10], [1 / 3, 0.333333]).cells(Path())} >= {repr(1 / 3), "0.333333"}
