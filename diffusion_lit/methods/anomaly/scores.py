"""How well maps and scores find defects: by image, by pixel and by region, for all defects and for each class of them.

Names follow anomalib. Intervals are from images drawn anew with replacement, good and defective ones apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from diffusion_lit.data.mvtec import GOOD
from diffusion_lit.requests import Requests
from diffusion_lit.types import Part

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

LIMIT = 0.3
"""False positive rate up to which AUPRO is integrated."""
BINS = 2000
"""Levels of a map that intervals are computed from; the scores themselves are computed from all values."""


@dataclass(frozen=True)
class Truth:
    """What is known of N images.

    Attributes:
        defects: Class of each, "good" or the name of a defect.
        masks: Where the defect is, (N, H, W).
        masked: Whether the mask is known, (N,).
    """

    defects: Sequence[str]
    masks: Flags
    masked: Flags

    @property
    def bad(self) -> Flags:
        """Which images are defective, (N,)."""
        return np.array([defect != GOOD for defect in self.defects])

    def chosen(self, which: Flags) -> "Truth":
        """The same of some images."""
        defects = [defect for defect, is_chosen in zip(self.defects, which, strict=True) if is_chosen]
        return Truth(defects, self.masks[which], self.masked[which])


class Scoring(Part):
    """How `test` scores what was found.

    Args:
        batch_size: Images at once in each process.
        share: Of the test images of each class, those that the threshold for Dice and IoU is found on.
        resamples: Sets of images for 95 % intervals; 0: no intervals.
        frame_smoothing: Standard deviation in frames of the Gaussian that the scores of each folder are smoothed by, in
            the order of their names: for frames of videos; 0: they are not.
        seed: Of the noise: what is found in image i depends on it and on i.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        batch_size: int = 16,
        share: float = 0.5,
        resamples: int = 1000,
        frame_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        Requests(1, batch_size, seed=seed, section="model.scoring")
        if not 0 <= share < 1:
            raise ValueError(f"scoring.share={share} must lie in [0, 1); 0.5 finds the threshold on every other image")
        if resamples < 0 or not frame_smoothing >= 0:
            raise ValueError(f"scoring: resamples={resamples} and frame_smoothing={frame_smoothing} must be at least 0")
        self.batch_size = batch_size
        self.share = share
        self.resamples = resamples
        self.frame_smoothing = frame_smoothing
        self.seed = seed


def score(
    truth: Truth, maps: Array, scores: Array, share: float = 0.5, resamples: int = 0, seed: int = 0
) -> tuple[dict[str, float], dict[str, list[float]], float | None]:
    """Computes all scores.

    Args:
        truth: Of N images, some good and some defective.
        maps: Larger where an image is less like the good ones, (N, H, W).
        scores: Of the images, (N,).
        share: Of the images of each class, those that a threshold for Dice and IoU is found on; they are left out of
            these two. 0: there are none.
        resamples: Sets of images for 95 % intervals; 0: there are no intervals.
        seed: Decides these sets.

    Returns:
        Scores by name; intervals by name, [low, high]; and the threshold. Names are `image_AUROC` and so on, and
        `<defect>/image_AUROC` for one class of defects and all good images. Of defects without masks there are image
        scores only.

    Raises:
        ValueError: If there are no good or no defective images, or a map is not finite.
    """
    if truth.bad.all() or not truth.bad.any():
        raise ValueError(f"scores need good and defective images, and all {len(truth.bad)} are of one kind")
    if not np.isfinite(maps).all():
        raise ValueError("a map of anomalies is not finite; the model diverged")
    validation = validation_images(truth.defects, share)
    threshold = best_threshold(truth.chosen(validation), maps[validation])
    found: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    for prefix, which in groups(truth):
        part = truth.chosen(which), maps[which], scores[which]
        found |= {prefix + name: value for name, value in values(*part).items()}
        tested = which & ~validation
        overlaps: dict[str, Array] = {}
        if threshold is not None:
            overlaps = overlap(truth.chosen(tested), maps[tested] >= threshold)
            found |= {prefix + name: float(values_.mean()) for name, values_ in overlaps.items()}
        if resamples:
            spread = {**resampled(*part, resamples, seed), **resampled_means(overlaps, resamples, seed)}
            for name, drawn in spread.items():
                intervals[prefix + name] = np.quantile(drawn, [0.025, 0.975]).tolist()
    return found, intervals, threshold


