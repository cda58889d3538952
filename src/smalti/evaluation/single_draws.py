"""Draws of single prompts, for methods that decide once for a whole batch: users draw one picture at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from smalti.core.protocols import Latents
from smalti.evaluation.held_out_prompts import Prompts, draw_latents, held_out_prompts


def single_draws(pipe: Any, prompts: Prompts, steps: int) -> list[Callable[[], Tensor]]:
    """For every prompt a function that draws its final latents (1, C, h, w)."""
    parts = zip(prompts.texts, prompts.styles, prompts.seeds, strict=True)
    singles = [Prompts((text,), (style,), (seed,)) for text, style, seed in parts]
    return [partial(draw_latents, pipe, one, steps) for one in singles]


def picture_draws(pipe: Any, draws: list[Callable[[], Tensor]]) -> list[Callable[[], Tensor]]:
    """The same draws as pixels (1, 3, H, W) in [0, 1]."""
    return [lambda draw=draw: pictures(pipe, draw()) for draw in draws]


def pictures(pipe: Any, latents: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] of final latents."""
    return (pipe.autoencoder.decode(Latents(latents)) / 2 + 0.5).clamp(0, 1)


def other_concepts(model: str, prompts: Prompts, count: int) -> Prompts:
    """Held-out prompts of concepts and seeds that are not among these, evenly spread, to choose settings by."""
    known = held_out_prompts(model, 10_000, first_seed=1000)
    keep = [index for index, text in enumerate(known.texts) if text not in prompts.texts]
    keep = keep[:: len(keep) // count][:count]
    texts, styles, seeds = known.texts, known.styles, known.seeds
    return Prompts(tuple(texts[i] for i in keep), tuple(styles[i] for i in keep), tuple(seeds[i] for i in keep))
