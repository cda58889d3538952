"""The judge of emoji pictures: two heads on frozen features, trained on training concepts alone."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from smalti.core.errors import UserError
from smalti.core.files import atomic_folder, write_json
from smalti.data.emoji import EmojiSet, captions, load_emoji
from smalti.evaluation.emoji_metrics import judge_text
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.judges import JudgeTraining, judge_report, train_judge
from smalti.zoo.loader import CARD, provenance, settings_hash


@dataclass(frozen=True)
class JudgeRecipe:
    """Everything that decides the judge.

    Args:
        steps: optimisation steps.
        seed: of weights and batches.
    """

    steps: int = 400
    seed: int = 0


PRESETS = {"cpu": JudgeRecipe(), "gpu": JudgeRecipe()}


def train(recipe: JudgeRecipe, out: Path, resume: bool = False) -> Path:
    """Trains the judge (minutes, nearly all of them features) and writes it to `out / "model"`."""
    if resume:
        raise UserError("the judge trains in minutes and keeps no checkpoints; leave --resume out")
    train_set, held_out = load_emoji("train"), load_emoji("held-out")
    extract = EfficientNetLite0()
    features, unseen = picture_features(extract, train_set), picture_features(extract, held_out)
    phrasings = [captions(item) for item in train_set.items]
    rows = [(index, text) for index, texts in enumerate(phrasings) for text in texts]
    picked = torch.tensor([index for index, _ in rows])
    keys = {key: number for number, key in enumerate(sorted({item.concept for item in train_set.items}))}
    concepts = torch.tensor([keys[item.concept] for item in train_set.items])
    settings = JudgeTraining(steps=recipe.steps, seed=recipe.seed)
    judge = train_judge(features[picked], judge_text([text for _, text in rows]), concepts[picked], settings)
    labels = [item.label for item in held_out.items]
    report = judge_report(judge, unseen, judge_text(labels), labels, [item.style for item in held_out.items])
    card = {
        "recipe": "judge-emoji",
        "settings": asdict(recipe),
        "settings_hash": settings_hash(asdict(recipe)),
        "data_hash": train_set.hash,
        "metrics": {
            "first of 20": round(report.first, 4),
            "matched preferred": round(report.preferred, 4),
            "pictures": report.count,
        },
    }
    with atomic_folder(out / "model") as folder:
        judge.to(torch.bfloat16).save_pretrained(folder)
        write_json(folder / CARD, card | provenance())
    return out / "model"


def picture_features(extract: EfficientNetLite0, pictures: EmojiSet) -> torch.Tensor:
    """Features (N, 1280) of all pictures."""
    starts = range(0, len(pictures), 64)
    return extract.of_batches(pictures.pixels(range(i, min(i + 64, len(pictures)))) for i in starts)
