"""Scores whose value is known without computing them."""

import pytest
import torch

from diffusion_lit.metrics import KID, FrechetDistance, InceptionScore, Pixels, PrecisionRecall, Reference

PIXELS = Pixels(1)


def test_the_inception_score_of_certain_and_evenly_spread_answers_is_the_number_of_classes() -> None:
    logits = 100.0 * torch.eye(7).repeat(30, 1)
    found = InceptionScore(splits=1)(logits, None, None, PIXELS)
    assert found["inception_score/pixels"] == pytest.approx(7, rel=1e-6)
    undecided = InceptionScore(splits=3)(torch.zeros(210, 7), None, None, PIXELS)
    assert undecided == pytest.approx({"inception_score/pixels": 1, "inception_score_std/pixels": 0})


def test_precision_and_recall_of_sets_on_a_line() -> None:
    """Neighbours at distance 1: the real set reaches one beyond its ends, the generated set covers its half of it."""
    real = torch.arange(10.0)[:, None]
    generated = torch.cat([torch.arange(5.0), torch.tensor([30.0, 31.0, 32.0])])[:, None]
    found = PrecisionRecall(neighbours=1)(generated, None, real, PIXELS)
    assert found["precision/pixels"] == pytest.approx(5 / 8)
    # The last of the generated numbers up to 4 reaches to 5.
    assert found["recall/pixels"] == pytest.approx(6 / 10)


def test_the_kernel_distance_of_one_distribution_is_zero_but_for_chance_and_grows_with_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(400, 6, generator=generator) for _ in range(2))
    score = KID(subsets=20, subset_size=200)
    same, near, far = (score(a, None, b + shift, PIXELS)["kid/pixels"] for shift in (0.0, 0.5, 1.0))
    assert abs(same) < 0.02
    assert same + 0.05 < near < far
    # Of Gaussians with means 0 and m: E k(x, y) under the cubic kernel (x.y / 6 + 1)^3, in closed form for m = 0.
    assert score(a, None, b, PIXELS)["kid_std/pixels"] > 0


def test_the_frechet_distance_of_shifted_features_is_the_square_of_the_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3000, 3, generator=generator)
    mu, sigma = features.double().mean(0), torch.cov(features.double().T)
    shift = torch.tensor([1.0, -2.0, 0.5])
    found = FrechetDistance()(features + shift, Reference(mu, sigma, 3000, "same"), None, PIXELS)
    assert found["frechet/pixels"] == pytest.approx(float(shift.square().sum()), rel=1e-5)


def test_a_frechet_distance_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the real images' statistics"):
        FrechetDistance()(torch.zeros(3, 2), None, None, PIXELS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InceptionScore(splits=0), "splits=0 of the Inception score must be at least 1"),
        (lambda: KID(subsets=0), "subsets=0 must be at least 1"),
        (lambda: KID(subset_size=1), "subset_size=1 at least 2"),
        (lambda: PrecisionRecall(0), "neighbours=0 of precision and recall must be at least 1"),
        (lambda: InceptionScore(10).check(9), "num_images=9 are fewer than the Inception score's 10 splits"),
    ],
)
def test_impossible_settings_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
