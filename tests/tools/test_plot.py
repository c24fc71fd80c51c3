"""The command that draws a run's curves."""

import json
from pathlib import Path

import pytest

from diffusion_lit.callbacks.plots import plot_run
from diffusion_lit.loggers import Curves, read_curves
from diffusion_lit.tools.plot import main


def test_the_curves_of_every_run_are_drawn_and_the_files_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        logger = Curves(str(tmp_path / name))
        for step in range(1, 4):
            logger.log_metrics({"train/loss": 1 / step}, step)
        logger.log_metrics({"frechet/pixels": 2.0}, 3)
        logger.save()
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    expected = [tmp_path / name / file for name in ("a", "b") for file in ("loss.png", "scores.png")]
    assert capsys.readouterr().out.splitlines() == list(map(str, expected))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in expected)


def test_a_directory_without_curves_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=rf"{path.name} has no metrics\.jsonl with losses or scores"):
            main([str(path)])


def test_curves_that_something_else_has_written_are_drawn_as_far_as_they_are_numbers(tmp_path: Path) -> None:
    run = tmp_path / "$\\frac{"
    run.mkdir()
    good = [{"step": n, "train/loss": 1e308 / n, "train/loss$\\x{\x1b[2J": -1e308, "fid": 10.0**-n} for n in (1, 2, 3)]
    bad = [
        '{"step": [1], "fid": 1.0}',
        '{"step": 1e999, "fid": 1.0}',
        f'{{"step": {10**300}, "fid": 1.0}}',
        f'{{"step": 4, "fid": {10**400}}}',
        '{"step": 4, "fid": [1], "train/loss": {"a": 1}, "val/loss": "text"}',
        '{"step": 4, "fid": NaN, "train/loss": "inf"}',
        "[" * 100_000,
        "\x1b[2J",
        "[1]",
    ]
    content = "\n".join([*map(json.dumps, good), *bad, ""]).encode() + b"\xff\xfe\n"
    (run / "metrics.jsonl").write_bytes(content)
    assert [name for name, _ in read_curves(run)["fid"]] == [1, 2, 3, 4]
    assert [path.name for path in plot_run(run)] == ["loss.png", "scores.png"]
