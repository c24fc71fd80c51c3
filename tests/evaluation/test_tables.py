"""Tables are filled for a checkpoint by the command line, and what is done is not done again."""

import csv
import os
from pathlib import Path

import pytest
from PIL import Image

from diffusion_lit import cli
from diffusion_lit.evaluation.tables import PUBLISHED, AverageTable, DDIMTable, SamplerTable, StepTable
from diffusion_lit.records import RESULTS, read_records
from tests.test_cli import AVERAGES, CPU, QUIET, fit_args

SAMPLERS = ("Ancestral", "DDIM", "DPMSolver", "Heun")
NUMBERS = ["--evaluation.num_images=12", "--evaluation.batch_size=6", "--trainer.limit_test_batches=1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tables") / "run"
    snapshots = ["--checkpoints.keep_every_n_steps", "1", "--frechet.every_n_steps", "null"]
    cli.main(fit_args(run, *QUIET, *AVERAGES, *snapshots, max_steps=3))
    return run / "checkpoints" / "last.ckpt"


def table(checkpoint: Path, *args: str) -> list[dict[str, str]]:
    cli.main(["table", "--ckpt_path", str(checkpoint), *CPU, *QUIET, *NUMBERS, *args])
    [newest] = sorted(checkpoint.parent.parent.glob("table_*.csv"), key=os.path.getmtime)[-1:]
    with newest.open(newline="") as file:
        return list(csv.DictReader(file))


def test_ddims_table_has_every_cell_once_and_the_published_values_beside_it(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    rows = table(checkpoint, "--table.steps=[2,10]", "--table.etas=[0,1]")
    assert [(row["row"], row["column"]) for row in rows] == [
        (name, steps) for name in ("0", "1", "sigma-hat") for steps in ("2", "10")
    ]
    assert [row["evaluations"] for row in rows] == ["2", "10"] * 3
    assert [row["published"] for row in rows] == ["", "13.36", "", "41.07", "", "367.43"]
    records = read_records(run / RESULTS)
    assert [record["scores"]["frechet/pixels"] for record in records] == [float(row["frechet/pixels"]) for row in rows]
    assert [record["sampler"]["class"] for record in records] == ["DDIM"] * 4 + ["Ancestral"] * 2
    assert all(record["sampler"]["grid"] == {"class": "Quadratic"} for record in records)
    assert not any(record["sampler"]["clip"] for record in records)
    text = (run / "table_ddim.md").read_text()
    assert "| eta \\ steps | 2 | 10 |" in text
    assert "(13.36)" in text
    with Image.open(run / "table_ddim.png") as picture:
        assert picture.size == (990, 495)

    # A wider table: only the new cells are computed.
    rows_of_more = table(checkpoint, "--table.steps=[2,3,10]", "--table.etas=[0,1]")
    records = read_records(run / RESULTS)
    assert [record["evaluations"] for record in records[6:]] == [3, 3, 3]
    same = [row["frechet/pixels"] for row in rows_of_more if row["column"] != "3"]
    assert same == [row["frechet/pixels"] for row in rows]
    # Another number of images is another table.
    table(checkpoint, "--table.steps=[2]", "--table.etas=[0]", "--table.sigma_hat=false", "--evaluation.num_images=6")
    assert len(read_records(run / RESULTS)) == 10


def test_every_sampler_is_scored_with_no_more_evaluations_than_its_column_says(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    before = len(read_records(run / RESULTS))
    rows = table(checkpoint, "--table", "SamplerTable", "--table.evaluations=[2,5]")
    records = read_records(run / RESULTS)[before:]
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
    one = '{"DDIM": {"class_path": "DDIM", "init_args": {"steps": 7}}}'
    again = table(checkpoint, "--table", "SamplerTable", "--table.evaluations=[2,3]", "--table.samplers", one)
    assert again[0]["frechet/pixels"] == next(row["frechet/pixels"] for row in rows if row["row"] == "DDIM")
    assert [record["evaluations"] for record in read_records(run / RESULTS)[before + len(rows) :]] == [3]


def test_averages_and_steps_have_tables_too(checkpoint: Path) -> None:
    run = checkpoint.parent.parent
    rows = table(checkpoint, "--table", "AverageTable")
    assert [row["row"] for row in rows] == ["0.5", "0.9", "raw"]
    assert len({row["frechet/pixels"] for row in rows}) == 3
    before = len(read_records(run / RESULTS))
    rows = table(checkpoint, "--table", "StepTable")
    assert [row["row"] for row in rows] == ["1", "2", "3"]
    records = read_records(run / RESULTS)[before:]
    # The last step's primary average is scored already.
    assert [record["step"] for record in records] == [1, 2]
    assert Path(records[0]["checkpoint"]).name == "step_00000001.ckpt"
    assert {"table_averages.png", "table_steps.png"} <= {path.name for path in run.iterdir()}


def test_the_published_values_are_complete() -> None:
    for rows in PUBLISHED.values():
        assert list(rows) == ["0", "0.2", "0.5", "1", "sigma-hat"]
        assert all(list(row) == [10, 20, 50, 100, 1000] for row in rows.values())
        for row in rows.values():
            assert list(row.values()) == sorted(row.values(), reverse=True)


def test_what_makes_no_table_is_refused(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for make, message in (
        (lambda: DDIMTable(steps=[]), "make no table"),
        (lambda: DDIMTable(etas=[1.5]), "eta=1.5 must lie in"),
        (lambda: SamplerTable(evaluations=[]), "make no table"),
        (lambda: SamplerTable(evaluations=[0]), "from 1 on"),
        (lambda: SamplerTable(samplers={}), "of 0 samplers make no table"),
        (lambda: StepTable().cells(tmp_path / "checkpoints" / "last.ckpt"), "holds no step_<n>.ckpt"),
        (lambda: AverageTable().cells(without_averages(checkpoint, tmp_path)), "holds no averages"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for args, message in (
        (["table", *CPU], "--ckpt_path"),
        (["table", "--ckpt_path", str(checkpoint), *CPU, "--table.steps=[2000]"], "2000 must lie in 1 .. 1000"),
    ):
        with pytest.raises(SystemExit):
            cli.main(args)
        assert message in capfd.readouterr().err.splitlines()[-1]


def without_averages(checkpoint: Path, place: Path) -> Path:
    import torch

    held = torch.load(checkpoint, weights_only=True)
    del held["averages"]
    torch.save(held, place / "plain.ckpt")
    return place / "plain.ckpt"
