"""Scores whose value is known without computing them."""

from typing import Any

import pytest
import torch

from diffusion_lit.metrics import (
    KID,
    Agreement,
    Evidence,
    FrechetDistance,
    InceptionScore,
    Pixels,
    PrecisionRecall,
    Reference,
)

PIXELS = Pixels(1)


def test_the_inception_score_of_certain_and_evenly_spread_answers_is_the_number_of_classes() -> None:
    logits = 100.0 * torch.eye(7).repeat(30, 1)
    found = InceptionScore(splits=1)(Evidence(logits), PIXELS)
    assert found["inception_score/pixels"] == pytest.approx(7, rel=1e-6)
    undecided = InceptionScore(splits=3)(Evidence(torch.zeros(210, 7)), PIXELS)
    assert undecided == pytest.approx({"inception_score/pixels": 1, "inception_score_std/pixels": 0})


def test_precision_and_recall_of_sets_on_a_line() -> None:
    """Neighbours at distance 1: the real set reaches one beyond its ends, the generated set covers its half of it."""
    real = torch.arange(10.0)[:, None]
    generated = torch.cat([torch.arange(5.0), torch.tensor([30.0, 31.0, 32.0])])[:, None]
    found = PrecisionRecall(neighbours=1)(Evidence(generated, real=real), PIXELS)
    assert found["precision/pixels"] == pytest.approx(5 / 8)
    # The last of the generated numbers up to 4 reaches to 5.
    assert found["recall/pixels"] == pytest.approx(6 / 10)


def test_the_kernel_distance_of_one_distribution_is_zero_but_for_chance_and_grows_with_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(400, 6, generator=generator) for _ in range(2))
    score = KID(subsets=20, subset_size=200)
    same, near, far = (score(Evidence(a, real=b + shift), PIXELS)["kid/pixels"] for shift in (0.0, 0.5, 1.0))
    assert abs(same) < 0.02
    assert same + 0.05 < near < far
    assert score(Evidence(a, real=b), PIXELS)["kid_std/pixels"] > 0


def test_the_frechet_distance_of_shifted_features_is_the_square_of_the_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3000, 3, generator=generator)
    mu, sigma = features.double().mean(0), torch.cov(features.double().T)
    shift = torch.tensor([1.0, -2.0, 0.5])
    found = FrechetDistance()(Evidence(features + shift, gaussian=Reference(mu, sigma, 3000, "same")), PIXELS)
    assert found["frechet/pixels"] == pytest.approx(float(shift.square().sum()), rel=1e-5)


def test_a_frechet_distance_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the real images' statistics"):
        FrechetDistance()(Evidence(torch.zeros(3, 2)), PIXELS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InceptionScore(splits=0), "splits=0 of the Inception score must be at least 1"),
        (lambda: KID(subsets=0), "subsets=0 must be at least 1"),
        (lambda: KID(subset_size=1), "subset_size=1 at least 2"),
        (lambda: PrecisionRecall(0), "neighbours=0 of precision and recall must be at least 1"),
        (lambda: Agreement().check(3), "3 images are too few to train a classifier and to try it"),
        (lambda: InceptionScore(10).check(9), "num_images=9 are fewer than the Inception score's 10 splits"),
    ],
)
def test_impossible_settings_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def classes(count: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around three corners of a triangle, and which corner each belongs to."""
    labels = torch.arange(count) % 3
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    return corners[labels] + spread * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)), labels


def test_agreement_is_the_share_of_images_that_show_the_class_asked_for() -> None:
    real, real_labels = classes(300, 0.5, 0)
    generated, labels = classes(60, 0.5, 1)
    wrong = labels.clone()
    wrong[:15] = (wrong[:15] + 1) % 3
    for given, expected in ((labels, 1.0), (wrong, 0.75), ((labels + 1) % 3, 0.0)):
        found = Agreement()(Evidence(generated, given, real=real, real_labels=real_labels), PIXELS)
        assert found == {"agreement/pixels": expected, "agreement_real/pixels": 1.0}


def test_where_real_classes_cannot_be_told_apart_agreement_of_real_images_says_so() -> None:
    real, real_labels = classes(600, 1000.0, 0)
    found = Agreement()(Evidence(real[:30], real_labels[:30], real=real, real_labels=real_labels), PIXELS)
    assert found["agreement_real/pixels"] == pytest.approx(1 / 3, abs=0.12)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ({"labels": None}, "no classes were asked for"),
        ({"real_labels": None}, "the real images have no classes"),
        ({"real": None}, "the real images have no classes"),
        ({"real_labels": torch.zeros(12, dtype=torch.int64)}, "6 real images that the classifier is trained on are of"),
    ],
)
def test_agreement_without_classes_is_refused(lacking: dict[str, Any], message: str) -> None:
    real, labels = classes(12, 1.0, 0)
    evidence = Evidence(**{"generated": real, "labels": labels, "real": real, "real_labels": labels, **lacking})
    with pytest.raises(ValueError, match=message):
        Agreement()(evidence, PIXELS)
