"""That what measures speed runs; nothing here looks at a clock."""

import json
from pathlib import Path

import pytest

from benchmarks import guidance


def test_the_cost_of_guidance_is_told_with_its_control_and_its_machine(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(repository / "configs" / "digits_cfg.yaml")
    guidance.main(
        ["--config", config, "--batch_size", "2", "--steps", "1", "--rounds", "2", "--out", "here/found.json"]
    )
    printed = capsys.readouterr().out
    found = json.loads(Path("here/found.json").read_text())
    assert f"torch {found['machine']['torch']}" in printed
    assert len(found["times"]) == 2
    for name, (a, b) in guidance.RATIOS.items():
        assert name in printed
        ratios = sorted(times[a] / times[b] for times in found["times"])
        assert found["ratios"][name]["median"] == pytest.approx(sum(ratios) / 2)
        assert [found["ratios"][name][end] for end in ("min", "max")] == pytest.approx(ratios)


def test_a_recipe_without_guidance_is_refused(repository: Path) -> None:
    with pytest.raises(ValueError, match=r"digits.yaml has no guidance; choose a recipe that has"):
        guidance.main(["--config", str(repository / "configs" / "digits.yaml")])
