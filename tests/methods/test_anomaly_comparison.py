"""The table of detectors: what is chosen by validation images is marked among the scores of test images."""

from pathlib import Path

import pytest

from benchmarks.anomaly import Row, chosen, main
from diffusion_lit.data import ImageData
from diffusion_lit.data.defects import DefectDigits
from diffusion_lit.records import RESULTS, read_records
from tests import tiny
from tests.methods.test_anomaly import data, model, run_test
from tests.tiny import last


def test_settings_are_chosen_for_each_kind_by_the_mean_of_two_scores() -> None:
    rows = [
        Row("a", "1", {"image_AUROC": 0.9, "pixel_AUPRO": 0.5, "pixel_AP": 0.9}, {}),
        Row("a", "2", {"image_AUROC": 0.8, "pixel_AUPRO": 0.7, "pixel_AP": 0.1}, {}),
        Row("b", "", {"image_AUROC": 0.1, "pixel_AUPRO": 0.1}, {}),
    ]
    assert chosen(rows) == {("a", "2"), ("b", "")}


@pytest.mark.further
def test_the_tables_are_of_both_sets_and_mark_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.trainer(tmp_path, max_steps=1).fit(model(), data())
    for source in (DefectDigits((3,), judged="validation"), DefectDigits((3,))):
        run_test(tmp_path, model(table=[10, 30]), ImageData(source, batch_size=32), ckpt_path=str(last(tmp_path)))
    capsys.readouterr()
    main([str(tmp_path)])
    validation, test = capsys.readouterr().out.split("digits with defects (")[1:]
    assert validation.startswith("validation), 46 images")
    assert test.startswith("test), 46 images")
    marked = [
        [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| *")]
        for part in (validation, test)
    ]
    assert marked[0] == marked[1]
    assert [name.split(",")[0] for name in marked[0]] == ["* nearest good image", "* PCA", "* Simplex"]
    record = read_records(tmp_path / RESULTS)[-1]
    assert f"| Simplex, lambda 30, 1 x Ancestral 10, max | {record['scores']['image_AUROC']:.3f} (" in test.replace(
        "* ", ""
    )


def test_runs_of_other_images_are_not_compared(tmp_path: Path) -> None:
    for name, classes in (("a", (3,)), ("b", (4,))):
        tiny.trainer(tmp_path / name, max_steps=1).fit(model(), data(classes))
    with pytest.raises(ValueError, match=r"b was trained on other images than .*a; compare runs of the same data"):
        main([str(tmp_path / "a"), str(tmp_path / "b")])