def groups(truth: Truth) -> Iterator[tuple[str, Flags]]:
    """All images, then each class of defects with all good ones, with the prefix of their scores' names."""
    yield "", np.ones(len(truth.defects), dtype=bool)
    classes = [defect for defect in dict.fromkeys(truth.defects) if defect != GOOD]
    for defect in classes if len(classes) > 1 else ():
        yield f"{defect}/", np.array([other in (defect, GOOD) for other in truth.defects])


def values(truth: Truth, maps: Array, scores: Array) -> dict[str, float]:
    """The scores that need no threshold."""
    found = {f"image_{name}": value for name, value in ranking(truth.bad, scores).items()}
    masks, known = truth.masks[truth.masked], maps[truth.masked]
    if masks.any():
        found |= {f"pixel_{name}": value for name, value in ranking(masks.ravel(), known.ravel()).items()}
        found["pixel_AUPRO"] = aupro(known, masks)
    return found


def ranking(labels: Flags, scores: Array) -> dict[str, float]:
    """Area under the ROC curve, average precision, and the largest F1 over all thresholds."""
    return {
        "AUROC": float(roc_auc_score(labels, scores)),
        "AP": float(average_precision_score(labels, scores)),
        "F1Max": largest_f1(labels, scores)[0],
    }


def largest_f1(labels: Flags, scores: Array) -> tuple[float, float]:
    """The largest F1, and the threshold from which on it is reached."""
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    return float(f1[best]), float(thresholds[best])


def aupro(maps: Array, masks: Flags, limit: float = LIMIT) -> float:
    """Area under the curve of per-region overlap over the false positive rate, up to a limit and divided by it.

    A region is a connected set of pixels, also across corners. The overlap is the share of a region's pixels that a
    threshold finds, averaged over regions; the false positive rate is that of all pixels outside of masks. So each
    pixel of a region adds the length of the axis from its own false positive rate to the limit. Where background
    pixels have the same value, the curve is a straight line.

    Args:
        maps: (N, H, W).
        masks: (N, H, W), with at least one region.
        limit: In (0, 1].

    Source: Bergmann et al. 2020 (uninformed students), section 4; anomalib's AUPRO, with its limit of 0.3.
    """
    background = np.sort(maps[~masks])
    total = []
    for image, mask in zip(maps, masks, strict=True):
        numbers, count = ndimage.label(mask, structure=np.ones((3, 3)))
        for region in range(1, count + 1):
            found = image[numbers == region]
            above = (len(background) - np.searchsorted(background, found, "right")) / len(background)
            reached = (len(background) - np.searchsorted(background, found, "left")) / len(background)
            total.append(length_to(above, reached, limit).mean() / limit)
    return float(np.mean(total))


def length_to(start: Array, end: Array, limit: float) -> Array:
    """Area up to a limit under lines that rise from 0 at `start` to 1 at `end` and stay there."""
    rising = np.clip(np.minimum(end, limit) - start, 0, None)
    height = rising / np.maximum(end - start, 1e-300)
    area: Array = rising * height / 2 + np.clip(limit - end, 0, None)
    return area


def validation_images(defects: Sequence[str], share: float) -> Flags:
    """Which images a threshold is found on: of each class evenly spread ones, this share of them, (N,)."""
    chosen = np.zeros(len(defects), dtype=bool)
    for defect in set(defects):
        places = np.flatnonzero([other == defect for other in defects])
        counts = np.floor(np.arange(1, len(places) + 1) * share + 1e-9)
        chosen[places] = np.diff(counts, prepend=0) > 0
    return chosen


def best_threshold(truth: Truth, maps: Array) -> float | None:
    """The value of a map with the largest F1 over pixels; None if there are no masks to find it by."""
    masks = truth.masks[truth.masked]
    return largest_f1(masks.ravel(), maps[truth.masked].ravel())[1] if masks.any() else None


def overlap(truth: Truth, marked: Flags) -> dict[str, Array]:
    """Dice and IoU of each defective image whose mask is known, (n,); nothing if there is none."""
    which = truth.masked & truth.masks.any((1, 2))
    both = (truth.masks & marked)[which].sum((1, 2))
    sizes = truth.masks[which].sum((1, 2)) + marked[which].sum((1, 2))
    return {"pixel_Dice": 2 * both / sizes, "pixel_IoU": both / (sizes - both)} if which.any() else {}


