"""Training samples drawn from cached latents and cached text embeddings.

What is random about a sample (which phrasing of its caption, whether caption or label is dropped for classifier-free
guidance, arXiv 2207.12598, which view of the picture) comes from its own generator, never from the batch.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TextEmbedding, TextEncoder
from smalti.core.seeds import rand, randn
from smalti.training.messages import is_main, say

CHUNK = 256


class LatentTable(Protocol):
    """Latents by index: a tensor (S, C, h, w), or a cache on disk; samples asked for together have one shape."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Captions:
    """Embeddings of all phrasings of all samples.

    Args:
        text: one row a phrasing; the last row is the empty prompt.
        rows: the first and the one-past-last row of each sample's phrasings, (S, 2) long.
    """

    text: TextEmbedding
    rows: Tensor


@dataclass(frozen=True)
class LatentSource:
    """Latents with their conditions; a `SampleSource` of the trainer.

    Args:
        views: latents of the same S samples, seen once or several times (shifted, for instance).
        captions: None for a model without text.
        labels: class or style of each sample (S,) long; None without.
        dropped_label: the label that stands for "none".
        groups: indices of the samples of each shape; None = all have one.
        text_dropout, label_dropout: how often a condition is dropped, in [0, 1].
        features: further tensors by name, one table a view: those of the view that was drawn come in `cond.extra`.
        deviations: of the autoencoder's posterior, one table a view like the latents; each time a sample is seen it is
            then drawn from its posterior anew. None: its mean.
    """

    views: Sequence[LatentTable]
    captions: Captions | None = None
    labels: Tensor | None = None
    dropped_label: int = 0
    groups: Sequence[Tensor] | None = None
    text_dropout: float = 0.1
    label_dropout: float = 0.1
    features: Mapping[str, Sequence[LatentTable]] = field(default_factory=dict)
    deviations: Sequence[LatentTable] | None = None

    def __len__(self) -> int:
        return len(self.views[0])

    def batch(self, indices: Tensor, generators: Sequence[torch.Generator]) -> Batch:
        """The samples `indices` (B,), all of one shape; one generator for each decides phrasing, dropout and view."""
        draw = rand((len(indices), 4), generators)  # phrasing, text dropped, label dropped, view
        view = (draw[:, 3] * len(self.views)).long()
        x0 = _rows(self.views, indices, view)
        if self.deviations is not None:
            x0 = x0 + _rows(self.deviations, indices, view) * randn(x0.shape, generators)
        extra = {name: _rows(tables, indices, view) for name, tables in self.features.items()}
        label = None
        if self.labels is not None:
            label = torch.where(draw[:, 2] < self.label_dropout, self.dropped_label, self.labels[indices])
        if self.captions is None:
            return Batch(x0, Cond(label=label, extra=extra), indices)
        first, last = self.captions.rows[indices].unbind(1)
        row = first + (draw[:, 0] * (last - first)).long()
        row = torch.where(draw[:, 1] < self.text_dropout, len(self.captions.text.tokens) - 1, row)
        text = self.captions.text[row].to(torch.float32)
        return Batch(x0, Cond(text.tokens, text.pooled, text.mask, label, extra=extra), indices)


def _rows(views: Sequence[LatentTable], indices: Tensor, view: Tensor) -> Tensor:
    """Rows (B, ...) of samples, each from its view (B,); one look-up a view."""
    rows = [(view == number).nonzero()[:, 0] for number in range(len(views))]
    parts = [table[indices[row]] for table, row in zip(views, rows, strict=True) if len(row)]
    return torch.cat(parts).float()[torch.cat(rows).argsort()]


def embed_captions(phrasings: Sequence[Sequence[str]], encoder: TextEncoder) -> Captions:
    """Embeds every different phrasing list once.

    Args:
        phrasings: at least one phrasing a sample; samples with equal lists share their rows.
        encoder: of text, best one that caches. How many captions it cuts is said in one line.

    Returns:
        The embeddings in float16 and each sample's rows.

    Raises:
        UserError: the encoder keeps embeddings on disk, and it is full.
    """
    place: dict[tuple[str, ...], tuple[int, int]] = {}
    texts: list[str] = []
    for one in phrasings:
        if tuple(one) not in place:
            place[tuple(one)] = (len(texts), len(texts) + len(one))
            texts += one
    texts.append("")
    starts = range(0, len(texts), CHUNK)
    bar = tqdm(starts, desc="embedding captions", disable=len(starts) < 3 or not is_main())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            parts = [encoder.encode(texts[start : start + CHUNK]).to(torch.float16) for start in bar]
        except SafetensorError as error:
            raise UserError(f"cannot write the embeddings of the captions: {error}; free some space") from error
    _report(caught, len(texts) - 1)
    return Captions(TextEmbedding.cat(parts), torch.tensor([place[tuple(one)] for one in phrasings]))


def _report(caught: Sequence[warnings.WarningMessage], captions: int) -> None:
    """One line for all captions that were cut; any other warning as it came."""
    cut = [one for one in caught if "words were cut" in str(one.message)]
    for one in caught:
        if one not in cut:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if cut:
        say(f"the last words of {len(cut)} of {captions} captions were cut: these are longer than text_length")
