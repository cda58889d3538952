"""Transformers on text: an encoder, a decoder with cross-attention, and the two models made of them.

`MaskedLanguageModel` (BERT) guesses tokens that were masked from those on both sides; `Translator` encodes one text and
decodes another token by token. Their blocks are those of `block` with learned norms and no modulation, in any order;
a decoder's cross-attention stands behind its self-attention. A pre-norm stack ends with one more norm.

Source: arXiv 1706.03762, section 3 (encoder, decoder, sine positions, output tied to the embedding); BERT,
arXiv 1810.04805, section 3 (learned positions, masked tokens, a head of one layer, GELU and norm before the output);
rotary positions, arXiv 2104.09864.
Letters: V size of the vocabulary, M tokens of the source text.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.backbones.block import TransformerBlock
from smalti.backbones.block_order import Order, read_order, with_cross
from smalti.core.errors import UserError, unknown_name
from smalti.nn.block_attention import BlockContext
from smalti.nn.embeddings import sinusoidal
from smalti.nn.modulation import EPS
from smalti.nn.remember import remember
from smalti.nn.rope import rope_factors

POSITIONS = ("sine", "learned", "rotary")


@dataclass(frozen=True)
class TextShape:
    """The shape of a text model.

    Args:
        vocabulary: V.
        positions: sine or learned, added to the tokens, or rotary, in self-attention.
        length: most tokens of a text, for learned positions.
        width: D, a multiple of heads.
        depth: blocks of the encoder, and of the decoder if there is one.
        heads: h.
        ffn_ratio: hidden width of a block's feed-forward layers together, over D.
        order: of a block's sublayers, without cross-attention.
        norm: pre, post or sandwich, see `TransformerBlock`.
        dropout: share of embeddings and sublayer outputs dropped in training.
    """

    vocabulary: int
    positions: Literal["sine", "learned", "rotary"] = "sine"
    length: int = 512
    width: int = 128
    depth: int = 6
    heads: int = 4
    ffn_ratio: float = 4.0
    order: str | Order = "standard"
    norm: Literal["pre", "post", "sandwich"] = "pre"
    dropout: float = 0.0

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise UserError(f"width {self.width} must be a multiple of twice the heads, {2 * self.heads}")
        if self.positions not in POSITIONS:
            raise unknown_name("kind of positions", self.positions, POSITIONS)
        if any("cross" in sublayers for sublayers, _ in read_order(self.order)):
            raise UserError("leave cross out of the order: a decoder puts it behind self-attention by itself")


class TokenEmbedding(nn.Module):
    """Tokens (B, N) long -> (B, N, D), with positions.

    Args:
        shape: of the model.
    """

    def __init__(self, shape: TextShape):
        super().__init__()
        self.table = nn.Embedding(shape.vocabulary, shape.width)
        self.kind = shape.positions
        self.positions = nn.Embedding(shape.length, shape.width) if shape.positions == "learned" else None
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.table(tokens)
        if self.positions is not None:
            if tokens.shape[1] > self.positions.num_embeddings:
                raise UserError(
                    f"a text has {tokens.shape[1]} tokens, this model takes {self.positions.num_embeddings}"
                )
            x = x + self.positions(place)
        elif self.kind == "sine":  # sines are of size 1, drawn embeddings of size D ** -0.5
            x = x * x.shape[-1] ** 0.5 + sinusoidal(place, x.shape[-1], scale=1.0).to(x.dtype)
        return self.dropout(x)


class Stack(nn.Module):
    """Embedding and blocks: tokens (B, N) long -> (B, N, D); with cross-attention it is a decoder.

    Args:
        shape: of the model.
        is_decoder: whether blocks look at a memory, and at no later token.
    """

    def __init__(self, shape: TextShape, is_decoder: bool = False):
        super().__init__()
        self.is_decoder = is_decoder
        self.rotary_dim = shape.width // shape.heads if shape.positions == "rotary" else 0
        order = with_cross(shape.order) if is_decoder else shape.order
        self.embedding = TokenEmbedding(shape)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                shape.width, shape.heads, shape.ffn_ratio, order,
                norm=shape.norm, modulation="none", dropout=shape.dropout,
            )
            for _ in range(shape.depth)
        )  # fmt: skip
        self.final_norm = nn.Identity() if shape.norm == "post" else nn.LayerNorm(shape.width, eps=EPS)

    def forward(
        self, tokens: Tensor, mask: Tensor, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """Runs the blocks.

        Args:
            tokens: (B, N) long.
            mask: True where a token is real (B, N).
            memory: what a decoder looks at (B, M, D).
            memory_mask: where it is real (B, M).
        """
        keep = mask[:, None, None]  # (B, 1, 1, N)
        if self.is_decoder:
            length = tokens.shape[1]
            earlier = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
            keep = keep & earlier  # a text's first token is real, so no row is empty
        rope = text_rope(tokens.shape[1], self.rotary_dim, tokens.device) if self.rotary_dim else None
        context = BlockContext(rope=rope, mask=keep, memory=memory, memory_mask=memory_mask)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, context)
        return self.final_norm(x)


class MaskedLanguageModel(nn.Module):
    """BERT's encoder with its head: tokens (B, N) and their mask -> logits (B, N, V).

    Args:
        shape: of the model.

    Example:
        >>> model = MaskedLanguageModel(TextShape(20, width=8, depth=1, heads=2, order="macaron"))
        >>> model(torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.bool)).shape
        torch.Size([2, 9, 20])
    """

    def __init__(self, shape: TextShape):
        super().__init__()
        self.encoder = Stack(shape)
        self.head = nn.Sequential(nn.Linear(shape.width, shape.width), nn.GELU(), nn.LayerNorm(shape.width, eps=EPS))
        self.bias = nn.Parameter(torch.zeros(shape.vocabulary))
        draw_text_weights(self)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.head(self.encoder(tokens, mask))
        return F.linear(x, self.encoder.embedding.table.weight, self.bias)


class Translator(nn.Module):
    """Encoder and decoder with one embedding: a source and the target so far -> logits of the next target tokens.

    Args:
        shape: of encoder and decoder.
    """

    def __init__(self, shape: TextShape):
        super().__init__()
        self.encoder = Stack(shape)
        self.decoder = Stack(shape, is_decoder=True)
        self.decoder.embedding = self.encoder.embedding
        draw_text_weights(self)

    def forward(self, source: Tensor, source_mask: Tensor, target: Tensor, target_mask: Tensor) -> Tensor:
        """Teacher forcing.

        Args:
            source: (B, M) long.
            source_mask: True where it is real.
            target: (B, N) long, starting with the start token.
            target_mask: True where it is real.

        Returns:
            Logits (B, N, V): those at a place are for the next one.
        """
        memory = self.encoder(source, source_mask)
        x = self.decoder(target, target_mask, memory, source_mask)
        return F.linear(x, self.encoder.embedding.table.weight)

    @torch.no_grad()
    def translate(self, source: Tensor, source_mask: Tensor, start: int, end: int, limit: int) -> Tensor:
        """The likeliest next token again and again: (B, n) long, n <= limit; what follows an end token is `end`."""
        memory = self.encoder(source, source_mask)
        target = torch.full((len(source), 1), start, device=source.device)
        is_over = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        for _ in range(limit):
            x = self.decoder(target, torch.ones_like(target, dtype=torch.bool), memory, source_mask)
            best = F.linear(x[:, -1], self.encoder.embedding.table.weight).argmax(-1).masked_fill(is_over, end)
            target, is_over = torch.cat([target, best[:, None]], dim=1), is_over | (best == end)
            if is_over.all():
                break
        return target[:, 1:]


@remember
def text_rope(length: int, head_dim: int, device: torch.device) -> Tensor:
    """Rotary factors (N, d/2, 2) of tokens in a row."""
    return rope_factors(torch.arange(length, dtype=torch.float32, device=device)[:, None], (head_dim,))


def draw_text_weights(model: nn.Module) -> None:
    """Xavier weights and zero biases of linear layers, normal embeddings of deviation `D ** -0.5`.

    Widths here are small: BERT's deviation of 0.02 for everything would be far below Xavier's, and attention would
    take hundreds of steps to tell tokens apart.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