def smooth_frames(scores: Array, defects: Sequence[str], std: float) -> Array:
    """Scores, (N,), smoothed over time within each folder; images are in the order of their frames."""
    smoothed = scores.copy()
    for defect in set(defects) if std else ():
        which = np.array([other == defect for other in defects])
        smoothed[which] = ndimage.gaussian_filter1d(scores[which], std, mode="nearest")
    return smoothed


# Intervals


def resampled(truth: Truth, maps: Array, scores: Array, resamples: int, seed: int) -> dict[str, Array]:
    """The scores of `values` for sets of images that are drawn anew, (resamples,) each; fewer where a set has none."""
    weights = draw_weights(truth.bad, resamples, seed)
    _, place = np.unique(scores, return_inverse=True)
    one_hot = np.eye(int(place.max()) + 1)[place]
    found = from_counts(weights @ (one_hot * truth.bad[:, None]), weights @ (one_hot * ~truth.bad[:, None]))
    drawn = {f"image_{name}": value for name, value in found.items()}
    masks, known, weights = truth.masks[truth.masked], maps[truth.masked], weights[:, truth.masked]
    # A set without any defective pixel, or any good one, has no scores of pixels.
    weights = weights[(weights @ masks.sum((1, 2)) > 0) & (weights @ (~masks).sum((1, 2)) > 0)]
    if not len(weights):
        return drawn
    edges = np.unique(np.quantile(known.ravel(), np.linspace(0, 1, BINS + 1)[1:-1]))
    level = np.searchsorted(edges, known, "right")
    inside = np.stack(
        [np.bincount(image[mask], minlength=len(edges) + 1) for image, mask in zip(level, masks, strict=True)]
    )
    outside = np.stack(
        [np.bincount(image[~mask], minlength=len(edges) + 1) for image, mask in zip(level, masks, strict=True)]
    )
    positive, negative = weights @ inside, weights @ outside
    drawn |= {f"pixel_{name}": value for name, value in from_counts(positive, negative).items()}
    reached = negative[:, ::-1].cumsum(1)[:, ::-1] / negative.sum(1, keepdims=True)
    above = np.concatenate([reached[:, 1:], np.zeros((len(weights), 1))], axis=1)
    lengths = length_to(above, reached, LIMIT) / LIMIT
    areas, owners = region_histograms(level, masks, len(edges) + 1)
    of_regions = weights[:, owners]
    drawn["pixel_AUPRO"] = (of_regions * (lengths @ areas.T)).sum(1) / of_regions.sum(1)
    return drawn


def draw_weights(bad: Flags, resamples: int, seed: int) -> Array:
    """How often each image is in each set: as many good and as many defective ones as there are, (resamples, N)."""
    random = np.random.default_rng(seed)
    weights = np.zeros((resamples, len(bad)))
    for kind in (bad, ~bad):
        weights[:, kind] = random.multinomial(kind.sum(), np.full(kind.sum(), 1 / kind.sum()), size=resamples)
    return weights


def from_counts(positive: Array, negative: Array) -> dict[str, Array]:
    """`ranking` of counts at each level, (R, levels), from the least level up: (R,) each."""
    found = positive[:, ::-1].cumsum(1)
    false = negative[:, ::-1].cumsum(1)
    total = found[:, -1]
    precision = found / np.maximum(found + false, 1e-300)
    below = false[:, -1:] - false + negative[:, ::-1] / 2
    return {
        "AUROC": (positive[:, ::-1] * below).sum(1) / (total * false[:, -1]),
        "AP": (positive[:, ::-1] * precision).sum(1) / total,
        "F1Max": (2 * found / (found + false + total[:, None])).max(1),
    }


def region_histograms(level: NDArray[np.int64], masks: Flags, levels: int) -> tuple[Array, NDArray[np.int64]]:
    """For each region the share of its pixels at each level, (regions, levels), and its image, (regions,)."""
    rows, owners = [], []
    for number, (image, mask) in enumerate(zip(level, masks, strict=True)):
        regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
        for region in range(1, count + 1):
            counts = np.bincount(image[regions == region], minlength=levels)
            rows.append(counts / counts.sum())
            owners.append(number)
    return np.stack(rows), np.array(owners)


def resampled_means(each: dict[str, Array], resamples: int, seed: int) -> dict[str, Array]:
    """Means of values per image over images that are drawn anew, (resamples,) each."""
    random = np.random.default_rng(seed)
    means = {}
    for name, value in each.items():
        chosen = random.integers(len(value), size=(resamples, len(value)))
        means[name] = value[chosen].mean(1)
    return means
