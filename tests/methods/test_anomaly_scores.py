"""Scores of anomaly maps: hand-made cases, scikit-learn's curves, and what intervals must cover."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from diffusion_lit.methods.anomaly.scores import (
    Scoring,
    Truth,
    aupro,
    from_counts,
    largest_f1,
    overlap,
    score,
    smooth_frames,
    validation_images,
)


def by_definition(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Anomalib's definition: the mean over regions of the ROC curve of background and region, up to a limit."""
    areas = []
    background = maps[~masks]
    for image, mask in zip(maps, masks, strict=True):
        regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
        for number in range(1, count + 1):
            inside = image[regions == number]
            truth = np.concatenate([np.zeros(len(background)), np.ones(len(inside))])
            rate, overlap_, _ = roc_curve(truth, np.concatenate([background, inside]), drop_intermediate=False)
            at_limit = np.interp(limit, rate, overlap_)
            kept = rate <= limit + 1e-12
            areas.append(np.trapezoid([*overlap_[kept], at_limit], [*rate[kept], limit]) / limit)
    return float(np.mean(areas))


def random_case(seed: int, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    masks = ndimage.zoom(random.random((4, 4, 4)), (1, 4, 4), order=0) > 0.75
    maps = random.normal(size=masks.shape) + 1.2 * masks
    return (maps if levels is None else np.round(maps * levels) / levels), masks


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_is_the_area_under_the_mean_curve_of_the_regions(levels: int | None, limit: float) -> None:
    for seed in range(3):
        maps, masks = random_case(seed, levels)
        assert aupro(maps, masks, limit) == pytest.approx(by_definition(maps, masks, limit), abs=1e-9)


# Of anomalib 2.7.0, class _AUPRO on a CPU, for these maps through a sigmoid: (seed, levels, limit) of `random_case`.
ANOMALIB = {
    (0, None, 0.05): 0.21707999706,
    (0, None, 0.3): 0.51802510023,
    (0, None, 1.0): 0.81409764290,
    (0, 2, 0.05): 0.20823533833,
    (0, 2, 0.3): 0.49440887570,
    (0, 2, 1.0): 0.80429255962,
    (1, None, 0.3): 0.54700905085,
    (1, 2, 0.3): 0.53049391508,
    (2, None, 0.3): 0.56800293922,
    (2, 2, 0.3): 0.55679756403,
}


@pytest.mark.parametrize(("setting", "published"), ANOMALIB.items())
def test_aupro_is_anomalib_s(setting: tuple[int, int | None, float], published: float) -> None:
    seed, levels, limit = setting
    assert aupro(*random_case(seed, levels), limit) == pytest.approx(published, abs=1e-6)


def test_aupro_is_anomalib_s_of_a_hand_made_case() -> None:
    masks = np.zeros((2, 6, 6), dtype=bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True
    masks[0, 4:, 3:] = True
    masks[1, 2, 1:5] = True
    n = np.arange(72).reshape(2, 6, 6)
    maps = (n * 31 % 72) / 80 + 0.3 * masks * ((n * 7 % 5) / 4)
    assert aupro(maps, masks, 0.1) == pytest.approx(0.12037038803, abs=1e-6)
    # Anomalib places the curves of the regions on a common number of points; with 60 pixels of background it shows.
    for limit, published in ((0.3, 0.16975310445), (0.5, 0.23379629850)):
        assert aupro(maps, masks, limit) == pytest.approx(published, abs=3e-3)
        assert aupro(maps, masks, limit) == pytest.approx(by_definition(maps, masks, limit), abs=1e-9)


def test_aupro_of_hand_made_cases() -> None:
    masks = np.zeros((1, 4, 5), dtype=bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # One region: they touch at a corner.
    masks[0, 3, 3:] = True
    background = np.flatnonzero(~masks.ravel())
    assert len(background) == 16
    maps: np.ndarray = np.zeros(20)
    maps[background] = np.arange(16)
    maps = np.reshape(maps, (1, 4, 5))
    maps[masks] = 99
    assert aupro(maps, masks, 0.25) == 1
    maps[masks] = -1
    assert aupro(maps, masks, 0.25) == 0
    # The second region is found from the start; of the first one pixel after two of 16 background pixels.
    maps[masks] = 99
    maps[0, 0, 0] = 13.5
    assert aupro(maps, masks, 0.25) == pytest.approx((1 + (1 + 0.5) / 2) / 2)


def test_aupro_counts_a_small_region_as_much_as_a_large_one() -> None:
    masks = np.zeros((1, 20, 20), dtype=bool)
    masks[0, :10, :10] = masks[0, 15, 15] = True
    maps = np.random.default_rng(0).random((1, 20, 20))
    maps[0, :10, :10] = 2
    maps[0, 15, 15] = -1
    assert aupro(maps, masks) == pytest.approx(0.5)


def test_maps_that_say_nothing_have_half_of_the_limit() -> None:
    _, masks = random_case(0)
    assert aupro(np.zeros(masks.shape), masks, 0.3) == pytest.approx(0.15)


@pytest.mark.parametrize("levels", [1, 4, None])
def test_scores_from_counts_are_scikit_learn_s(levels: int | None) -> None:
    random = np.random.default_rng(5)
    labels = random.random(80) < 0.3
    values = random.normal(size=80) + labels
    values = values if levels is None else np.round(values * levels)
    _, place = np.unique(values, return_inverse=True)
    positive, negative = (np.bincount(place[which], minlength=place.max() + 1)[None] for which in (labels, ~labels))
    found = from_counts(positive.astype(float), negative.astype(float))
    assert found["AUROC"][0] == pytest.approx(roc_auc_score(labels, values))
    assert found["AP"][0] == pytest.approx(average_precision_score(labels, values))
    precision, recall, _ = precision_recall_curve(labels, values)
    assert found["F1Max"][0] == pytest.approx(np.nanmax(2 * precision * recall / (precision + recall)))


def test_the_largest_f1_is_reached_at_its_threshold() -> None:
    labels = np.array([False, True, False, True, True])
    value, threshold = largest_f1(labels, np.array([0.1, 0.2, 0.3, 0.4, 0.5]))
    marked = np.array([0.1, 0.2, 0.3, 0.4, 0.5]) >= threshold
    assert value == pytest.approx(2 * (marked & labels).sum() / (marked.sum() + labels.sum())) == pytest.approx(6 / 7)


def test_dice_and_iou_of_hand_made_masks() -> None:
    masks = np.zeros((3, 2, 4), dtype=bool)
    masks[0, 0] = True  # 4 pixels, 2 of them marked, and 2 others
    masks[1, 1, :2] = True
    marked = np.zeros_like(masks)
    marked[0, :, :2] = True
    truth = Truth(["a", "a", "good"], masks, np.array([True, True, True]))
    found = overlap(truth, marked)
    assert found["pixel_Dice"].tolist() == [0.5, 0]
    assert found["pixel_IoU"].tolist() == pytest.approx([1 / 3, 0])


def case(seed: int = 0, count: int = 24) -> tuple[Truth, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    defects = [("good", "hole", "crack")[i % 3] for i in range(count)]
    masks = np.zeros((count, 12, 12), dtype=bool)
    for i, defect in enumerate(defects):
        if defect != "good":
            masks[i, i % 8 : i % 8 + 3, 2:6] = True
    maps = random.normal(size=masks.shape) + 1.5 * masks
    return Truth(defects, masks, np.ones(count, dtype=bool)), maps, maps.max((1, 2))


def test_scores_are_for_all_defects_and_for_each_with_all_good_images() -> None:
    truth, maps, scores = case()
    found, intervals, threshold = score(truth, maps, scores, resamples=50)
    assert threshold is not None
    hole = np.array([defect != "crack" for defect in truth.defects])
    assert found["hole/image_AUROC"] == pytest.approx(roc_auc_score(truth.bad[hole], scores[hole]))
    assert found["pixel_AUROC"] == pytest.approx(roc_auc_score(truth.masks.ravel(), maps.ravel()))
    assert found["hole/pixel_AUPRO"] == pytest.approx(by_definition(maps[hole], truth.masks[hole], 0.3))
    names = ["image_AUROC", "image_AP", "image_F1Max", "pixel_AUROC", "pixel_AP", "pixel_F1Max", "pixel_AUPRO"]
    names += ["pixel_Dice", "pixel_IoU"]
    assert list(found) == [*names, *(f"{d}/{name}" for d in ("hole", "crack") for name in names)]
    assert intervals.keys() == found.keys()


def test_dice_is_at_a_threshold_of_other_images() -> None:
    truth, maps, scores = case()
    validation = validation_images(truth.defects, 0.5)
    assert [
        sum(validation[i] for i, d in enumerate(truth.defects) if d == defect) for defect in set(truth.defects)
    ] == [4] * 3
    found, _, threshold = score(truth, maps, scores)
    _, expected = largest_f1(truth.masks[validation].ravel(), maps[validation].ravel())
    assert threshold == expected
    others = truth.chosen(~validation)
    dice = overlap(others, maps[~validation] >= expected)["pixel_Dice"].mean()
    assert found["pixel_Dice"] == pytest.approx(dice)
    maps[~validation] += 100
    assert score(truth, maps, scores)[2] == expected
    assert "pixel_Dice" not in score(truth, maps, scores, share=0)[0]


def test_intervals_hold_the_scores_and_narrow_with_more_images() -> None:
    few, many = (score(*case(3, count), resamples=300) for count in (24, 384))
    for name in ("image_AUROC", "image_AP", "pixel_AUROC", "pixel_AP", "pixel_AUPRO", "pixel_F1Max", "pixel_Dice"):
        for found, intervals, _ in (few, many):
            low, high = intervals[name]
            assert low - 0.01 <= found[name] <= high + 0.01, name
        widths = [intervals[name][1] - intervals[name][0] for _, intervals, _ in (few, many)]
        assert widths[1] < 0.5 * widths[0], name


def test_an_interval_of_the_image_auroc_has_the_width_that_theory_gives() -> None:
    # Hanley & McNeil 1982, for 200 and 200 normal scores.
    random = np.random.default_rng(1)
    bad = np.arange(400) % 2 == 1
    scores = random.normal(size=400) + bad
    truth = Truth(["bad" if b else "good" for b in bad], np.zeros((400, 1, 1), dtype=bool), ~bad)
    found, intervals, _ = score(truth, np.zeros((400, 1, 1)), scores, resamples=2000)
    a = found["image_AUROC"]
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    error = np.sqrt((a * (1 - a) + 199 * (q1 - a**2) + 199 * (q2 - a**2)) / 200**2)
    low, high = intervals["image_AUROC"]
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.1)


def test_sets_without_a_defective_pixel_have_no_part_in_intervals() -> None:
    truth, maps, scores = case()
    # Of the defective images one alone has a mask that is not empty: some sets do not have it.
    first = int(np.flatnonzero(truth.bad)[0])
    few = Truth(truth.defects, truth.masks & (np.arange(24) == first)[:, None, None], truth.masked)
    found, intervals, _ = score(few, maps, scores, resamples=200)
    for name in ("pixel_AUROC", "pixel_AUPRO", "pixel_AP"):
        assert np.isfinite(intervals[name]).all(), name
        assert intervals[name][0] - 0.05 <= found[name] <= intervals[name][1] + 0.05, name


def test_defects_without_masks_have_image_scores_only() -> None:
    truth, maps, scores = case()
    masked = np.array([defect != "crack" for defect in truth.defects])
    hidden = Truth(truth.defects, truth.masks & masked[:, None, None], masked)
    found = score(hidden, maps, scores)[0]
    assert [name for name in found if name.startswith("crack/pixel")] == []
    assert "crack/image_AUROC" in found
    assert found["pixel_AUROC"] == pytest.approx(roc_auc_score(truth.masks[masked].ravel(), maps[masked].ravel()))


def test_scores_need_both_kinds_of_images_and_finite_maps() -> None:
    truth, maps, scores = case()
    with pytest.raises(ValueError, match="need good and defective images"):
        score(truth.chosen(truth.bad), maps[truth.bad], scores[truth.bad])
    maps[3, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        score(truth, maps, scores)


def test_scores_of_frames_are_smoothed_within_their_clip() -> None:
    defects = ["good"] * 5 + ["fall"] * 5
    scores = np.array([0.0] * 5 + [0, 0, 1, 0, 0])
    smoothed = smooth_frames(scores, defects, 1.0)
    assert (smoothed[:5] == 0).all()
    assert smoothed[5:].sum() == pytest.approx(1, abs=0.02)
    assert smoothed[7] == pytest.approx(0.4, abs=0.01)
    assert (smooth_frames(scores, defects, 0.0) == scores).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 1.0}, "share=1.0"),
        ({"resamples": -1}, "resamples=-1"),
        ({"batch_size": 0}, "model.scoring.batch_size=0"),
    ],
)
def test_settings_of_scores_out_of_range_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scoring(**settings)  # type: ignore[arg-type]
