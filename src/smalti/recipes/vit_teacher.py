"""What the recipes of small vision transformers share: measuring the encoder, and writing it.

What an encoder knows of pictures that it was never shown is read off by probes of its frozen features.

Labels are the nine groups of emojibase; a probe is fitted on training concepts and judged on held-out ones. Beside it
stand the same probes of an untrained transformer and of the pixels themselves.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from smalti.core.files import atomic_folder, write_json
from smalti.data.emoji import EmojiSet, load_emoji
from smalti.evaluation.emoji_metrics import concept_numbers
from smalti.evaluation.probe import linear_probe
from smalti.tokenizers.vision_encoder import VisionTransformer
from smalti.training.trainer import TrainReport
from smalti.zoo.loader import CARD, cast_weights, provenance, settings_hash

BATCH = 64
PIXEL_SIDE = 32
PATCH_PROBES = 30000


def write_teacher(
    encoder: VisionTransformer, recipe: Any, name: str, data_hash: str, report: TrainReport, out: Path, **metrics: float
) -> Path:
    """Measures an encoder and writes weights in bfloat16, config and card as one whole folder, `out / "model"`.

    Args:
        encoder: trained.
        recipe: its settings, with `encoder` and `training`.
        name: of the recipe.
        data_hash: of the pictures.
        report: of its training.
        out: where `model` is written.
        metrics: further figures.
    """
    settings = asdict(recipe)
    card = {
        "recipe": name,
        "data_hash": data_hash,
        "settings": settings,
        "settings_hash": settings_hash(settings),
        "metrics": vision_metrics(encoder, recipe.encoder) | metrics,
        "images_seen": report.steps * recipe.training.batch,
        "ended": report.ended,
        "held_out_loss": report.held_out_loss,
    }
    with atomic_folder(out / "model") as temporary:
        encoder.save_pretrained(temporary)
        cast_weights(temporary, torch.bfloat16)
        write_json(temporary / CARD, card | provenance())
    return out / "model"


def vision_metrics(encoder: VisionTransformer, settings: dict[str, Any]) -> dict[str, Any]:
    """Probe accuracies of a trained encoder and of what it must beat, and how local its tokens are.

    Args:
        encoder: trained.
        settings: with which it was built, for the untrained one.

    Returns:
        json: the figures by name.
    """
    train, held_out = load_emoji("train"), load_emoji("held-out")
    names = sorted({item.group for item in train.items})
    labels, unseen = ([names.index(item.group) for item in pictures.items] for pictures in (train, held_out))
    labels, unseen, concepts = torch.tensor(labels), torch.tensor(unseen), concept_numbers(train)
    tokens, other = picture_tokens(encoder, train), picture_tokens(encoder, held_out)
    random = VisionTransformer.untrained(**settings)
    pooled = {
        "trained": (tokens.mean(1), other.mean(1)),
        "untrained": (picture_tokens(random, train).mean(1), picture_tokens(random, held_out).mean(1)),
        "pixels": (small_pixels(train), small_pixels(held_out)),
    }
    found: dict[str, Any] = {
        f"group probe, {name}": round(linear_probe(one, labels, concepts, two, unseen), 4)
        for name, (one, two) in pooled.items()
    }
    found["group probe, most frequent"] = round(float((unseen == labels.mode().values).float().mean()), 4)
    drawn, drawn_other = (drawn_patches(one, encoder.patch_size) for one in (train, held_out))
    rows = drawn.nonzero()
    rows = rows[:: max(1, len(rows) // PATCH_PROBES)]
    picture, patch = rows.unbind(1)
    picture_, patch_ = drawn_other.nonzero().unbind(1)
    single = linear_probe(
        tokens[picture, patch], labels[picture], concepts[picture], other[picture_, patch_], unseen[picture_]
    )
    found["group probe, single patch"] = round(single, 4)
    centred = other - other.mean((0, 1))
    within = (other - other.mean(1, keepdim=True)).square().sum() / centred.square().sum()
    found["variance within pictures"] = round(float(within), 4)
    return found | {"pictures": len(held_out)}


@torch.no_grad()
def picture_tokens(encoder: VisionTransformer, pictures: EmojiSet) -> Tensor:
    """Patch tokens (N, T, D) of all pictures, in the order of the set."""
    starts = range(0, len(pictures), BATCH)
    return torch.cat(
        [encoder(pictures.pixels(range(start, min(start + BATCH, len(pictures))))).float() for start in starts]
    )


def small_pixels(pictures: EmojiSet) -> Tensor:
    """Pixels averaged to 32 x 32 and flattened (N, 3072): what a probe without features reads."""
    return adaptive_avg_pool2d(pictures.pixels(), PIXEL_SIDE).flatten(1)


def drawn_patches(pictures: EmojiSet, patch: int) -> Tensor:
    """Which patches (N, T) something is drawn on: at least half of their area is opaque."""
    alpha = torch.from_numpy(pictures.images[..., 3]).float()[:, None] / 255
    return avg_pool2d(alpha, patch).flatten(1) >= 0.5
