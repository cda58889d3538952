"""Sets of related pictures, as panels of one canvas.

What the panels of a set have in common is what a model can learn to carry from one to the other: the vendor who drew
them, their colour, the motion of one thing, or a person (`data.avatar_panels`). Every kind can also be made with that
mixed up, which is the control of such a training.

Source: In-Context LoRA (arXiv 2410.23775), section 4.1: 20 to 100 sets a task.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.seeds import derive_seed
from smalti.data.emoji import EmojiSet, on_white
from smalti.ops.canvas import PanelLayout

COLOURS = {
    "red": (214, 39, 40), "orange": (255, 127, 14), "green": (44, 160, 44), "blue": (31, 119, 180),
    "purple": (148, 103, 189), "pink": (227, 119, 194),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class PanelSet:
    """One set.

    Args:
        panels: pictures (P, 3, h, w) in [-1, 1].
        captions: one a panel; `{who}` stands for a name.
        shared: what the panels have in common, as the measure of agreement knows it; of each panel, so that a set
            that was mixed up says so.
        summary: of the whole set.
    """

    panels: Tensor
    captions: tuple[str, ...]
    shared: tuple[str, ...]
    summary: str = ""

    def __post_init__(self):
        if not len(self.panels) == len(self.captions) == len(self.shared):
            raise UserError(
                f"got {len(self.panels)} panels, {len(self.captions)} captions and {len(self.shared)} shared things; "
                "give one of each a panel"
            )

    def canvas(self, layout: PanelLayout, multiple: int = 1) -> Tensor:
        """The set as one picture (3, H, W)."""
        return layout.assemble(list(self.panels), multiple)


def style_sets(pictures: EmojiSet, count: int, panels: int = 2, seed: int = 0) -> list[PanelSet]:
    """Different concepts drawn by one vendor; neither caption nor summary names the vendor.

    Args:
        pictures: of several styles.
        count: of the sets; styles take turns, concepts are drawn anew for each set.
        panels: P, at most the number of concepts.
        seed: of the choice.
    """
    concepts = len({item.concept for item in pictures.items})
    if count < 1 or concepts < panels:
        raise UserError(
            f"got {count} sets of {panels} panels from {concepts} concepts; ask for at least 1 set of fewer"
        )
    generator = torch.Generator().manual_seed(derive_seed("style sets", seed))
    styles = sorted({item.style for item in pictures.items})
    members = {style: [i for i, item in enumerate(pictures.items) if item.style == style] for style in styles}
    found = []
    for number in range(count):
        style = styles[number % len(styles)]
        chosen: dict[str, int] = {}
        for place in torch.randperm(len(members[style]), generator=generator).tolist():
            index = members[style][place]
            chosen.setdefault(pictures.items[index].concept, index)
            if len(chosen) == panels:
                break
        rows = list(chosen.values())
        captions = tuple(pictures.items[row].label for row in rows)
        found.append(PanelSet(pictures.pixels(rows), captions, (style,) * panels))
    return found


def colour_sets(pictures: EmojiSet, count: int, panels: int = 2, seed: int = 0) -> list[PanelSet]:
    """Silhouettes of different concepts in one colour, which the summary names."""
    names = sorted(COLOURS)
    return [
        replace(
            one,
            panels=_painted(one.panels, COLOURS[names[number % len(names)]]),
            shared=(names[number % len(names)],) * panels,
            summary=f"all {names[number % len(names)]}",
        )
        for number, one in enumerate(style_sets(pictures, count, panels, seed))
    ]


def storyboards(clips: EmojiSet, panels: int = 3, count: int | None = None) -> list[PanelSet]:
    """Frames of animations at even times, as scenes of one story.

    Args:
        clips: images (N, F, S, S, 4), see `data.clips`.
        panels: frames of a set, at most F.
        count: of the sets; None = one for each clip.
    """
    frames = clips.images.shape[1]
    if clips.images.ndim != 5 or not 2 <= panels <= frames:
        raise UserError(f"got {panels} scenes from clips of shape {clips.images.shape[1:]}; choose 2 to {frames}")
    times = [panel * frames // panels for panel in range(panels)]
    return [
        PanelSet(
            on_white(torch.from_numpy(np.ascontiguousarray(clips.images[row, times]))),
            tuple(f"{item.label}, moment {panel + 1}" for panel in range(panels)),
            (item.key,) * panels,
            f"an animation of {item.label}",
        )
        for row, item in enumerate(clips.items[:count])
    ]


def mixed_up(sets: Sequence[PanelSet], seed: int = 0) -> list[PanelSet]:
    """The same panels and captions, but each panel but the first from another set: nothing is shared any more.

    Panels keep their place and their own captions, so only what a set has in common is lost.
    """
    if len(sets) < 2:
        raise UserError(f"got {len(sets)} set; at least 2 are needed to mix them up")
    generator = torch.Generator().manual_seed(derive_seed("mixed up", seed))
    count = len(sets)
    orders = [list(range(count))]
    orders += [torch.randperm(count, generator=generator).tolist() for _ in sets[0].captions[1:]]
    return [
        PanelSet(
            torch.stack([sets[order[row]].panels[panel] for panel, order in enumerate(orders)]),
            tuple(sets[order[row]].captions[panel] for panel, order in enumerate(orders)),
            tuple(sets[order[row]].shared[panel] for panel, order in enumerate(orders)),
        )
        for row in range(count)
    ]


def _painted(panels: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """What is darker or more colourful than the white ground, in one colour (P, 3, h, w)."""
    shape = (panels.amin(1, keepdim=True) < 0.9).to(panels.dtype)
    return shape * (torch.tensor(colour, dtype=panels.dtype)[:, None, None] / 127.5 - 1) + (1 - shape)
