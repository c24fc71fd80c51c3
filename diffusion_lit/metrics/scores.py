"""Scores of a set of generated images.

The Fréchet distance is ours, in float64 (`frechet`); Inception score, KID, precision and recall are torch-fidelity's
functions of features, with its defaults, so that a figure is what its users call by that name.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from torch import Tensor, nn
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from diffusion_lit.metrics.features import FeatureExtractor
from diffusion_lit.metrics.frechet import FeatureMoments, frechet_distance
from diffusion_lit.metrics.reference import Reference
from diffusion_lit.types import Condition, Part

Against: TypeAlias = Literal["nothing", "gaussian", "features", "targets"]
CHUNK = 1024
MOST_JUDGED = 10_000
SHUFFLE = 2020
"""torch-fidelity's seed of the order in which it splits and draws."""


@dataclass(frozen=True)
class Evidence:
    """What a score is computed from.

    Attributes:
        generated: Outputs of the extractor for generated images, (N, D), float32.
        labels: The classes that were asked for, int64 (N,), if any.
        gaussian: Fitted to the features of real images, where `Score.against` asks for it.
        real: Features of real images, (M, D), float32, where `Score.against` asks for them.
        real_labels: Their classes, int64 (M,), if they have any.
        columns: What `Score.per_image` computed, (N, ...) each.
        targets: Features of what each generated image is to be, (N, D), float32, where `Score.against` asks for them.
    """

    generated: Tensor
    labels: Tensor | None = None
    gaussian: Reference | None = None
    real: Tensor | None = None
    real_labels: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None


class Score(Part):
    """One figure, or a few that belong together, of a set of generated images.

    Attributes:
        against: What generated images are compared with: a Gaussian fitted to all real images, the features of some of
            them, those of the images' own targets, or nothing.
        output: Which of `FeatureExtractor.outputs` it is computed from; None: from `per_image` alone.
        needs_labels: Whether it needs the classes of generated and of real images.
        extractor: Its own; None: that of the evaluation.
    """

    against: ClassVar[Against]
    output: ClassVar[str | None] = "features"
    needs_labels: ClassVar[bool] = False

    def __init__(self, extractor: FeatureExtractor | None = None) -> None:
        self.extractor = extractor

    def prepare(self) -> None:
        """Loads what the score needs besides its extractor, once; see `FeatureExtractor.prepare`."""

    def check(self, num_images: int) -> None:
        """Raises ValueError if so many images, generated or real, are too few; by default one is enough."""

    def per_image(self, generator: nn.Module, images: Tensor, condition: Condition) -> dict[str, Tensor]:
        """What the score needs of single images besides their features; {}: nothing.

        Args:
            generator: Made the images.
            images: uint8, (B, C, H, W).
            condition: What they were made from, (B, ...) each; images in [-1, 1]. `image` is the target, if any.

        Returns:
            By name, (B, ...) each; names begin with that of the score.

        Raises:
            ValueError: If the condition lacks something.
        """
        return {}

    @abstractmethod
    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        """Computes the score.

        Args:
            evidence: Generated and real images, as the extractor sees them.
            extractor: Names the results.

        Returns:
            Values by name.

        Raises:
            ValueError: If the evidence lacks something that the score needs.
        """


class FrechetDistance(Score):
    """The Fréchet distance: FID in Inception's features, FD-DINOv2 in DINOv2's.

    Args:
        extractor: Another than the evaluation's.

    Source: Heusel et al. 2017.
    """

    against = "gaussian"

    def check(self, num_images: int) -> None:
        if num_images < 2:
            raise ValueError(f"evaluation.num_images={num_images}: a Fréchet distance needs at least 2")

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        generated, gaussian = evidence.generated, evidence.gaussian
        if gaussian is None:
            raise ValueError("a Fréchet distance needs the real images' statistics")
        moments = FeatureMoments(generated.shape[1], generated.device)
        # In pieces of one size, so that the sums do not depend on the batches that the images came in.
        for start in range(0, len(generated), CHUNK):
            moments.update(generated[start : start + CHUNK])
        mu, sigma = moments.mean_and_covariance()
        return {extractor.metric_name: frechet_distance(mu, sigma, gaussian.mu, gaussian.sigma)}


class InceptionScore(Score):
    """exp E KL(p(y | x) || p(y)), mean and deviation over splits of the shuffled images.

    Needs an extractor that is a classifier; only Inception's is called `inception_score`.

    Args:
        splits: At least 1; the papers use 10.
        extractor: Another than the evaluation's.

    Raises:
        ValueError: If splits < 1.

    Source: Salimans et al. 2016.
    """

    against = "nothing"
    output = "logits"

    def __init__(self, splits: int = 10, extractor: FeatureExtractor | None = None) -> None:
        super().__init__(extractor)
        if splits < 1:
            raise ValueError(f"splits={splits} of the Inception score must be at least 1; the papers use 10")
        self.splits = splits

    def check(self, num_images: int) -> None:
        if num_images < self.splits:
            raise ValueError(
                f"evaluation.num_images={num_images} are fewer than the Inception score's {self.splits} splits; "
                "generate more, or lower `splits`"
            )

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        found = isc_features_to_metric(evidence.generated, self.splits, shuffle=True, rng_seed=SHUFFLE)
        return {
            extractor.scalar("inception_score"): found["inception_score_mean"],
            extractor.scalar("inception_score_std"): found["inception_score_std"],
        }


