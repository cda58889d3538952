"""A pre-norm transformer block without conditions, as encoders have it.

`x + attention(norm(x))`, then `x + ffn(norm(x))` (ViT, arXiv 2010.11929, eq. 2 and 3).
"""

from torch import Tensor, nn

from smalti.nn.block_attention import BlockContext, SelfAttention
from smalti.nn.ffn import FeedForward

NORM_EPS = 1e-6


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward, each of the normed tokens: (B, N, D) -> (B, N, D).

    Args:
        width: D = heads * head_dim.
        heads: h.
        ffn_ratio: hidden width of the feed-forward layer over D.
    """

    def __init__(self, width: int, heads: int, ffn_ratio: float = 4.0):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps=NORM_EPS), nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = SelfAttention(width, heads)
        self.ffn = FeedForward(width, ffn_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x), BlockContext())
        return x + self.ffn(self.norm_2(x))


def draw_linear_weights(model: nn.Module) -> None:
    """Draws the linear layers anew: Xavier weights, zero biases, as MAE does (arXiv 2111.06377, appendix A.1)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
