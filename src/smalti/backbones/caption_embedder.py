"""A caption for cross-attention: its tokens through an MLP and one block of self-attention, and a vector of their mean.

The block lets the tokens of a frozen text encoder adapt to each other; its outputs start at zero, so that it starts as
the identity. Nothing on the way of the tokens has a bias: a caption of zeros stays zeros until the block's norms have
learned theirs.

Source: MicroDiT (arXiv 2407.15811), section 3.2 and its code.
"""

from typing import NamedTuple

from torch import Tensor, nn

from smalti.backbones.block import TransformerBlock
from smalti.nn.block_attention import BlockContext
from smalti.nn.embeddings import VectorEmbedder
from smalti.nn.swiglu import SwiGLU
from smalti.nn.wide_attention import WideSelfAttention


class Caption(NamedTuple):
    """An embedded caption: tokens (B, M, D), and the vector (B, D) of their mean."""

    tokens: Tensor
    vector: Tensor


class CaptionEmbedder(nn.Module):
    """Tokens of a text encoder to a `Caption`.

    Args:
        text_dim: channels of a token.
        width: D, a multiple of head_dim.
        head_dim: d.
        ffn_multiple: of the block's hidden width.
    """

    def __init__(self, text_dim: int, width: int, head_dim: int, ffn_multiple: int = 256):
        super().__init__()
        self.proj_in = nn.Linear(text_dim, width, bias=False)
        self.act = nn.GELU("tanh")
        self.proj_out = nn.Linear(width, width, bias=False)
        heads = width // head_dim
        self.block = TransformerBlock(
            width,
            heads,
            modulation="none",
            parts={
                "attn": lambda: WideSelfAttention(width, heads, head_dim),
                "ffn": lambda: SwiGLU(width, 4.0, ffn_multiple),
            },
        )
        self.pooled = VectorEmbedder(width, width)
        self.start_as_identity()

    def start_as_identity(self) -> None:
        """Sets the outputs of the block to zero."""
        for module in self.block.modules():
            if isinstance(module, WideSelfAttention | SwiGLU):
                last = module.to_out if isinstance(module, WideSelfAttention) else module.proj_out
                nn.init.zeros_(last.weight)

    def forward(self, text: Tensor, mask: Tensor | None = None, backend: str = "auto") -> Caption:
        """Embeds.

        Args:
            text: tokens (B, M, text_dim).
            mask: which of them are real (B, M), True = keep; the mean is taken over these.
            backend: of attention.
        """
        tokens = self.block(self.proj_out(self.act(self.proj_in(text))), BlockContext(mask=mask, backend=backend))
        if mask is None:
            return Caption(tokens, self.pooled(tokens.mean(1)))
        real = mask[..., None].to(tokens.dtype)
        return Caption(tokens, self.pooled((tokens * real).sum(1) / real.sum(1).clamp(min=1)))
