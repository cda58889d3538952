"""Pictures learn from their captions: the picture's vector is pulled to the sentence vector of what it shows.

The mean of the patch tokens is projected to the space of a frozen sentence encoder. For a batch of B pictures with unit
vectors u and captions with unit vectors s, `logits = scale * u s^T`; the loss is the cross-entropy of both softmaxes,
over captions for each picture and over pictures for each caption. Pictures of one concept share all their captions:
the target is spread evenly over them, so that they are never negatives of each other.

Because the projection is linear and follows the mean, every patch token lies in the space of sentences by itself. Some
patches are left out in training, which makes a step cheaper and asks each part of a picture for the whole; the last
steps see all of them.

Source: CLIP (arXiv 2103.00020), section 2.3 and figure 3, for the loss and its learned temperature; several positives
as in arXiv 2004.11362, eq. 2; dropped patches and unmasked tuning, FLIP (arXiv 2212.00794), section 3.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.protocols import Batch, Generators, LossResult, TensorBundle, TrainState
from smalti.core.seeds import rand

LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class PictureVectors(TensorBundle):
    """Vectors (B, T) of pictures in the space of sentences, not normalised, and the scale () of their logits."""

    vectors: Tensor
    scale: Tensor


class CaptionContrastModel(nn.Module):
    """An encoder with what only its training needs: the projection and the temperature.

    Args:
        encoder: has `embed(pixels) -> (B, N, D)` and `encode(tokens) -> (B, n, D)`.
        width: D.
        text_width: T, width of the sentence vectors.
        scale: first factor on the logits, the inverse temperature.
    """

    def __init__(self, encoder: nn.Module, width: int, text_width: int, scale: float = 1 / 0.07):
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(width, text_width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> PictureVectors:
        """Vectors of pixels (B, 3, H, W); in training, of the patches `kept` (B, n) alone."""
        tokens = self.encoder.embed(pixels)  # type: ignore[operator]
        if kept is not None and self.training:
            tokens = take_tokens(tokens, kept)
        vectors = self.projection(self.encoder.encode(tokens).mean(1))  # type: ignore[operator]
        return PictureVectors(vectors, self.log_scale.exp().clamp(max=LARGEST_SCALE))


@dataclass(frozen=True)
class CaptionContrast:
    """Objective of a `CaptionContrastModel`; the batch has pixels as x0, sentence vectors as `cond.pooled` (B, T) and
    concepts as `cond.label` (B,).

    Args:
        patches: N of a picture.
        keep: share of them that a training step sees, in (0, 1].
        whole_from: the step from which it sees all.
    """

    patches: int
    keep: float = 0.5
    whole_from: int = 0

    def loss(self, denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """`denoiser` is the model: `(pixels, kept) -> PictureVectors`."""
        assert batch.cond.pooled is not None
        assert batch.cond.label is not None
        kept = None
        if state.step < self.whole_from:
            count = max(1, round(self.keep * self.patches))
            kept = rand((len(batch.x0), self.patches), generator, batch.x0.device).argsort(1)[:, :count]
        out = denoiser(batch.x0, kept)
        loss, right = contrast(out.vectors, batch.cond.pooled, batch.cond.label, out.scale)
        return LossResult(loss, {"right": right, "scale": out.scale.detach()})


def contrast(vectors: Tensor, text: Tensor, concepts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric loss, and the share of pictures whose best caption is of their concept.

    Args:
        vectors: of pictures (B, T).
        text: sentence vectors (B, T).
        concepts: (B,) long; equal ones are each other's positives.
        scale: factor on the cosines.
    """
    logits = scale * F.normalize(vectors, dim=-1) @ F.normalize(text, dim=-1).mT  # (B, B)
    same = concepts[:, None] == concepts
    target = same / same.sum(1, keepdim=True)  # a symmetric relation, so one target serves both sides
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2
    right = same.gather(1, logits.argmax(1, keepdim=True)).float().mean()
    return loss, right.detach()


def take_tokens(tokens: Tensor, chosen: Tensor) -> Tensor:
    """The tokens (B, n, D) at indices `chosen` (B, n) of tokens (B, N, D)."""
    return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
