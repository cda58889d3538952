"""How well a text-to-picture model draws held-out emoji concepts from their captions.

Judge and Fréchet distance read the features of EfficientNet-Lite0, which taught no model of the zoo. Beside each figure
stands what makes it readable: the judge on the real held-out pictures, the distance of these after a blur of
2 pixels, and of as many real training pictures (the floor).
"""

from pathlib import Path
from typing import Any

import torch
from PIL import ImageFilter
from torch import Tensor
from tqdm import tqdm

from smalti.core.errors import UserError
from smalti.data.emoji import EmojiSet, load_emoji
from smalti.evaluation.copies import copy_report
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.frechet import METRIC, frechet_distance
from smalti.evaluation.judges import RetrievalJudge, judge_report
from smalti.evaluation.sheet import from_images, sheet, to_images
from smalti.sampling.pictures import draw_pictures
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.tokenizers.text_encoder import MiniLMEncoder
from smalti.zoo.loader import ZOO

JUDGE = "judge-emoji"
JUDGE_TEXT_LENGTH = 32
BLUR = 2.0
BATCH = 32
SEED = 1000


def load_judge() -> RetrievalJudge:
    """The judge that ships."""
    folder = ZOO / JUDGE
    if not (folder / "config.json").is_file():
        raise UserError(f"no judge in {folder}; make it with: smalti train --recipe judge-emoji --out runs/judge")
    return RetrievalJudge.from_pretrained(folder, torch_dtype=torch.float32).eval()


def judge_text(captions: list[str]) -> Tensor:
    """The judge's text vectors (N, 384)."""
    return MiniLMEncoder(length=JUDGE_TEXT_LENGTH).encode(captions).pooled


def spread(items: int, count: int) -> list[int]:
    """`count` of so many items, evenly spaced; all if there are fewer."""
    count = min(count, items)
    return [index * items // count for index in range(count)]


def draw_captions(pipe: TextToImagePipeline, pictures: EmojiSet, steps: int, guidance: float | None = None) -> Tensor:
    """Pixels (N, 3, H, W) in [-1, 1] drawn from the label and style of every picture; the seed is its index."""
    drawn = []
    for start in tqdm(range(0, len(pictures), BATCH), desc="drawing", unit="batch"):
        items = pictures.items[start : start + BATCH]
        seeds = range(SEED + start, SEED + start + len(items))
        labels, styles = [item.label for item in items], [item.style for item in items]
        drawn += draw_pictures(pipe, labels, styles, seeds, num_inference_steps=steps, guidance_scale=guidance)
    return from_images(drawn)


def emoji_metrics(
    pipe: TextToImagePipeline,
    topics: tuple[str, ...] | None,
    count: int = 400,
    steps: int = 28,
    guidance: float | None = None,
    save: Path | None = None,
    variant: str | None = None,
) -> dict[str, Any]:
    """Figures of a model on held-out (concept, style) pairs.

    Args:
        pipe: the model.
        topics: the subsets it was trained on; None = all concepts.
        count: pairs, evenly spaced over all; all of them if there are fewer.
        steps: sampling steps.
        guidance: its default if None.
        save: a PNG file for the drawn pictures in sheet order.
        variant: of the data set, of the size that the model draws.

    Returns:
        json: the figures by name.
    """
    styles = list(pipe.config["styles"])
    held_out = load_emoji("held-out", styles=styles, topics=topics, variant=variant)
    held_out = take(held_out, spread(len(held_out), count))
    train = load_emoji("train", styles=styles, topics=topics, variant=variant)
    extract, judge = EfficientNetLite0(), load_judge()
    drawn = draw_captions(pipe, held_out, steps, guidance)
    if save is not None:
        sheet(to_images(drawn), [f"{item.label}, {item.style}" for item in held_out.items], columns=16, scale=1).save(
            save
        )
    real = held_out.pixels()
    features = {name: extract(pixels) for name, pixels in {"drawn": drawn, "real": real, "blurred": blur(real)}.items()}
    train_features = extract.of_batches(
        train.pixels(range(i, min(i + 64, len(train)))) for i in range(0, len(train), 64)
    )
    captions, item_styles = [item.label for item in held_out.items], [item.style for item in held_out.items]
    text = judge_text(captions)
    reports = {name: judge_report(judge, features[name], text, captions, item_styles) for name in ("drawn", "real")}
    copies = {name: copy_report(features[name], train_features, concept_numbers(train)) for name in ("drawn", "real")}
    floor = train_features[spread(len(train), len(held_out))]
    return {
        "pairs": len(held_out),
        "steps": steps,
        METRIC: round(frechet_distance(features["drawn"], features["real"]), 2),
        f"{METRIC} blurred by {BLUR:g} px": round(frechet_distance(features["blurred"], features["real"]), 2),
        f"{METRIC} floor (train)": round(frechet_distance(floor, features["real"]), 2),
        "matched preferred": round(reports["drawn"].preferred, 4),
        "matched preferred, real": round(reports["real"].preferred, 4),
        "matched preferred, ratio": round(reports["drawn"].preferred / reports["real"].preferred, 4),
        "first of 20": round(reports["drawn"].first, 4),
        "first of 20, real": round(reports["real"].first, 4),
        "copied": round(copies["drawn"].share, 4),
        "copied, real": round(copies["real"].share, 4),
    }


def drawn_distance(
    pipe: TextToImagePipeline,
    topics: tuple[str, ...] | None,
    steps: int,
    count: int | None = None,
    guidance: float | None = None,
) -> float:
    """Fréchet distance of pictures drawn from held-out captions of these topics to the real ones.

    Args:
        pipe: the model.
        topics: the subsets it was trained on; None = all concepts.
        steps: sampling steps.
        count: pictures, evenly spaced over all; None = all.
        guidance: its default if None.
    """
    held_out = load_emoji("held-out", styles=list(pipe.config["styles"]), topics=topics)
    if count is not None:
        held_out = take(held_out, spread(len(held_out), count))
    extract = EfficientNetLite0()
    drawn = extract(draw_captions(pipe, held_out, steps, guidance))
    return frechet_distance(drawn, picture_features(extract, held_out))


def picture_features(extract: EfficientNetLite0, pictures: EmojiSet) -> Tensor:
    """Features (N, 1280) of all pictures."""
    starts = range(0, len(pictures), 64)
    return extract.of_batches(pictures.pixels(range(i, min(i + 64, len(pictures)))) for i in starts)


def concept_numbers(pictures: EmojiSet) -> Tensor:
    """A number (N,) for the concept of each picture."""
    number = {concept: index for index, concept in enumerate(sorted({item.concept for item in pictures.items}))}
    return torch.tensor([number[item.concept] for item in pictures.items])


def take(pictures: EmojiSet, indices: list[int]) -> EmojiSet:
    """The pictures at these indices."""
    return EmojiSet(tuple(pictures.items[i] for i in indices), pictures.images[indices], pictures.hash)


def blur(pixels: Tensor) -> Tensor:
    """Gaussian blur of pixels (B, 3, H, W) with a standard deviation of 2 pixels."""
    return from_images([image.filter(ImageFilter.GaussianBlur(BLUR)) for image in to_images(pixels)])
