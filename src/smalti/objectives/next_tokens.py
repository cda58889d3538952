"""Next tokens: a target text is guessed token by token, given a source and the target up to there.

Teacher forcing: `-mean log p(target[n + 1] | source, target[: n + 1])` over the real tokens, against labels that are
smoothed by e: `(1 - e) * onehot + e / V`, which keeps a small model from growing too sure.

Source: arXiv 1706.03762, sections 3.1 and 5.4 (e = 0.1); arXiv 1512.00567, section 7.
"""

from dataclasses import dataclass

from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Denoiser, Generators, LossResult, TrainState


@dataclass(frozen=True)
class NextTokens:
    """The objective of a translator `(source, source_mask, target, target_mask) -> logits`.

    Args:
        label_smoothing: e, in [0, 1).
    """

    label_smoothing: float = 0.1

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; it must be from 0, below 1")

    def loss(self, denoiser: Denoiser, batch: Batch, state: TrainState, generator: Generators) -> LossResult:
        """Mean cross entropy over the real target tokens of the batch, in nats.

        Args:
            denoiser: called once, returns logits (B, N - 1, V).
            batch: x0 is the target (B, N) long from start to end token, cond.mask where it is real; cond.extra has
                source (B, M) and source_mask.
            state, generator: not used.
        """
        target, mask, extra = batch.x0, batch.cond.mask, batch.cond.extra
        assert mask is not None
        logits = denoiser(extra["source"], extra["source_mask"], target[:, :-1], mask[:, :-1])  # type: ignore[call-arg]
        real = mask[:, 1:]
        value = F.cross_entropy(logits[real], target[:, 1:][real], label_smoothing=self.label_smoothing)
        return LossResult(value)