class KID(Score):
    """The kernel distance: an unbiased estimate of the squared maximum mean discrepancy under a cubic kernel.

    Args:
        subsets: Pairs of subsets that are compared; the result is the mean over them, with its deviation.
        subset_size: Images in each.
        extractor: Another than the evaluation's.

    Raises:
        ValueError: If a number is below 1, or a subset below 2 images.

    Source: Bińkowski et al. 2018.
    """

    against = "features"

    def __init__(self, subsets: int = 100, subset_size: int = 1000, extractor: FeatureExtractor | None = None) -> None:
        super().__init__(extractor)
        if subsets < 1 or subset_size < 2:
            raise ValueError(f"KID: subsets={subsets} must be at least 1, subset_size={subset_size} at least 2")
        self.subsets = subsets
        self.subset_size = subset_size

    def check(self, num_images: int) -> None:
        if num_images < self.subset_size:
            raise ValueError(
                f"{num_images} images are fewer than KID's subset_size={self.subset_size}; raise "
                "evaluation.num_images, or lower `subset_size`"
            )

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        found = kid_features_to_metric(
            evidence.generated,
            evidence.real,
            kid_subsets=self.subsets,
            kid_subset_size=self.subset_size,
            rng_seed=SHUFFLE,
            verbose=False,
        )
        return {
            extractor.scalar("kid"): found["kernel_inception_distance_mean"],
            extractor.scalar("kid_std"): found["kernel_inception_distance_std"],
        }


class PrecisionRecall(Score):
    """How many generated images lie among the real ones, and the other way round.

    A set covers a point that is no farther from one of its members than that member's k-th neighbour in the set.

    Args:
        neighbours: k.
        extractor: Another than the evaluation's; Kynkäänniemi et al. used VGG-16, Dhariwal & Nichol Inception.

    Raises:
        ValueError: If k < 1.

    Source: Kynkäänniemi et al. 2019, eqs. 1 and 2.
    """

    against = "features"

    def __init__(self, neighbours: int = 3, extractor: FeatureExtractor | None = None) -> None:
        super().__init__(extractor)
        if neighbours < 1:
            raise ValueError(f"neighbours={neighbours} of precision and recall must be at least 1; the paper uses 3")
        self.neighbours = neighbours

    def check(self, num_images: int) -> None:
        if num_images <= self.neighbours:
            raise ValueError(f"{num_images} images do not have {self.neighbours} neighbours each; take more images")

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        found = prc_features_to_metric(
            evidence.generated,
            evidence.real,
            prc_neighborhood=self.neighbours,
            prc_batch_size=10_000,
            save_cpu_ram=True,
            verbose=False,
        )
        return {extractor.scalar(name): found[name] for name in ("precision", "recall")}


class Agreement(Score):
    """How often a classifier of features sees the class that was asked for.

    The classifier, a support-vector machine, is trained on one half of at most 10,000 real images; the share of the
    other half that it recognises is given too, as the most that can be expected.

    Args:
        extractor: Another than the evaluation's.

    Source: none; figure 4 of Ho & Salimans 2022 plots the Inception score instead.
    """

    against = "features"
    needs_labels = True

    def check(self, num_images: int) -> None:
        if num_images < 4:
            raise ValueError(f"{num_images} images are too few to train a classifier and to try it; take more images")

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        from sklearn.svm import SVC

        if evidence.labels is None:
            raise ValueError("Agreement: no classes were asked for; leave the score out, or score a model with classes")
        if evidence.real is None or evidence.real_labels is None:
            raise ValueError("Agreement: the real images have no classes to train a classifier on; leave the score out")
        real, labels = evidence.real.cpu().numpy(), evidence.real_labels.numpy()
        order = np.random.default_rng(SHUFFLE).permutation(len(real))[:MOST_JUDGED]
        seen, unseen = order[: len(order) // 2], order[len(order) // 2 :]
        if len(np.unique(labels[seen])) < 2:
            raise ValueError(
                f"Agreement: the {len(seen)} real images that the classifier is trained on are of one class; raise "
                "--evaluation.num_real"
            )
        judge = SVC().fit(real[seen], labels[seen])
        agreement = judge.score(evidence.generated.cpu().numpy(), evidence.labels.numpy())
        return {
            extractor.scalar("agreement"): float(agreement),
            extractor.scalar("agreement_real"): float(judge.score(real[unseen], labels[unseen])),
        }
