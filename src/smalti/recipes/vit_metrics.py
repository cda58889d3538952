"""What the small vision transformers know of pictures that they were never shown: probes of frozen features.

Labels are the nine groups of emojibase; a probe is fitted on training concepts and judged on held-out ones. Beside it
stand the same probes of an untrained transformer and of the pixels themselves.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from smalti.data.emoji import EmojiSet, load_emoji
from smalti.evaluation.probe import linear_probe
from smalti.tokenizers.vision_encoder import VisionTransformer

BATCH = 64
PIXEL_SIDE = 32
PATCH_PROBES = 30000


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
    labels, unseen = torch.tensor(labels), torch.tensor(unseen)
    tokens, other = picture_tokens(encoder, train), picture_tokens(encoder, held_out)
    random = VisionTransformer.untrained(**settings)
    pooled = {
        "trained": (tokens.mean(1), other.mean(1)),
        "untrained": (picture_tokens(random, train).mean(1), picture_tokens(random, held_out).mean(1)),
        "pixels": (small_pixels(train), small_pixels(held_out)),
    }
    found: dict[str, Any] = {
        f"group probe, {name}": round(linear_probe(one, labels, two, unseen), 4) for name, (one, two) in pooled.items()
    }
    found["group probe, most frequent"] = round(float((unseen == labels.mode().values).float().mean()), 4)
    drawn, drawn_other = (drawn_patches(one, encoder.patch_size) for one in (train, held_out))
    rows = drawn.nonzero()
    rows = rows[:: max(1, len(rows) // PATCH_PROBES)]
    picture, patch = rows.unbind(1)
    picture_, patch_ = drawn_other.nonzero().unbind(1)
    single = linear_probe(tokens[picture, patch], labels[picture], other[picture_, patch_], unseen[picture_])
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
