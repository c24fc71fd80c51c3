from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusion_lit.metrics import FeatureExtractor, FeatureMoments, frechet_distance
from tests import forked


def vectors(count: int, dimension: int, seed: int) -> Tensor:
    """Correlated Gaussian vectors with a mean, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    result: Tensor = 0.4 + noise @ mixing / dimension**0.5
    return result


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(features.numpy().mean(0)), torch.from_numpy(np.cov(features.numpy(), rowvar=False))


def rotation(dimension: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    axes: Tensor = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))[0]
    return axes


class TinyFeatures(FeatureExtractor):
    name = "tiny"
    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(12, 3, 5, 5, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.conv2d(images.float() / 255, self.weight).relu().mean((2, 3))


def test_in_one_dimension_it_is_the_squared_difference_of_means_plus_that_of_deviations() -> None:
    distance = frechet_distance(
        torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([-2.0]), torch.tensor([[25.0]])
    )
    assert distance == pytest.approx(9 + (2 - 5) ** 2, rel=1e-12)


def test_commuting_covariances_give_the_sum_over_their_common_axes() -> None:
    axes = rotation(4)
    deviations1 = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    deviations2 = torch.tensor([3.0, 0.25, 0.5, 2.0], dtype=torch.float64)
    mu = torch.zeros(4, dtype=torch.float64)
    distance = frechet_distance(
        mu, axes @ deviations1.square().diag() @ axes.T, mu + 0.5, axes @ deviations2.square().diag() @ axes.T
    )
    assert distance == pytest.approx(4 * 0.25 + 4 + 3.0625 + 0 + 4, rel=1e-7)


def test_it_equals_the_formula_with_scipys_matrix_square_root() -> None:
    (mu1, sigma1), (mu2, sigma2) = gaussian(vectors(500, 20, seed=1)), gaussian(vectors(400, 20, seed=2))
    root = scipy.linalg.sqrtm(sigma1.numpy() @ sigma2.numpy()).real
    expected = float((mu1 - mu2).square().sum()) + np.trace(sigma1.numpy() + sigma2.numpy() - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [400, 15], ids=["enough images", "fewer images than features"])
def test_it_equals_torch_fidelity(count: int) -> None:
    (mu1, sigma1), (mu2, sigma2) = gaussian(vectors(count, 30, seed=1)), gaussian(vectors(count, 30, seed=2))
    theirs = fid_statistics_to_metric(
        {"mu": mu1.numpy(), "sigma": sigma1.numpy()}, {"mu": mu2.numpy(), "sigma": sigma2.numpy()}, False
    )
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_from_images_to_the_score_it_equals_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8, generator=generator)
    generated = torch.randint(0, 200, (50, 3, 16, 16), dtype=torch.uint8, generator=generator)
    metric = FrechetInceptionDistance(feature=TinyFeatures(), input_img_size=(3, 16, 16))
    metric.update(real, real=True)
    metric.update(generated, real=False)
    extractor = TinyFeatures()
    ours = []
    for images in (real, generated):
        moments = FeatureMoments(extractor.num_features)
        for batch in torch.split(images, 7):
            moments.update(extractor(batch))
        ours.append(moments.mean_and_covariance())
    assert frechet_distance(*ours[0], *ours[1]) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_a_gaussian_is_at_no_distance_from_itself_even_when_singular() -> None:
    mu, sigma = gaussian(vectors(10, 40, seed=1))
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-6 * float(sigma.trace())


def test_constant_features_leave_the_other_gaussians_spread() -> None:
    mu, sigma = gaussian(vectors(100, 6, seed=1))
    distance = frechet_distance(mu, torch.zeros(6, 6), mu + 1, sigma)
    assert distance == pytest.approx(6 + float(sigma.trace()), rel=1e-12)


def test_it_is_symmetric_and_blind_to_rotation() -> None:
    first, second = vectors(200, 8, seed=1), vectors(200, 8, seed=2)
    distance = frechet_distance(*gaussian(first), *gaussian(second))
    assert frechet_distance(*gaussian(second), *gaussian(first)) == pytest.approx(distance, rel=1e-10)
    turned = frechet_distance(*gaussian(first @ rotation(8)), *gaussian(second @ rotation(8)))
    assert turned == pytest.approx(distance, rel=1e-10)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (torch.zeros(3), torch.eye(3), "2 and 3 features"),
        (torch.zeros(2), torch.eye(3), "not \\(D,\\) and \\(D, D\\)"),
        (torch.tensor([0.0, float("nan")]), torch.eye(2), "not finite"),
        (torch.zeros(2), torch.tensor([[1.0, float("inf")], [float("inf"), 1.0]]), "not finite"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
    ],
)
def test_what_is_no_comparable_gaussian_is_refused(mu: Tensor, sigma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(torch.zeros(2), torch.eye(2), mu, sigma)


def test_moments_over_uneven_batches_are_numpys_mean_and_covariance() -> None:
    features = vectors(101, 7, seed=4)
    moments = FeatureMoments(7)
    for batch in torch.split(features, [1, 0, 50, 50]):
        moments.update(batch)
    mu, sigma = moments.mean_and_covariance()
    assert moments.count == 101
    np.testing.assert_allclose(mu.numpy(), features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma.numpy(), np.cov(features.numpy(), rowvar=False), rtol=1e-10, atol=1e-13)


def test_a_mean_a_thousand_deviations_away_costs_no_more_than_six_digits() -> None:
    features = 1000 + vectors(500, 5, seed=4)
    moments = FeatureMoments(5)
    moments.update(features)
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(moments.mean_and_covariance()[1].numpy(), expected, atol=1e-7)


def test_float32_features_are_summed_in_float64() -> None:
    features = torch.full((100_000, 1), 0.1)
    moments = FeatureMoments(1)
    for batch in torch.split(features, 1000):
        moments.update(batch)
    assert float(moments.mean_and_covariance()[0]) == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def _reduce_share(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()

    def reduce_sum(tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    moments = FeatureMoments(4)
    if rank == 0:
        moments.update(vectors(30, 4, seed=5))
    reduced = moments.reduce(reduce_sum)
    again = moments.reduce(reduce_sum)
    torch.save([reduced.count, again.count, moments.count, *reduced.mean_and_covariance()], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_of_which_one_saw_nothing_agree_on_the_sum(tmp_path: Path) -> None:
    child = forked.fork(lambda: forked.in_two(lambda: _reduce_share(tmp_path)), tmp_path / "output.txt")
    assert forked.wait(child) == 0
    mu, sigma = gaussian(vectors(30, 4, seed=5))
    for rank in (0, 1):
        count, again, own, reduced_mu, reduced_sigma = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (count, again, own) == (30, 30, 30 if rank == 0 else 0)
        torch.testing.assert_close(reduced_mu, mu)
        torch.testing.assert_close(reduced_sigma, sigma)


def test_moments_made_under_inference_mode_go_on_outside_it() -> None:
    with torch.inference_mode():
        moments = FeatureMoments(2)
        moments.update(torch.ones(3, 2))
    moments.update(torch.zeros(1, 2))
    assert moments.mean_and_covariance()[0].tolist() == [0.75, 0.75]


def test_one_image_has_no_covariance() -> None:
    moments = FeatureMoments(2)
    moments.update(torch.ones(1, 2))
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        moments.mean_and_covariance()


def test_features_of_another_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="not \\(B, 2\\)"):
        FeatureMoments(2).update(torch.ones(4, 3))
