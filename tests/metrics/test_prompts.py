"""Scores of images beside their prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.data.captioned_digits import NAMES
from diffusion_lit.diffusion import DDIM
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.images import to_uint8
from diffusion_lit.metrics import InkAgreement, PromptAgreement
from diffusion_lit.metrics.features import FeatureExtractor
from diffusion_lit.metrics.prompts import find_words
from diffusion_lit.metrics.scores import Evidence
from diffusion_lit.records import read_records
from diffusion_lit.text import encode_text
from tests import tiny
from tests.texts import data, loaded, module, run


class Seen(FeatureExtractor):
    """A classifier that is told nothing; names scores."""

    name = "seen"
    num_features = 3
    classifies = True

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError


def test_words_name_a_class_only_where_they_name_one() -> None:
    words = [["cat", "Kitten"], ["dog"]]
    texts = ["a Cat!", "kitten, dog", "category", "the DOG", "cat and kitten", ""]
    assert find_words(texts, words).tolist() == [0, -1, -1, 1, 0, -1]


def test_prompt_agreement_is_the_share_of_prompts_that_the_classifier_agrees_with() -> None:
    score = PromptAgreement([["one"], ["two"], ["three"]])
    given = {"caption": encode_text(["one", "a two", "one or two", "nothing", "three", "three"])}
    columns = score.per_image(nn.Identity(), torch.zeros(6, 1, 8, 8), given)
    logits = torch.eye(3)[[0, 2, 1, 1, 2, 2]]
    assert score(Evidence(logits, columns=columns), Seen()) == {"prompt_agreement/seen": 0.75}
    with pytest.raises(ValueError, match="3 lists of words, but seen tells 2 classes apart"):
        score(Evidence(logits[:, :2], columns=columns), Seen())
    with pytest.raises(ValueError, match="no prompt names what its words name"):
        score(Evidence(logits[2:4], columns={"prompt_agreement.class": torch.tensor([-1, -1])}), Seen())


def test_ink_agreement_compares_with_the_middle_of_the_class() -> None:
    score = InkAgreement([["one"], ["two"]])
    texts = ["a bold one", "a thin one", "a bold two", "one", "bold", "thin two"]
    columns = score.per_image(nn.Identity(), torch.zeros(6, 1, 8, 8), {"caption": encode_text(texts)})
    real = torch.tensor([[0.1], [0.2], [0.3], [0.7], [0.8], [0.9]])
    evidence = Evidence(
        torch.tensor([[0.25], [0.25], [0.75], [0.5], [0.5], [0.85]]),
        real=real,
        real_labels=torch.tensor([0, 0, 0, 1, 1, 1]),
        columns=columns,
    )
    # Of the four that count: 0.25 > 0.2 as wished, 0.25 < 0.2 not, 0.75 > 0.8 not, 0.85 < 0.8 not.
    assert score(evidence, score.extractor or Seen()) == {"ink_agreement": 0.25}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptAgreement([["one"]]), r"PromptAgreement\.words: .* must be 2 or more lists of words"),
        (lambda: PromptAgreement([["one"], []]), "must be 2 or more lists of words"),
        (lambda: PromptAgreement([["one"], ["One"]]), "no word twice"),
        (lambda: InkAgreement([["one"]], more=["bold"], less=["bold"]), "more and less"),
    ],
)
def test_words_that_name_nothing_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    run(place, 2)
    return place


@pytest.mark.further
def test_a_text_model_is_scored_by_the_captions_of_test_images(trained: Path, tmp_path: Path) -> None:
    words = [[name, str(i)] for i, name in enumerate(NAMES)]
    evaluation = Evaluation(
        scores=[InkAgreement(words)],
        num_images=20,
        num_real=200,
        batch_size=7,
        sampler=DDIM(2),
        cache_dir=str(tmp_path),
    )
    tiny.trainer(tmp_path, callbacks=[evaluation], limit_test_batches=1).test(
        module(), data(), ckpt_path=str(tiny.last(trained))
    )
    [record] = read_records(tmp_path / "results.jsonl")
    assert 0 <= record["scores"]["ink_agreement"] <= 1
    assert record["conditions"]["entries"] == ["caption", "image"]
    system = loaded(trained)
    given = {"caption": data().examples(list(range(20)), "test")["caption"]}
    images = to_uint8(system.sample(range(20), sampler=DDIM(2), condition=given))
    columns = InkAgreement(words).per_image(system, images, given)
    digits = data()
    real = digits.dataset("train").batch(range(1797))
    middle = [real["image"][real["label"] == i].float().flatten(1).mean(1).median() for i in range(10)]
    rows = zip(
        images.float().flatten(1).mean(1), columns["ink_agreement.class"], columns["ink_agreement.less"], strict=True
    )
    right = [(ink < middle[label]) if less == 1 else (ink > middle[label]) for ink, label, less in rows if less >= 0]
    assert len(right) > 3
    # 200 of the 1,797 real images give another middle.
    assert abs(record["scores"]["ink_agreement"] - sum(map(float, right)) / len(right)) < 0.3
