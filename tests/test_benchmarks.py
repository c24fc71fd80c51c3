"""That what measures speed runs; nothing here looks at a clock."""

import json
import warnings
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from benchmarks import fast, guidance, latents, precision, scaling, start, suite
from benchmarks.setting import Setting, diffusers_network
from diffusion_lit.methods.consistency import ConsistencyDistillation, ConsistencyTraining, Fixed, Neighbors
from diffusion_lit.recipes import read_file
from tests import systems


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


@pytest.mark.slow
def test_the_suite_compares_with_diffusers_and_writes_every_time(capsys: pytest.CaptureFixture[str]) -> None:
    cases = ["limits", "training", "overhead", "sampling"]
    tiny = ["--rounds", "2", "--batch_sizes", "1", "--sampling", "1", "2", "--width", "32"]
    with warnings.catch_warnings():
        # Diffusers' own, of torch 2.15.
        warnings.simplefilter("ignore", FutureWarning)
        suite.main([*tiny, "--cases", *cases, "--out", "here/found.json"])
    printed = capsys.readouterr().out
    found = json.loads(Path("here/found.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    by_case = {result["case"]: result for result in found["cases"]}
    for name, result in by_case.items():
        assert f"| {name} |" in printed
        for pair, ratio in result["ratios"].items():
            a, b = pair.split(" / ")
            if "times" in result:
                ratios = sorted(times[a] / times[b] for times in result["times"])
                assert [ratio["min"], ratio["max"]] == pytest.approx([ratios[0], ratios[-1]])
    for name in ("training step, batch 1", "DDIM-2, batch 1"):
        assert "ours / diffusers" in by_case[name]["ratios"]
    sampling = by_case["DDIM-2, batch 1"]
    rate = sampling["gflop_per_s"] * sampling["seconds"]["ours"]["median"]
    assert rate == pytest.approx(2 * found["machine"]["gflop"], rel=1e-6)
    assert sampling["of_limit"] == pytest.approx(sampling["gflop_per_s"] / by_case["limit: convolution"]["gflop_per_s"])
    rest = by_case["Lightning's share, batch 1"]["times"]
    assert all(times["the rest"] + times["its parts"] == pytest.approx(times["step"]) for times in rest)
    assert all(0 < times["the rest"] < times["step"] for times in rest)


def test_the_networks_that_are_compared_have_ddpms_size_and_arithmetic() -> None:
    setting = Setting(torch.device("cpu"), False, 2, [1], (1, 1))
    with torch.device("meta"):
        assert sum(p.numel() for p in diffusers_network(128).parameters()) == 35_746_307
    assert setting.gflop == pytest.approx(12.44, abs=0.01)


def test_sending_gradients_takes_what_rings_take() -> None:
    rates = scaling.Rates(flops=1e12, nvlink=1e9, card=1e8)
    # Of 8 bytes each of two GPUs sends one half, gets the sum of the other and passes it on: 8 in all.
    assert rates.all_reduce(8e9, 2) == pytest.approx(8)
    # Two nodes of eight: 14/8 of all within, and of the eighth that each GPU has then, all of it between.
    assert rates.all_reduce(8e9, 16) == pytest.approx(14 + 10)
    found = scaling.scale(1_000, 1e6, 64, 2, rates)
    assert found["computing"] == pytest.approx(32e-6)
    assert found["share"] == pytest.approx(4e-6 / 36e-6)
    assert scaling.scale(1_000, 1e6, round(found["batch"]), 2, rates)["share"] == pytest.approx(0.1, rel=0.01)


def test_bf16_is_judged_by_the_range_of_float32_s_seeds() -> None:
    exact = [{10: 1.0, 20: 0.5}, {10: 1.2, 20: 0.7}, {10: 1.1, 20: 0.9}]
    rounded = [{10: 1.0, 20: 0.6}, {10: 1.3, 20: 0.7}, {10: 1.15, 20: 1.5}]
    found = precision.compare({"float32": exact, "bf16": rounded})
    assert [found["same_seed"][end] for end in ("min", "max")] == pytest.approx([1.0, 1.5 / 0.9])
    assert [found["of_range"][end] for end in ("min", "max")] == pytest.approx([0.0, 0.6 / 0.4])
    assert [found["seeds"][end] for end in ("min", "max")] == pytest.approx([0.5 / 0.7, 0.9 / 0.7])


def test_losses_of_an_earlier_run_are_compared_again(capsys: pytest.CaptureFixture[str]) -> None:
    curves = {name: [{10: 1.0, 20: 0.5}, {10: 1.2, 20: 0.7}] for name in ("float32", "bf16")}
    precision.show({"cpu": "here"}, curves, {name: [0.5, 0.6] for name in curves}, Path("first.json"))
    first = capsys.readouterr().out
    precision.main(["--read", "first.json", "--out", "second.json"])
    assert capsys.readouterr().out.replace("second", "first") == first
    assert Path("first.json").read_text() == Path("second.json").read_text()


def test_the_share_of_the_frozen_encoder_is_told_beside_a_step_without_it(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(repository / "configs" / "latent_demo.yaml")
    latents.main(["--config", config, "--batch_size", "2", "--rounds", "2", "--out", "here/found.json"])
    printed = capsys.readouterr().out
    found = json.loads(Path("here/found.json").read_text())
    for name, (a, b) in latents.RATIOS.items():
        assert name in printed
        ratios = sorted(times[a] / times[b] for times in found["times"])
        assert [found["ratios"][name][end] for end in ("min", "max")] == pytest.approx(ratios)
    with pytest.raises(ValueError, match=r"digits.yaml has no first stage; choose a recipe of latent diffusion"):
        latents.main(["--config", str(repository / "configs" / "digits.yaml")])


@pytest.mark.further
def test_a_teacher_and_an_averaged_target_hold_a_network_each(tmp_path: Path) -> None:
    teacher = systems.teacher(tmp_path)
    pairs = Neighbors(Fixed(6))
    for networks, objective in (
        (0, ConsistencyTraining(pairs)),
        (1, ConsistencyTraining(pairs, decay=0.9)),
        (1, ConsistencyDistillation(str(teacher), pairs)),
        (2, ConsistencyDistillation(str(teacher), pairs, decay=0.9)),
    ):
        found = fast.training_bytes(systems.consistency(objective), torch.zeros(2, 1, 8, 8))
        assert found["held"] == pytest.approx(networks * found["weights"], abs=1000)
        assert found["step"] > 0


def test_students_are_compared_as_they_are_at_the_end_of_their_stages(repository: Path) -> None:
    recipe = read_file(repository / "configs" / "progressive_digits.yaml")
    stages = recipe["model"]["objective"]["stages"]
    ends = dict(zip([2**i for i in reversed(range(len(stages)))], accumulate(stages), strict=True))
    kept = recipe["checkpoints"]["keep_every_n_steps"]
    for steps, name in fast.STUDENTS.items():
        assert name == ("last" if ends[steps] == recipe["trainer"]["max_steps"] else f"step_{ends[steps]:08d}")
        assert ends[steps] % kept == 0


def test_the_verdict_names_the_best_of_few_evaluations() -> None:
    cells = [fast.Cell("DDIM", "edm", None, 10), fast.Cell("a", "ct", None, 2), fast.Cell("b", "ct", None, 4)]
    scores = {"DDIM, 10": 0.5, "a, 2": 0.4, "b, 4": 0.1}
    assert "a, 2: 0.4, better than the best DDIM with 10: 0.5" in fast.verdict(cells, scores)
    assert "a, 2: 0.6, not better than" in fast.verdict(cells, {**scores, "a, 2": 0.6})


@pytest.mark.further
def test_starts_are_timed_and_one_that_fails_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    start.main(["--rounds", "1"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in start.STARTS]
    with pytest.raises(RuntimeError, match="ended with 3"):
        start.seconds(["-c", "raise SystemExit(3)"])
