"""Training samples encoded when they are asked for: for pictures that change each time, or too many to keep.

Where the tokenizer has a posterior, each sample is drawn from it anew by its own generator, so an epoch never repeats
the latents of the one before. What is encoded once and kept instead is a `LatentSource`, which draws likewise from
means and deviations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.core.protocols import Batch, Cond
from smalti.core.seeds import rand
from smalti.training.autoencoder import Pictures


@dataclass(frozen=True)
class EncodedSource:
    """A `SampleSource` of the trainer.

    Args:
        pictures: of one size.
        tokenizer: `encode(pixels, generator=...) -> Latents`, such as `ConvAutoencoder`.
        labels: class of each sample (S,) long; None without.
        dropped_label: the label that stands for "none".
        label_dropout: how often a label is dropped, in [0, 1].
        is_drawn: whether latents are drawn from the posterior; otherwise they are its mean.
    """

    pictures: Pictures
    tokenizer: Any
    labels: Tensor | None = None
    dropped_label: int = 0
    label_dropout: float = 0.1
    is_drawn: bool = True

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """The samples `indices` (B,); one generator for each decides dropout, then the draw."""
        is_dropped = rand((len(indices),), generators) < self.label_dropout
        x0 = self.tokenizer.encode(
            self.pictures.pixels(indices.tolist()), generator=generators if self.is_drawn else None
        ).tensor
        label = None if self.labels is None else torch.where(is_dropped, self.dropped_label, self.labels[indices])
        return Batch(x0, Cond(label=label), indices)
