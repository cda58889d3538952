"""How well a text-to-clip model animates held-out emoji: the look of its frames, and how much and how they move.

Frames are judged like pictures, by the Fréchet distance of EfficientNet-Lite0. Motion is the mean absolute difference
of neighbouring frames in [-1, 1] pixels; beside it stands that of the real clips, and that of a model of pictures whose
frames have nothing to do with each other would be many times as large.
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from smalti.data.emoji import EmojiSet
from smalti.evaluation.emoji_metrics import SEED, spread, take
from smalti.evaluation.features import EfficientNetLite0
from smalti.evaluation.frechet import METRIC, frechet_distance
from smalti.evaluation.sheet import from_images, sheet
from smalti.sampling.pictures import draw_pictures
from smalti.sampling.pipeline import TextToImagePipeline


def clip_metrics(pipe: TextToImagePipeline, held_out: EmojiSet, count: int, steps: int = 28) -> dict[str, Any]:
    """Figures of a model on held-out clips, evenly spread.

    Args:
        pipe: the model.
        held_out: clips of 16 frames.
        count: clips that are drawn; all of them if there are fewer.
        steps: sampling steps.

    Returns:
        json: the figures by name.
    """
    chosen, frames = take(held_out, spread(len(held_out), count)), pipe.config["frames"]
    real = chosen.pixels().transpose(1, 2)  # (B, 16, 3, S, S)
    real = real[:, :: real.shape[1] // frames]
    labels, styles = [item.label for item in chosen.items], [item.style for item in chosen.items]
    films = draw_pictures(pipe, labels, styles, range(SEED, SEED + len(chosen)), num_inference_steps=steps)
    drawn = from_images([frame for clip in films for frame in clip]).unflatten(0, (-1, frames))
    extract = EfficientNetLite0()
    distance = frechet_distance(extract(drawn.flatten(0, 1)), extract(real.flatten(0, 1)))
    return {
        "clips": len(chosen),
        "steps": steps,
        f"{METRIC} of the frames": round(distance, 2),
        "motion": round(motion(drawn).mean().item(), 4),
        "motion, real": round(motion(real).mean().item(), 4),
    }


def motion(clips: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames of clips (B, F, 3, H, W): (B,)."""
    return clips.diff(dim=1).abs().flatten(1).mean(1)


def film(clips: Sequence[Sequence[Image.Image]], labels: Sequence[str]) -> Image.Image:
    """One sheet: the frames of each clip in a row, its label under the first."""
    frames = len(clips[0])
    names = [label if frame == 0 else "" for label in labels for frame in range(frames)]
    return sheet([frame for clip in clips for frame in clip], names, columns=frames, scale=1)
