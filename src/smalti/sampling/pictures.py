"""Pictures from lists of prompts, styles and seeds, without a progress bar: what sheets and measurements ask for."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from smalti.core.seeds import generators_for
from smalti.sampling.pipeline import TextToImagePipeline

BATCH = 32


def draw_pictures(
    pipe: TextToImagePipeline,
    prompts: Sequence[str],
    styles: Sequence[str] | None,
    seeds: Sequence[int],
    **settings: Any,
) -> list[Image.Image]:
    """One picture for each prompt, in batches of 32.

    Args:
        pipe: the model.
        prompts: one a picture; empty strings for a model without text.
        styles: one a picture, or None.
        seeds: one a picture.
        settings: further arguments of the pipeline, such as `num_inference_steps`.
    """
    pictures: list[Image.Image] = []
    shown = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        style = None if styles is None else list(styles[part])
        result: Any = pipe(list(prompts[part]), style=style, generator=generators_for(seeds[part]), **settings)  # type: ignore[arg-type]
        pictures += result.images
    pipe.set_progress_bar_config(**shown)
    return pictures
