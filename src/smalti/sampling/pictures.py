"""Pictures or clips from lists of prompts, styles and seeds, without a progress bar: for sheets and measurements."""

from collections.abc import Sequence
from typing import Any

from smalti.core.seeds import generators_for
from smalti.sampling.pipeline import TextToImagePipeline

BATCH = 32


def draw_pictures(
    pipe: TextToImagePipeline,
    prompts: Sequence[str],
    styles: Sequence[str] | None,
    seeds: Sequence[int],
    **settings: Any,
) -> list[Any]:
    """One picture for each prompt, in batches of 32; a model of clips gives lists of pictures.

    Args:
        pipe: the model.
        prompts: one a picture; empty strings for a model without text.
        styles: one a picture, or None.
        seeds: one a picture.
        settings: further arguments of the pipeline, such as `num_inference_steps`.
    """
    pictures: list[Any] = []
    shown = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        style = None if styles is None else list(styles[part])
        seeded = generators_for(seeds[part])
        result: Any = pipe(list(prompts[part]), style=style, generator=seeded, return_dict=False, **settings)  # type: ignore[arg-type]
        pictures += result[0]
    pipe.set_progress_bar_config(**shown)
    return pictures
