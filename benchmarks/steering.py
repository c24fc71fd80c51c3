"""What steering does to the captioned digits: edits of attention, and guidance by CLIP beside classifier-free guidance.

    python -m benchmarks.steering --model M.ckpt --judge J.ckpt --clip NOISED.ckpt --clean_clip CLEAN.ckpt

Prints tables as Markdown and writes pictures to a folder. M is a model of texts (configs/steering_digits.yaml), J a
classifier (configs/features/digits.yaml), the others image and text towers (configs/guidance/clip_digits.yaml). The
judge is a classifier that guides nothing; ink is the mean brightness, in [0, 1].
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lit.checkpoint import load_model
from diffusion_lit.data import ImageData
from diffusion_lit.data.captioned_digits import NAMES, CaptionedDigits
from diffusion_lit.diffusion import DDIM, ClassifierFree, Guidance
from diffusion_lit.edit import Edit, Edited
from diffusion_lit.images import save_png, tile, to_uint8
from diffusion_lit.methods.clip_guidance import CLIPGuidance, CLIPScore
from diffusion_lit.methods.feature_network import TrainedFeatures
from diffusion_lit.methods.prompt_to_prompt import AttentionMaps, PromptToPrompt
from diffusion_lit.metrics.frechet import FeatureMoments, frechet_distance
from diffusion_lit.module import DiffusionModule
from diffusion_lit.text import encode_text

FACTORS = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
ZOOM = 4
SAMPLER = DDIM(25)


class Digits:
    """A model of texts about digits, and a judge of what its images show."""

    def __init__(self, model: str, judge: str) -> None:
        self.model = load_model(Path(model), DiffusionModule).eval()
        self.judge = TrainedFeatures(judge).eval()

    def sample(self, texts: Sequence[str], edit: Edit | None = None, first: int = 0) -> Tensor:
        """One image a text, (B, C, H, W'), in [-1, 1]; image i has the noise of image first + i."""
        generator = self.model if edit is None else Edited(self.model, edit)
        condition = {"caption": encode_text(texts)}
        return generator.sample(range(first, first + len(texts)), sampler=SAMPLER, condition=condition).clamp(-1, 1)

    def shown(self, images: Tensor) -> Tensor:
        """The digit that the judge sees in each image, (B,)."""
        return self.judge.outputs(to_uint8(images))["logits"].argmax(1)

    def features(self, images: Tensor) -> Tensor:
        """The judge's features, (B, D)."""
        return self.judge.outputs(to_uint8(images))["features"]


def ink(images: Tensor) -> float:
    """Mean brightness, in [0, 1]."""
    return float((images + 1).mean() / 2)


def save(rows: Sequence[Sequence[Tensor]], path: Path) -> None:
    """A picture with one image a cell, (C, H, W) each in [-1, 1], enlarged."""
    images = torch.stack([image for row in rows for image in row])
    large = to_uint8(images).repeat_interleave(ZOOM, 2).repeat_interleave(ZOOM, 3)
    save_png(tile(large, len(rows[0])), path)


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    """Prints a Markdown table, each row as soon as it is there."""
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def reweighting(digits: Digits, word: str, count: int, out: Path) -> None:
    """Factors of a word beside the ink of the images, and the digit that the judge sees."""
    texts = [f"a {word} {name}" for name in NAMES] * count
    plain, wanted = digits.sample(texts), torch.arange(len(NAMES)).repeat(count)
    seen = digits.shown(plain)
    columns: list[Tensor] = []

    def rows() -> Iterator[Sequence[str]]:
        for factor in FACTORS:
            edit = PromptToPrompt(reweight=f"{word}={factor}", cross=(0, 1), self_attention=(0, 0))
            images = digits.sample(texts, edit)
            columns.append(images)
            now = digits.shown(images)
            shares = (f"{float((now == other).double().mean()):.3f}" for other in (seen, wanted))
            yield f"{factor:g}", f"{ink(images):.4f}", *shares, f"{float((images - plain).abs().mean() / 2):.4f}"

    table(
        (f"factor of *{word}*", "ink", "same digit as at 1", "digit of the text", "mean change of a pixel"),
        rows(),
    )
    save([[column[i] for column in columns] for i in range(len(NAMES))], out / f"steering_{word}.png")


def replacement(digits: Digits, old: str, new: str, count: int, out: Path) -> None:
    """An edited image beside the old text's and the new text's own, by how much of the old one it keeps."""
    texts = [f"a {old}"] * count
    before, own = digits.sample(texts), digits.sample([f"a {new}"] * count)
    kept: list[Tensor] = []

    def rows() -> Iterator[Sequence[str]]:
        named = {
            "no edit: the new text's own image": None,
            "cross 0 to 0.8, self never": PromptToPrompt(f"{old}:{new}", self_attention=(0, 0)),
            "cross 0 to 0.8, self 0 to 0.4 (default)": PromptToPrompt(f"{old}:{new}"),
            "the same, blended": PromptToPrompt(f"{old}:{new}", blend=f"{old},{new}"),
        }
        for name, edit in named.items():
            images = own if edit is None else digits.sample(texts, edit)
            kept.append(images)
            shown = float((digits.shown(images) == NAMES.index(new)).double().mean())
            yield name, f"{shown:.3f}", f"{float((images - before).abs().mean() / 2):.4f}"

    table((f"{old} to {new}", "judged to be the new digit", "mean change of a pixel"), rows())
    save([[images[i] for images in (before, *kept)] for i in range(6)], out / "steering_replace.png")


def maps(digits: Digits, out: Path) -> None:
    """Pictures of the maps of every word."""
    texts = [f"a {stroke} {name}" for name in ("three", "seven", "zero", "four") for stroke in ("bold", "thin")]
    strips = digits.sample(texts, AttentionMaps())
    save([list(strip.split(strip.shape[1], 2)) for strip in strips], out / "steering_maps.png")


def guidances(digits: Digits, clip: str, clean_clip: str, count: int) -> None:
    """Classifier-free guidance and both kinds of CLIP guidance, by the same scores."""
    data = ImageData(CaptionedDigits(), batch_size=64)
    data.prepare_data()
    real = data.dataset("val")
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:count].tolist()
    given = data.examples(order, "val")
    caption, label = given["caption"], given["label"]
    scores = [CLIPScore(clip), CLIPScore(clean_clip)]
    wanted = moments(digits, data.examples(range(len(real)), "val")["image"])

    def score(guidance: Guidance | None) -> Sequence[str]:
        digits.model.guidance = guidance
        start = time.process_time()
        images = digits.model.sample(range(count), sampler=SAMPLER, condition={"caption": caption}).clamp(-1, 1)
        seconds = time.process_time() - start
        agreement = float((digits.shown(images) == label).double().mean())
        distance = frechet_distance(*moments(digits, images), *wanted)
        seen = [s.per_image(digits.model, to_uint8(images), {"caption": caption})["clip_score"].mean() for s in scores]
        return f"{agreement:.3f}", f"{distance:.2f}", *(f"{float(value):.3f}" for value in seen), f"{seconds:.0f}"

    def rows() -> Iterator[Sequence[str]]:
        yield "none", "-", *score(None)
        for w in (1.0, 2.0, 4.0):
            yield "classifier-free", f"w = {w:g}", *score(ClassifierFree(w))
        for name, file, scales in (
            ("noised CLIP", clip, (1.0, 3.0, 10.0)),
            ("CLIP of x_0", clean_clip, (1.0, 3.0, 10.0)),
        ):
            for s in scales:
                yield name, f"s = {s:g}", *score(CLIPGuidance(file, s))

    heads = ("guidance", "scale", "digit of the text", "Fréchet distance", "noised CLIP's score", "clean CLIP's score")
    table((*heads, "CPU seconds"), rows())


def moments(digits: Digits, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the judge's features."""
    features = digits.features(images)
    found = FeatureMoments(features.shape[1])
    found.update(features)
    return found.mean_and_covariance()


def main() -> None:
    """Prints the tables and writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "judge", "clip", "clean_clip"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--count", type=int, default=200, help="images of the table of guidances")
    parser.add_argument("--out", type=Path, default=Path("runs/steering"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    digits = Digits(options.model, options.judge)
    for word in ("bold", "thin"):
        reweighting(digits, word, 3, options.out)
    replacement(digits, "three", "eight", 40, options.out)
    maps(digits, options.out)
    guidances(digits, options.clip, options.clean_clip, options.count)


if __name__ == "__main__":
    main()
