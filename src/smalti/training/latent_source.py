"""Training samples drawn from cached latents and cached text embeddings.

What is random about a sample (which phrasing of its caption, whether the caption or the label is dropped for
classifier-free guidance, arXiv 2207.12598) comes from its own generator, never from the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.core.protocols import Batch, Cond, TextEmbedding
from smalti.core.seeds import rand


@dataclass(frozen=True)
class LatentSource:
    """Latents with their conditions; a `SampleSource` of the trainer.

    Args:
        latents: one tensor (S, C, H, W) of samples, or several of different shapes, one after the other.
        text: embeddings of all phrasings, one row each; None for a model without text. The last row is the
            empty prompt.
        phrasings: for each sample the first and the one-past-last row of its phrasings in `text`, (S, 2).
        labels: class or style of each sample (S,); None without.
        dropped_label: the label that stands for "none".
        text_dropout, label_dropout: how often a condition is dropped, in [0, 1].
        variants: latents of the same samples seen differently (shifted, for instance), like `latents`.
    """

    latents: Sequence[Tensor]
    text: TextEmbedding | None = None
    phrasings: Tensor | None = None
    labels: Tensor | None = None
    dropped_label: int = 0
    text_dropout: float = 0.1
    label_dropout: float = 0.1
    variants: Sequence[Sequence[Tensor]] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.latents)

    @property
    def groups(self) -> list[Tensor]:
        """Indices of the samples of each shape; a batch never mixes them."""
        groups, start = [], 0
        for part in self.latents:
            groups.append(torch.arange(start, start + len(part)))
            start += len(part)
        return groups

    def batch(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """The samples `indices` (B,), all of one shape; one generator for each decides phrasing and dropout."""
        draw = rand((len(indices), 4), generators)  # phrasing, text kept, label kept, variant
        text = label = None
        if self.text is not None and self.phrasings is not None:
            first, last = self.phrasings[indices].unbind(1)
            row = first + (draw[:, 0] * (last - first)).long()
            row = torch.where(draw[:, 1] < self.text_dropout, len(self.text.tokens) - 1, row)
            text = self.text[row].to(torch.float32)
        if self.labels is not None:
            label = torch.where(draw[:, 2] < self.label_dropout, self.dropped_label, self.labels[indices])
        views = [self.latents, *self.variants]
        choice = (draw[:, 3] * len(views)).long().tolist()
        x0 = torch.stack([_row(views[view], int(i)) for view, i in zip(choice, indices, strict=True)]).float()
        cond = Cond(label=label) if text is None else Cond(text.tokens, text.pooled, text.mask, label)
        return Batch(x0, cond, indices)


def _row(parts: Sequence[Tensor], index: int) -> Tensor:
    for part in parts:
        if index < len(part):
            return part[index]
        index -= len(part)
    raise IndexError(index)
