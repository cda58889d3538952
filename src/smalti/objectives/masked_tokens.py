"""Masked tokens: a share of a text is hidden and guessed from what is left on both sides.

Of every text the given share of its real tokens is chosen; of these 80 % become the mask token, 10 % a random one and
10 % stay, so that the model cannot rely on seeing masks alone. The loss is the cross entropy at the chosen places:
`-sum_chosen log p(token | hidden text)`, optionally against labels smoothed by e: `(1 - e) * onehot + e / V`.

Source: BERT (arXiv 1810.04805), section 3.1; label smoothing, arXiv 1512.00567, section 7.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Denoiser, Generators, LossResult, TrainState
from smalti.core.seeds import rand

AS_MASK, AS_RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class MaskedTokens:
    """The masked-token objective of a model `(tokens, mask) -> logits`.

    Args:
        mask_token: that hides a token.
        ordinary: first and one-past-last token that may stand in for another.
        share: of the real tokens that are guessed, in (0, 1].
        label_smoothing: e, in [0, 1).
    """

    mask_token: int
    ordinary: tuple[int, int]
    share: float = 0.15
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise UserError(f"share is {self.share}; give what part of a text is guessed, above 0 and at most 1")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; it must be from 0, below 1")

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """Mean cross entropy over all chosen places of the batch, in nats.

        Args:
            denoiser: called once as `denoiser(tokens, mask)`, returns logits (B, N, V).
            batch: x0 holds the tokens (B, N) long, cond.mask is True where they are real.
            state: not used.
            generator: decides what is hidden.
        """
        assert batch.cond.mask is not None
        hidden, chosen = self.hide(batch.x0, batch.cond.mask, generator)
        logits = denoiser(hidden, batch.cond.mask)  # type: ignore[call-arg]  # a predictor: no time
        value = F.cross_entropy(logits[chosen], batch.x0[chosen], label_smoothing=self.label_smoothing)
        return LossResult(value)

    def hide(self, tokens: Tensor, mask: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        """The text to guess from (B, N), and where to guess (B, N) bool: at least one place in every text."""
        draws = rand((*tokens.shape, 3), generator, tokens.device)  # which places, what happens there, which token
        score = draws[..., 0].masked_fill(~mask, 2.0)
        count = (self.share * mask.sum(1)).round().clamp(min=1)
        chosen = score.argsort(1).argsort(1) < count[:, None]  # the places of the lowest scores
        first, last = self.ordinary
        other = first + (draws[..., 2] * (last - first)).long()
        replaced = torch.where(draws[..., 1] < AS_MASK, self.mask_token, tokens)
        replaced = torch.where(draws[..., 1] >= 1 - AS_RANDOM, other, replaced)
        return torch.where(chosen, replaced, tokens), chosen
