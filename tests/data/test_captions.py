"""Captions: held in memory, read in the forms that they come in, chosen by position, missing, and of tar files."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from diffusion_lit.data import (
    CaptionedDigits,
    CaptionForm,
    Captions,
    COCOCaptions,
    CorruptImageWarning,
    Folder,
    ImageData,
    LowResolution,
    Metadata,
    TextFiles,
    WebDataset,
)
from diffusion_lit.data.captioned_digits import NAMES, SEEN, SEEN_STROKES, UNSEEN, UNSEEN_STROKES
from diffusion_lit.data.stream import Key
from diffusion_lit.text import decode_text
from diffusion_lit.types import Batch

TEXTS = {"a.png": ["first of a", "second of a", "third of a"], "b/c.png": ["one of c"], "b/d.x.png": ["one of d", "é"]}
FORMS: dict[str, Callable[[Path], CaptionForm]] = {
    "text files": lambda place: TextFiles(),
    "jsonl": lambda place: Metadata(),
    "csv": lambda place: Metadata("what"),
    "coco": lambda place: COCOCaptions(str(place / "captions.json")),
}


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, format="PNG")
    return buffer.getvalue()


def folder(place: Path, form: str, texts: dict[str, list[str]] = TEXTS) -> Path:
    """A folder of images, image i as bright as i, with captions in one of the forms."""
    root = place / "images"
    for grey, name in enumerate(texts):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(grey))
    if form == "text files":
        for name, lines in texts.items():
            if lines:
                (root / name).with_suffix(".txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    elif form == "jsonl":
        lines = [json.dumps({"file_name": name, "text": captions}) for name, captions in texts.items()]
        (root / "metadata.jsonl").write_text("\n".join(lines))
    elif form == "csv":
        (root / "b").mkdir(exist_ok=True)
        for name, captions in texts.items():
            table = (root / name).with_name("metadata.csv")
            with table.open("a", encoding="utf-8") as file:
                if not file.tell():
                    file.write("file_name,what\n")
                file.writelines(f"{Path(name).name},{caption}\n" for caption in captions)
    else:
        images = [{"id": 10 * i, "file_name": name} for i, name in enumerate(texts)]
        annotations = [
            {"image_id": 10 * i, "caption": caption}
            for i, captions in enumerate(texts.values())
            for caption in captions
        ]
        (place / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations[::-1]}))
    return root


def captions(batch: Batch) -> list[str]:
    return decode_text(batch["caption"])


def test_captions_are_kept_as_they_were_given() -> None:
    held = Captions(TEXTS.values())
    assert [held[i] for i in range(len(held))] == list(TEXTS.values())
    assert list(held.some(100)) == [text for texts in TEXTS.values() for text in texts]
    assert list(held.some(3)) == ["first of a", "third of a", "one of d"]
    kept = held.kept([2, 0])
    assert [kept[0], kept[1]] == [TEXTS["b/d.x.png"], TEXTS["a.png"]]
    assert held.fingerprint() == Captions(TEXTS.values()).fingerprint() != kept.fingerprint()
    with pytest.raises(ValueError, match="image 1 has no caption"):
        Captions([["a"], []])


def test_a_draw_decides_which_caption_is_taken_and_0_takes_the_first() -> None:
    held = Captions(TEXTS.values())
    found = [decode_text(held.choose([0, 2, 1], [draw] * 3)) for draw in (0, 1, 2, 2**63 - 1)]
    assert found[0] == ["first of a", "one of d", "one of c"]
    assert found[1] == ["second of a", "é", "one of c"]
    assert found[2] == ["third of a", "one of d", "one of c"]
    assert decode_text(held.choose([], [])) == []


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_has_the_captions_of_each_form(tmp_path: Path, form: str, in_memory: bool) -> None:
    root = folder(tmp_path, form)
    source = Folder(str(root), 8, captions=FORMS[form](tmp_path), labels=False, in_memory=in_memory)
    dataset = ImageData(source).dataset("train")
    assert dataset.captions is not None
    by_grey = {int(dataset.read(i)["image"][0, 0, 0]): sorted(dataset.captions[i]) for i in range(len(dataset))}
    assert by_grey == {grey: sorted(texts) for grey, texts in enumerate(TEXTS.values())}


@pytest.mark.parametrize("form", FORMS)
def test_missing_captions_are_one_line_with_the_first_file_and_their_number(tmp_path: Path, form: str) -> None:
    root = folder(tmp_path, form, {**TEXTS, "b/e.png": [], "b/f.png": [], "b/g.png": ["of g"]})
    source = Folder(str(root), 8, captions=FORMS[form](tmp_path), labels=False)
    with pytest.raises(ValueError, match=r"2 of 6 images have no caption, first b/e\.png; .") as error:
        source.load("train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        (Metadata(), None, r"no metadata\.jsonl or metadata\.csv in .*; set --data\.source\.captions to the form"),
        (Metadata("alt"), "jsonl", r"metadata\.jsonl: row 1 has no alt, only file_name, text; set .*captions\.column"),
        (COCOCaptions("/nowhere.json"), None, r"/nowhere\.json is no file; set --data\.source\.captions\.file"),
    ],
)
def test_a_form_that_captions_do_not_have_is_refused(
    tmp_path: Path, form: CaptionForm, spoil: str | None, message: str
) -> None:
    root = folder(tmp_path, spoil or "text files")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Folder(str(root), 8, captions=form, labels=False).load("train")


def test_broken_files_of_captions_are_named(tmp_path: Path) -> None:
    root = folder(tmp_path, "jsonl")
    (root / "metadata.jsonl").write_text('{"file_name": "a.png"')
    with pytest.raises(ValueError, match=r"metadata\.jsonl: "):
        Folder(str(root), 8, captions=Metadata(), labels=False).load("train")
    (tmp_path / "x.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"x\.json does not hold COCO's captions \(KeyError: 'annotations'\)"):
        Folder(str(root), 8, captions=COCOCaptions(str(tmp_path / "x.json")), labels=False).load("train")


@pytest.mark.filterwarnings("default::diffusion_lit.data.CorruptImageWarning")
def test_an_image_that_is_left_out_takes_its_captions_along(tmp_path: Path) -> None:
    root = folder(tmp_path, "text files")
    (root / "b" / "c.png").write_bytes(b"no image")
    source = Folder(str(root), 8, captions=TextFiles(), labels=False, in_memory=True)
    with pytest.warns(CorruptImageWarning, match=r"c\.png"):
        dataset = ImageData(source, on_corrupt="skip").dataset("train")
    assert dataset.captions is not None
    assert [dataset.captions[i] for i in range(len(dataset))] == [TEXTS["a.png"], TEXTS["b/d.x.png"]]


@pytest.mark.parametrize("in_memory", [True, False])
def test_other_captions_are_other_data(tmp_path: Path, in_memory: bool) -> None:
    root = folder(tmp_path, "text files")
    source = Folder(str(root), 8, captions=TextFiles(), labels=False, in_memory=in_memory)
    before = ImageData(source).fingerprint()
    assert ImageData(source).fingerprint() == before
    status = (root / "a.png").stat()
    (root / "a.txt").write_text("another")
    assert (root / "a.png").stat() == status
    assert ImageData(source).fingerprint() != before


# The stream


def first_batches(data: ImageData, count: int) -> list[list[str]]:
    loader = iter(data.train_dataloader())
    return [captions(next(loader)) for _ in range(count)]


def test_every_caption_is_taken_equally_often_and_only_by_seed_and_position() -> None:
    held = ImageData(CaptionedDigits(), batch_size=1797, seed=4)
    whole = first_batches(held, 3)
    assert first_batches(ImageData(CaptionedDigits(), batch_size=1797, seed=4), 3) == whole
    other = first_batches(ImageData(CaptionedDigits(), batch_size=1797, seed=5), 1)
    assert other[0] != whole[0]
    # Positions, not batches, decide.
    small = first_batches(ImageData(CaptionedDigits(), batch_size=599, seed=4), 9)
    assert [text for batch in small for text in batch] == [text for batch in whole for text in batch]
    stroked = sum(("bold" in text) + ("thin" in text) for batch in whole for text in batch)
    # Two thirds of the images have a stroke, and of their 56 captions 32 say it.
    expected = 3 * 1205 * 32 / 56
    assert abs(stroked - expected) < 5 * (expected * 24 / 56) ** 0.5


def test_captions_stay_where_another_entry_is_added() -> None:
    plain = ImageData(CaptionedDigits(), batch_size=20, seed=4)
    data = ImageData(LowResolution(CaptionedDigits(), factor=2), batch_size=20, seed=4)
    batch = next(iter(data.train_dataloader()))
    assert [captions(batch)] == first_batches(plain, 1)
    assert batch["low_res"].shape == (20, 1, 4, 4)
    assert data.dataset("train").texts(10) == plain.dataset("train").texts(10) != []


def test_captions_outside_of_training_are_always_the_same() -> None:
    data = ImageData(CaptionedDigits(), eval_batch_size=100)
    passes = [[text for batch in data.test_dataloader() for text in captions(batch)] for _ in range(2)]
    assert passes[0] == passes[1]
    assert captions(data.some([5, 3], "test")) == [passes[0][5], passes[0][3]]
    assert captions(data.examples([5, 3], "test")) == [passes[0][5], passes[0][3]]


def test_captioned_digits_say_what_is_true_of_the_image() -> None:
    digits = load_digits()
    ink = digits.images.reshape(1797, -1).sum(1)
    for split in ("train", "test"):
        dataset = CaptionedDigits().load(split)
        assert dataset.captions is not None
        for i, label in enumerate(digits.target):
            rank = (ink[digits.target == label] < ink[i]).mean()
            for text in dataset.captions[i]:
                words = text.replace(",", "").split()
                assert [w for w in words if w in NAMES or w.isdigit()] in ([NAMES[label]], [str(label)])
                assert rank > 0.5 if "bold" in words else rank < 0.5 if "thin" in words else True


def test_wordings_of_the_test_are_not_those_of_training() -> None:
    assert len(set(SEEN + SEEN_STROKES)) >= 20
    assert not set(SEEN + SEEN_STROKES) & set(UNSEEN + UNSEEN_STROKES)

    def texts(split: Any, **kwargs: Any) -> Counter[str]:
        dataset = CaptionedDigits(**kwargs).load(split)
        return Counter(dataset.texts(10**6))

    training, unseen, seen = texts("train"), texts("test"), texts("test", unseen=False)
    assert not training.keys() & unseen.keys()
    assert seen.keys() <= training.keys()
    assert unseen.total() == seen.total() == 1797


# Tar files


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def web(place: Path) -> Path:
    """What img2dataset writes: six images in two tar files, and statistics beside them."""
    root = place / "web"
    for tar in range(2):
        members: dict[str, bytes] = {}
        for i in range(3):
            number = 3 * tar + i
            key = f"{tar:05d}{i:04d}"
            members[f"{key}.png"] = png(number)
            members[f"{key}.txt"] = f"image number {number}\n".encode()
            members[f"{key}.json"] = json.dumps({"caption": f"json number {number}", "key": key}).encode()
        write_tar(root / f"{tar:05d}.tar", members)
        (root / f"{tar:05d}_stats.json").write_text("{}")
    return root


@pytest.mark.parametrize(("kind", "word"), [("txt", "image"), ("json", "json"), (None, None)])
def test_tar_files_are_read_in_any_order(tmp_path: Path, kind: str | None, word: str | None) -> None:
    data = ImageData(WebDataset(str(web(tmp_path)), 8, captions=kind))
    batch = data.some([4, 0, 5])
    assert batch["image"][:, 0, 0, 0].tolist() == [4, 0, 5]
    if word is None:
        assert "caption" not in batch
    else:
        assert captions(batch) == [f"{word} number {i}" for i in (4, 0, 5)]


def test_tar_files_are_listed_once_and_again_when_they_change(tmp_path: Path) -> None:
    root = web(tmp_path)
    source = WebDataset(str(root), 8)
    source.prepare()
    [index] = root.glob(".index-*.npz")
    state = index.stat()
    before = ImageData(source).fingerprint()
    assert index.stat() == state
    assert len(list(root.glob(".index-*"))) == 1
    write_tar(root / "00002.tar", {"x/y.jpg": png(9), "x/y.txt": b"another"})
    data = ImageData(WebDataset(str(root), 8))
    assert captions(data.some([6])) == ["another"]
    assert data.fingerprint() != before


def test_an_index_is_kept_in_the_cache_where_the_folder_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = web(tmp_path)
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path / "cache"))
    written = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if self == root:
            raise PermissionError(13, "Permission denied")
        written(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    WebDataset(str(root), 8).prepare()
    assert not list(root.glob(".index-*"))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert captions(ImageData(WebDataset(str(root), 8)).some([2])) == ["image number 2"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_worker_processes_read_tar_files_too(tmp_path: Path) -> None:
    data = ImageData(WebDataset(str(web(tmp_path)), 8), batch_size=6, num_workers=2)
    batch = next(iter(data.train_dataloader()))
    numbers = [int(text.split()[-1]) for text in captions(batch)]
    assert batch["image"][:, 0, 0, 0].tolist() == numbers
    assert sorted(numbers) == list(range(6))


def test_bad_tar_files_are_refused_in_one_line(tmp_path: Path) -> None:
    root = web(tmp_path)
    write_tar(root / "00002.tar", {"7.png": png(7), "8.png": png(8), "8.txt": b"8"})
    with pytest.raises(ValueError, match=r"1 of 8 images have no caption in a \.txt, first 7 of 00002\.tar; set "):
        WebDataset(str(root), 8).load("train")
    whole = (root / "00001.tar").read_bytes()
    # Inside a header, inside a member, between two, and no tar file at all.
    for content in (whole[: len(whole) // 3], whole[:600], whole[:1024], b"x" * 2000):
        (root / "00002.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"00002\.tar is no tar file that can be read to its end"):
            WebDataset(str(root), 8).load("train")
    with pytest.raises(FileNotFoundError, match=r"no \.tar files in .*nothing; set --data\.source\.root"):
        WebDataset(str(tmp_path / "nothing"), 8).load("train")
    with pytest.raises(ValueError, match="captions='html' is neither txt nor json nor null"):
        WebDataset(str(root), 8, captions="html")


def test_a_corrupt_image_in_a_tar_file_is_named_by_its_key(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"1.png": b"no image", "1.txt": b"one"})
    dataset = WebDataset(str(tmp_path), 8).load("train")
    assert dataset is not None
    with pytest.raises(ValueError, match=r"0\.tar, 1: "):
        dataset.read(0)


def test_keys_are_plain_tuples_to_worker_processes() -> None:
    assert Key(3) == (3, False, 0)
    assert torch.equal(torch.tensor(np.array([Key(1, True, 5)])), torch.tensor([[1, 1, 5]]))
