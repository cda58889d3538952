"""Prompts for a search and other ones for what it is judged by: held-out captions split by caption, seeds apart."""

from collections.abc import Sequence
from typing import NamedTuple

from smalti.evaluation.emoji_metrics import spread
from smalti.evaluation.held_out_prompts import Prompts, held_out_prompts

ALL = 10_000


class PromptSplit(NamedTuple):
    """Prompts of two kinds that share no caption and no seed."""

    search: Prompts
    claim: Prompts


def split_prompts(model: str, search: int, claim: int) -> PromptSplit:
    """Every third held-out caption is for the search, the others for the claim; captions and styles well mixed.

    Args:
        model: of the zoo.
        search, claim: how many of each, at most.
    """
    every, later = held_out_prompts(model, ALL), held_out_prompts(model, ALL, first_seed=ALL)
    by_caption: dict[str, list[int]] = {}
    for index, caption in enumerate(every.texts):
        by_caption.setdefault(caption, []).append(index)
    captions = list(by_caption.values())
    for_search = captions[2::3]
    for_claim = [one for index, one in enumerate(captions) if index % 3 != 2]
    return PromptSplit(pick(later, _mixed(for_search, search)), pick(every, _mixed(for_claim, claim)))


def _mixed(captions: list[list[int]], count: int) -> list[int]:
    """So many prompts of captions in several styles: each caption once before any comes again, in another style."""
    turns = [
        one[(place + turn) % len(one)]
        for turn in range(max(map(len, captions)))
        for place, one in enumerate(captions)
        if turn < len(one)
    ]
    return [turns[index] for index in spread(len(captions), count)] if count < len(captions) else turns[:count]


def pick(prompts: Prompts, indices: Sequence[int]) -> Prompts:
    """The prompts at these indices."""
    return Prompts(
        tuple(prompts.texts[index] for index in indices),
        tuple(prompts.styles[index] for index in indices),
        tuple(prompts.seeds[index] for index in indices),
    )
