"""Two tasks of a trained arm on latents of digits: inpainting, and drawing for a semantic map.

Both go on from the arm's weights with further channels at its input; each is measured against what needs no training.
"""

from typing import NamedTuple

import torch

from smalti.control.channel_concat import InpaintChannels, SemanticMapChannels
from smalti.core.seeds import generators_for
from smalti.data.digit_maps import MAP_CLASSES, digit_maps
from smalti.data.digits import CLASSES, load_digits
from smalti.data.masks import KINDS, draw_masks
from smalti.evaluation.digit_metrics import load_classifier
from smalti.evaluation.digit_segmenter import segment_digits
from smalti.evaluation.inpainting import InpaintReport, inpaint_report
from smalti.evaluation.segmentation import MapReport, map_report
from smalti.evaluation.vgg import VGG16
from smalti.recipes.digit_latents import CHANNELS, FACTOR, decode_digits, digit_latents, encoded_digits
from smalti.recipes.latent_arm import FLOW, LatentArm, held_out_rows, train_latent_arm
from smalti.sampling.keep_known import paste
from smalti.training.config import TrainConfig
from smalti.training.inpaint_source import InpaintSource, inpaint_extra


class Filled(NamedTuple):
    """Inpainting by a model that was trained for it, and by one that was not, with what is known put back.

    Args:
        trained, pasted: reports of both.
        trained_accuracy, pasted_accuracy: shares of filled digits that are read as their class.
    """

    trained: InpaintReport
    pasted: InpaintReport
    trained_accuracy: float
    pasted_accuracy: float


def inpainting(base: LatentArm, config: TrainConfig, count: int = 250, network: VGG16 | None = None) -> Filled:
    """Trains a pretrained arm on inpainting and fills masked held-out digits, each kind of mask in turn."""
    sources = [InpaintSource(encoded_digits(split)) for split in ("train", "held-out")]
    trained = train_latent_arm(
        FLOW, config, start=base, conditions=[InpaintChannels(CHANNELS)], sources=(sources[0], sources[1])
    )
    rows, source = held_out_rows(count), sources[1].source
    pixels = source.pictures.pixels(rows.tolist())
    parts = [
        draw_masks(pixels.shape[-2:], generators_for([row]), 1, [KINDS[row % len(KINDS)]]) for row in rows.tolist()
    ]
    mask, real = torch.cat(parts), pixels[:, :1]
    extra, figures = inpaint_extra(source.tokenizer, pixels, mask), []
    for arm, keeps in ((trained, False), (base, True)):
        filled = paste(decode_digits(arm.draw(count=count, extra=extra, keeps=keeps).latents), real, mask)
        right = load_classifier()(filled).argmax(1) == load_digits("held-out").labels[rows]
        figures.append((inpaint_report(filled, real, mask, network), float(right.float().mean())))
    (one, first), (other, second) = figures
    return Filled(one, other, first, second)


def drawing_maps(base: LatentArm, config: TrainConfig, count: int = 500) -> MapReport:
    """Trains a pretrained arm on semantic maps without classes, and draws for those of held-out digits."""
    conditions = [SemanticMapChannels(MAP_CLASSES, channels=CHANNELS, halvings=FACTOR.bit_length() - 1)]
    sources = (digit_latents("train", True), digit_latents("held-out", True))
    arm = train_latent_arm(FLOW, config, start=base, conditions=conditions, sources=sources)
    rows = held_out_rows(count)
    maps = digit_maps(load_digits("held-out"))[rows]
    nothing = torch.full((count,), CLASSES)
    pixels = decode_digits(arm.draw(count=count, labels=nothing, extra={"segments": maps}).latents)
    return map_report(segment_digits, pixels, maps, MAP_CLASSES)
