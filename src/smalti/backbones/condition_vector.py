"""The vector of a transformer that is conditioned by adaLN alone: time, and label and pooled condition if it takes any.

They are embedded apart and added (DiT, arXiv 2212.09748, section 3.2).
"""

from typing import NamedTuple

from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.nn.embeddings import FourierTimeEmbedder, LabelEmbedder, TimeEmbedder, VectorEmbedder
from smalti.nn.modulation import per_token


class Vectors(NamedTuple):
    """The time alone, and everything together; each (B, D), or (B, N, D) where times differ by token."""

    time: Tensor
    whole: Tensor


class ConditionVector(nn.Module):
    """Time and conditions -> `Vectors`.

    Args:
        width: D.
        num_labels: number of classes; 0 = no label is taken. Index `num_labels` means "none".
        pooled_dim: channels of the pooled condition; 0 = none is taken.
        is_fourier: time by random frequencies in place of fixed ones.
    """

    def __init__(self, width: int, num_labels: int = 0, pooled_dim: int = 0, is_fourier: bool = False):
        super().__init__()
        self.time_embedder = FourierTimeEmbedder(width) if is_fourier else TimeEmbedder(width, shift=1)
        self.label_embedder = LabelEmbedder(num_labels, width) if num_labels else None
        self.pooled_embedder = VectorEmbedder(pooled_dim, width) if pooled_dim else None

    def forward(self, t: Tensor, cond: Cond, tokens: int) -> Vectors:
        """Embeds a call's conditions.

        Args:
            t: times in [0, 1], (B,), or (B, N) for every token its own.
            cond: label (B,) and pooled (B, pooled_dim), each only if the model takes it; a label may be left out.
            tokens: N.

        Raises:
            UserError: the times or conditions do not fit.
        """
        if t.ndim not in (1, 2) or (t.ndim == 2 and t.shape[1] != tokens):
            raise UserError(f"got t {tuple(t.shape)}; it must be ({len(t)},) or ({len(t)}, {tokens}), one a token")
        if cond.label is not None and self.label_embedder is None:
            raise UserError("this model takes no cond.label, because its num_labels is 0; leave the label out")
        if (cond.pooled is None) == (self.pooled_embedder is not None):
            state = "needs" if cond.pooled is None else "takes no"
            raise UserError(f"this model {state} cond.pooled, as its pooled_dim says")
        time = self.time_embedder(t)
        parts = [] if self.label_embedder is None else [self.label_embedder(cond.label, len(t))]
        if self.pooled_embedder is not None and cond.pooled is not None:
            parts.append(self.pooled_embedder(cond.pooled.to(time.dtype)))
        whole = time
        for part in parts:
            whole = whole + (per_token(part) if time.ndim == 3 else part)
        return Vectors(time, whole)
