"""What every attention head does when it is perturbed alone: a contact sheet and numbers.

Each head's pictures stand beside the plain ones of the same prompts and seeds. `structure` is one minus the correlation
of the grey values (0 = the same shapes), `colour` the distance of the mean colours; the rest are changes of the
statistics of `evaluation.rewards`: below zero is less.

Source: Fine-Grained Perturbation Guidance via Attention Head Selection (arXiv 2506.10978), section 4, figures of single
heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import smalti
from smalti.control.head_hunt import Draw, drawer
from smalti.control.headhunter_softpag import PerturbedHeads
from smalti.evaluation.held_out_prompts import Prompts
from smalti.evaluation.rewards import brightness, colourfulness, contrast, edges, luma
from smalti.evaluation.sheet import sheet, to_images
from smalti.seams.heads import Address, read_heads, write_address

STATISTICS = {"brightness": brightness, "colourfulness": colourfulness, "contrast": contrast, "sharpness": edges}


@dataclass(frozen=True)
class HeadAtlas:
    """Pictures and effects of single heads.

    Args:
        prompts: that were drawn.
        plain: pixels (B, 3, H, W) without perturbation.
        pictures: pixels (B, 3, H, W) by head.
        effects: by head, the mean change of every statistic.
    """

    prompts: Prompts
    plain: Tensor
    pictures: Mapping[Address, Tensor]
    effects: Mapping[Address, Mapping[str, float]]

    def ranked(self, statistic: str, count: int = 5) -> list[Address]:
        """The heads that raise a statistic most."""
        return sorted(self.effects, key=lambda head: -self.effects[head][statistic])[:count]

    def sheet(self, scale: int = 1) -> Image.Image:
        """A row for the plain pictures, then one a head, labelled with its address."""
        rows = {"plain": self.plain, **{write_address(head): some for head, some in self.pictures.items()}}
        labels = [name for name, some in rows.items() for _ in some]
        return sheet(to_images(torch.cat(list(rows.values()))), labels, columns=len(self.plain), scale=scale)


def head_atlas(
    pipe: Any,
    prompts: Prompts,
    method: PerturbedHeads | None = None,
    heads: Sequence[Address] | None = None,
    steps: int = 15,
    draw: Draw | None = None,
) -> HeadAtlas:
    """Draws the prompts once for every head.

    Args:
        pipe: one of our pipelines, or any other with `draw`.
        prompts: a few pairs of prompt and seed; they are one batch.
        method: everything but the heads; None = the defaults, without classifier-free guidance.
        heads: None = all.
        steps: sampling steps.
        draw: how the pipeline draws without classifier-free guidance; None = as our pipelines do.
    """
    draw = draw or drawer(pipe, steps)
    base = replace(method or PerturbedHeads(), guidance=1.0, rows="all")
    plain = draw(prompts)
    pictures = {}
    for head in heads or read_heads(pipe, lambda: draw(prompts.first(1))):
        with smalti.apply(pipe, replace(base, heads={head: 1.0})):
            pictures[head] = draw(prompts)
    return HeadAtlas(prompts, plain, pictures, {head: effects(plain, some) for head, some in pictures.items()})


def effects(plain: Tensor, changed: Tensor) -> dict[str, float]:
    """Mean change of pictures (B, 3, H, W) against plain ones (B, 3, H, W)."""
    grey = torch.stack([luma(plain), luma(changed)]).flatten(2)
    grey = grey - grey.mean(2, keepdim=True)
    likeness = torch.cosine_similarity(grey[0], grey[1], dim=1)
    distance = ((changed - plain) / 2).mean((2, 3)).norm(dim=1)
    changes = {name: (one(changed) - one(plain)).mean() for name, one in STATISTICS.items()}
    return {name: float(value) for name, value in
            {"structure": 1 - likeness.mean(), "colour": distance.mean(), **changes}.items()}  # fmt: skip
