"""Tokenizers: vocabularies that are learned or read, words and their tokens."""

import json
from pathlib import Path

import pytest
import torch

from diffusion_lit.conditioners import WordPiece
from tests.texts import LENGTH, conditioner, learned


def test_the_same_captions_give_the_same_vocabulary_in_any_order() -> None:
    """The package's own trainer gives another one each time."""
    texts = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 3
    found = []
    for captions in (texts, texts, texts[::-1]):
        tokenizer = WordPiece()
        tokenizer.learn(captions, 100)
        found.append(json.loads(bytes(tokenizer.get_extra_state().tolist()))["model"]["vocab"])
    assert found[0] == found[1] == found[2]
    assert list(found[0])[:4] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    assert sorted(found[0].values()) == list(range(len(found[0])))
    assert 60 < len(found[0]) <= 100


def test_a_small_vocabulary_has_the_commonest_letters_and_nothing_rarer() -> None:
    tokenizer = WordPiece()
    tokenizer.learn(["aaa ab ab b z"], 14)
    assert tokenizer.size <= 14
    tokens = tokenizer(["a b z"], 5).ids[0]
    assert tokens[3] == tokenizer.unknown
    assert tokenizer.unknown not in (tokens[1], tokens[2])


def test_tokens_are_those_of_bert_s_tokenizer(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    learner = learned().tokenizer
    vocabulary = json.loads(bytes(learner.get_extra_state().tolist()))["model"]["vocab"]
    texts = [
        "A Bold THREE!",
        "the digit seven, and it's thin",
        "naïve zéro",
        "unseen wörds 42",
        "",
        "three" * 9,
        "字 1",
    ]
    reference = BertTokenizer(vocab=vocabulary, do_lower_case=True)
    expected = reference(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    assert torch.equal(learner(texts, LENGTH).ids, expected["input_ids"])
    whole = [len(reference(text)["input_ids"]) for text in texts]
    assert learner(texts, LENGTH).cut == [max(n - LENGTH, 0) for n in whole]
    lines = tmp_path / "vocab.txt"
    lines.write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    read = WordPiece(str(lines))
    read.learn([], 250)
    assert torch.equal(read(texts, LENGTH).ids, expected["input_ids"])


def test_words_have_the_places_of_their_tokens() -> None:
    text = learned()
    found = text.words("a Bold three, quixotic")
    assert [word.text for word in found] == ["a", "Bold", "three", ",", "quixotic"]
    tokens = text.tokens_of(["a Bold three, quixotic"])[0].tolist()
    assert [place for word in found for place in word.positions] == list(
        range(1, 1 + sum(map(len, (w[1] for w in found))))
    )
    assert len(found[-1].positions) > 1 or tokens[found[-1].positions[0]] == text.unknown
    [three] = text.words("three")
    assert tokens[found[2].positions[0]] == text.tokens_of(["three"])[0, three.positions[0]]


def test_a_tokenizer_without_a_vocabulary_says_so() -> None:
    with pytest.raises(ValueError, match="has no vocabulary yet: it is learned when training starts"):
        conditioner().encode(["a"])


def test_files_that_hold_no_vocabulary_are_refused(tmp_path: Path) -> None:
    for name, content in (("a.json", "{}"), ("vocab.txt", "one\ntwo")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"file=.*{name} is no tokenizer\.json and no vocab\.txt: "):
            WordPiece(str(tmp_path / name)).learn([], 10)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]))
    with pytest.raises(ValueError, match=r"has 12 tokens, the text encoder 8; set .*encoder\.vocabulary 12"):
        WordPiece(str(tmp_path / "vocab.txt")).learn([], 8)


ENDLESS = {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": ""}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": ENDLESS},
        {"normalizer": {"type": "Sequence", "normalizers": [ENDLESS]}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Removed", "invert": False}},
    ],
)
def test_a_tokenizer_with_a_regular_expression_is_refused_from_a_file_and_from_a_checkpoint(
    tmp_path: Path, change: dict[str, object]
) -> None:
    learner = learned().tokenizer
    good = json.loads(bytes(learner.get_extra_state().tolist()))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(ValueError, match=r"file=.*tokenizer\.json cannot be used: .*regular expression"):
        WordPiece(str(path)).learn([], 250)
    with pytest.raises(ValueError, match=r"vocabulary cannot be read: .*regular expression"):
        WordPiece().set_extra_state(torch.tensor(list(path.read_bytes()), dtype=torch.uint8))
    path.write_text(json.dumps(good))
    WordPiece(str(path)).learn([], 250)
