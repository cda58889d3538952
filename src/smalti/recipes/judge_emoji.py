"""The judge of emoji pictures: two heads on frozen features, trained on training concepts alone."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.files import atomic_folder, write_json
from smalti.data.emoji import captions, load_emoji
from smalti.evaluation.emoji_metrics import concept_numbers, judge_text, picture_features
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.judges import JudgeTraining, judge_report, train_judge
from smalti.zoo.loader import CARD, cast_weights, provenance, settings_hash


@dataclass(frozen=True)
class JudgeRecipe:
    """Everything that decides the judge.

    Args:
        steps: optimisation steps.
        seed: of weights and batches.
    """

    steps: int = 800
    seed: int = 0


PRESETS = {"cpu": JudgeRecipe(), "gpu": JudgeRecipe()}


def train(recipe: JudgeRecipe, out: Path, resume: bool = False) -> Path:
    """Trains the judge (minutes, nearly all of them features) and writes it to `out / "model"`."""
    if resume:
        raise UserError("the judge trains in minutes and keeps no checkpoints; leave --resume out")
    train_set, held_out = load_emoji("train"), load_emoji("held-out")
    extract = EfficientNetLite0()
    features, unseen = picture_features(extract, train_set), picture_features(extract, held_out)
    text = caption_vectors([captions(item) for item in train_set.items])
    settings = JudgeTraining(steps=recipe.steps, seed=recipe.seed)
    judge = train_judge(features, text, concept_numbers(train_set), settings)
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
        judge.save_pretrained(folder)
        cast_weights(folder, torch.bfloat16)
        write_json(folder / CARD, card | provenance())
    return out / "model"


def caption_vectors(phrasings: list[list[str]]) -> Tensor:
    """Text vectors (N, V, T) of every picture's captions; where there are fewer than V they come again in turn."""
    most = max(map(len, phrasings))
    texts = sorted({text for one in phrasings for text in one})
    row = {text: index for index, text in enumerate(texts)}
    rows = torch.tensor([[row[one[k % len(one)]] for k in range(most)] for one in phrasings])
    return judge_text(texts)[rows]
