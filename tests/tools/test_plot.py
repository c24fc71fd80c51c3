"""The command that draws a run's curves."""

from pathlib import Path

import pytest

from diffusion_lit.loggers import Curves
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
