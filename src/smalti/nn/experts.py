"""Expert-choice feed-forward layer: every expert takes the tokens that it fits best, equally many each.

A router gives each token a share for each expert, `softmax(x Wr)`; every one of E experts takes the k tokens of a
sample with its largest shares, and what it makes of them returns to their places, times the share:

    k = capacity * N / E,   y_n = sum over experts e that took n of share_ne * W2_e gelu(W1_e x_n)

A token may be taken by many experts or by none. k follows from the tokens that are there: a masked sample in training
and a whole one in sampling have the same load a token. Tokens are gathered and scattered, so no table of N x k
choices is multiplied.

Source: Expert Choice (arXiv 2202.09368), section 3.2; as MicroDiT (arXiv 2407.15811), section 3.3, has it: 8 experts,
capacity 2, shares over experts. H hidden width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.errors import UserError


class ExpertChoice(nn.Module):
    """Feed-forward experts that choose their tokens: (B, N, D) -> (B, N, D).

    Args:
        width: D.
        hidden: H of one expert.
        experts: E.
        capacity: how many experts a token has on average.

    Raises:
        UserError: the capacity is not within (0, E].

    Example:
        >>> layer = ExpertChoice(8, hidden=16, experts=4)
        >>> layer(torch.zeros(2, 12, 8)).shape, layer.tokens_each(12)
        (torch.Size([2, 12, 8]), 6)
    """

    def __init__(self, width: int, hidden: int, experts: int = 8, capacity: float = 2.0):
        super().__init__()
        if not 0 < capacity <= experts:
            raise UserError(f"got a capacity of {capacity} for {experts} experts; choose one above 0, up to {experts}")
        self.capacity = capacity
        self.router = nn.Linear(width, experts, bias=False)
        self.weight_in = nn.Parameter(torch.empty(experts, width, hidden))
        self.weight_out = nn.Parameter(torch.empty(experts, hidden, width))
        for weights in (self.weight_in, self.weight_out):
            for one in weights:  # each by its own fans, not those of the stack
                nn.init.xavier_uniform_(one)

    def tokens_each(self, tokens: int) -> int:
        """k, how many of so many tokens each expert takes, at least 1."""
        return max(1, min(tokens, int(self.capacity * tokens / self.router.out_features)))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        shares = self.shares(x)
        chosen = shares.transpose(1, 2).topk(self.tokens_each(tokens), dim=-1)  # (B, E, k)
        first = torch.arange(batch, device=x.device)[:, None, None] * tokens
        rows = (first + chosen.indices).transpose(0, 1).flatten(1)  # (E, B*k) among B*N tokens
        taken = x.reshape(-1, width)[rows]  # (E, B*k, D)
        made = torch.bmm(F.gelu(torch.bmm(taken, self.weight_in.to(taken.dtype))), self.weight_out.to(taken.dtype))
        made = made * chosen.values.transpose(0, 1).flatten(1)[..., None].to(made.dtype)
        out = torch.zeros(batch * tokens, width, dtype=made.dtype, device=x.device)
        return out.index_add(0, rows.flatten(), made.flatten(0, 1)).unflatten(0, (batch, tokens))

    def shares(self, x: Tensor) -> Tensor:
        """The router's shares (B, N, E) in float32."""
        return self.router(x).float().softmax(-1)


def experts_plain(layer: ExpertChoice, x: Tensor) -> Tensor:
    """The formula, one sample and one expert at a time: what `ExpertChoice` is compared with."""
    out = torch.zeros_like(x)
    for sample, shares in enumerate(layer.shares(x)):
        for expert, column in enumerate(shares.T):
            rows = column.topk(layer.tokens_each(len(column))).indices
            made = F.gelu(x[sample, rows] @ layer.weight_in[expert]) @ layer.weight_out[expert]
            out[sample, rows] = out[sample, rows] + column[rows, None] * made
    return out
