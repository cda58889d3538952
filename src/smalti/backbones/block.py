"""Transformer blocks from an order of sublayers (see `block_order`): one for a sequence, one for text and image.

Every entry of an order adds its sublayer's output to the tokens, with a norm, shift, scale and gate of its own:

    x <- x + factor * gate * F(norm(x) * (1 + scale) + shift)

`DiT` has the standard order with adaLN; encoders of text have learned norms and no gate. Any order, norm placement and
sublayer goes through the same few lines.

Cross-attention may be bare, `x <- x + factor * F(x)`, as in PixArt-alpha's blocks.

Source: gates that start at zero, arXiv 2212.09748, section 3.2; the norm after the sum ("post"), arXiv 1706.03762,
section 3.1, or before the sublayer and once more before the sum ("sandwich"), CogView, arXiv 2105.13290; streams with
their own weights, arXiv 2403.03206, figure 2; bare cross-attention, arXiv 2310.00426, figure 4.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from smalti.backbones.block_order import Entry, Order, count_ffn, entries_of, kind_of, names_of, read_order
from smalti.core.errors import UserError, unknown_name
from smalti.nn.block_attention import BlockContext, CrossAttention, SelfAttention
from smalti.nn.ffn import FeedForward
from smalti.nn.joint_blocks import StreamAttention, StreamProjections, Streams
from smalti.nn.modulation import EPS, Modulation, ModulationTable, Triple, gated_add, modulate, modulated_norm
from smalti.nn.norm import RMSNorm

Parts = Mapping[str, Callable[[], nn.Module]]
"""Makers of sublayers by name ("ffn_a") or kind ("ffn"); an ffn is called with tokens, others with the context too."""
NORMS = ("pre", "post", "sandwich")
NORM_KINDS = ("layer", "rms")
MODULATIONS = ("own", "shared", "none")


class TransformerBlock(nn.Module):
    """A block on one sequence: (B, N, D) -> (B, N, D).

    Args:
        width: D = heads * head_dim.
        heads: h.
        ffn_ratio: hidden width of all feed-forward layers together, over D.
        order: a name of `ORDERS`, or a list of (sublayer, factor).
        norm: pre (before a sublayer), post (after its sum), sandwich (before it, and once more before the sum).
        modulation: of shift, scale and gate: own linear layer; shared, a table added to what one layer gives to all
            blocks; none, learned norms and no gate.
        ffn_norm_eps: epsilon of the norm before a feed-forward layer.
        dropout: share of a sublayer's output that is dropped in training, in [0, 1).
        bare_cross: cross-attention has neither norm nor shift, scale and gate.
        norm_kind: layer, or rms, an RMS norm that keeps learned weights under a modulation too.
        has_shift: False: an own modulation scales and gates, but does not shift.
        parts: other sublayers than self-attention, cross-attention and `FeedForward`.

    Example:
        >>> block = TransformerBlock(8, heads=2, order="macaron", modulation="none")
        >>> block(torch.zeros(1, 5, 8), BlockContext()).shape
        torch.Size([1, 5, 8])
        >>> [name for name, _ in block.named_children()]
        ['ffn_a', 'attn', 'ffn_b', 'norms']
    """

    def __init__(
        self,
        width: int,
        heads: int,
        ffn_ratio: float = 4.0,
        order: str | Order = "standard",
        *,
        norm: Literal["pre", "post", "sandwich"] = "pre",
        modulation: Literal["own", "shared", "none"] = "own",
        ffn_norm_eps: float = EPS,
        dropout: float = 0.0,
        bare_cross: bool = False,
        norm_kind: Literal["layer", "rms"] = "layer",
        has_shift: bool = True,
        parts: Parts | None = None,
    ):
        super().__init__()
        if norm_kind not in NORM_KINDS:
            raise unknown_name("kind of norm", norm_kind, NORM_KINDS)
        if norm not in NORMS:
            raise unknown_name("norm placement", norm, NORMS)
        if modulation not in MODULATIONS:
            raise unknown_name("modulation", modulation, MODULATIONS)
        if norm == "post" and modulation != "none":
            raise UserError(
                "a norm after the sum leaves no place for shift and scale; use norm pre, or modulation none"
            )
        self.norm, self.norm_kind, self.ffn_norm_eps, self.bare_cross = norm, norm_kind, ffn_norm_eps, bare_cross
        self.set_order(order)
        count = sum(place is not None for place in self.places)
        self.modulation = None
        if modulation != "none":
            self.modulation = (
                Modulation(width, count, has_shift) if modulation == "own" else ModulationTable(width, count)
            )
        makers: Parts = {
            "attn": lambda: SelfAttention(width, heads),
            "cross": lambda: CrossAttention(width, heads),
            "ffn": lambda: FeedForward(width, ffn_ratio / count_ffn(self.order)),
            **(parts or {}),
        }
        for name in names_of(self.order):
            self.add_module(name, (makers[name] if name in makers else makers[kind_of(name)])())
        if modulation == "none" or norm_kind == "rms":
            kind = RMSNorm if norm_kind == "rms" else nn.LayerNorm
            self.norms = nn.ModuleList(kind(width, eps=EPS) for _ in range(count))
        if norm == "sandwich":
            learned = modulation == "none"
            self.out_norms = nn.ModuleList(nn.LayerNorm(width, EPS, elementwise_affine=learned) for _ in range(count))
        self.dropout = nn.Dropout(dropout) if dropout else None

    def set_order(self, order: str | Order) -> None:
        """In which order the sublayers, by their names, are to run; modules are not changed."""
        self.order = read_order(order)
        self.entries = entries_of(self.order)
        self.places = normed_places(self.entries, self.bare_cross)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Tokens (B, N, D) to the same shape."""
        if self.modulation is None:
            triples: Sequence[Triple | None] = [None] * len(self.entries)
        else:
            assert context.activated is not None
            triples = self.modulation(context.activated)
        for entry, place in zip(self.entries, self.places):
            normed = x if place is None else self._before(x, entry, place, triples[place])
            update = _sum([self._part(name, normed, context) for name in entry.names])
            if place is None:
                x = torch.add(x, update, alpha=entry.factor)
            else:
                x = self._after(x, update, entry, place, triples[place])
        return x

    def _part(self, name: str, x: Tensor, context: BlockContext) -> Tensor:
        part = getattr(self, name)
        return part(x) if kind_of(name) == "ffn" else part(x, context)

    def _before(self, x: Tensor, entry: Entry, place: int, triple: Triple | None) -> Tensor:
        if triple is not None and self.norm_kind == "rms":
            return modulate(self.norms[place](x), triple.shift, triple.scale)
        if triple is not None:
            return modulated_norm(x, triple.shift, triple.scale, norm_eps(entry, self.ffn_norm_eps))
        return x if self.norm == "post" else self.norms[place](x)

    def _after(self, x: Tensor, update: Tensor, entry: Entry, place: int, triple: Triple | None) -> Tensor:
        if self.norm == "sandwich":
            update = self.out_norms[place](update)
        if self.dropout is not None:
            update = self.dropout(update)
        if triple is not None:
            return gated_add(x, triple.gate, update, entry.factor)
        x = torch.add(x, update, alpha=entry.factor)
        return self.norms[place](x) if self.norm == "post" else x


class JointBlock(nn.Module):
    """A block on text and image with weights of their own and joint attention; "standard" is FLUX.1's double block.

    Args:
        width: D = heads * head_dim.
        heads: h.
        ffn_ratio: hidden width of all feed-forward layers of a stream together, over D.
        order: a name of `ORDERS`, or a list of (sublayer, factor), the same for both streams.

    Raises:
        UserError: the order holds cross-attention: the streams meet in their joint attention.
    """

    def __init__(self, width: int, heads: int, ffn_ratio: float = 4.0, order: str | Order = "standard"):
        super().__init__()
        self.heads = heads
        self.set_order(order)
        names = names_of(self.order)
        if any(kind_of(name) == "cross" for name in names):
            raise UserError("a joint block has no cross-attention: text and image meet in attn; leave cross out")
        self.modulation = Modulation(width, len(self.entries))
        self.modulation_text = Modulation(width, len(self.entries))
        for name in names:
            if kind_of(name) == "ffn":
                for stream in ("", "_text"):
                    self.add_module(name + stream, FeedForward(width, ffn_ratio / count_ffn(self.order)))
            else:
                self.add_module(name, StreamAttention(width, width // heads))
                self.add_module(f"{name}_text", StreamProjections(width, width // heads))

    def set_order(self, order: str | Order) -> None:
        """In which order the sublayers, by their names, are to run; modules are not changed."""
        self.order = read_order(order)
        self.entries = entries_of(self.order)

    def forward(self, text: Tensor, image: Tensor, context: BlockContext) -> Streams:
        """Text (B, M, D) and image (B, N, D) to the same shapes."""
        assert context.activated is not None
        rows = zip(self.entries, self.modulation_text(context.activated), self.modulation(context.activated))
        for entry, of_text, of_image in rows:
            normed_text = modulated_norm(text, of_text.shift, of_text.scale)
            normed_image = modulated_norm(image, of_image.shift, of_image.scale)
            updates = [self._part(name, normed_text, normed_image, context) for name in entry.names]
            text = gated_add(text, of_text.gate, _sum([one.text for one in updates]), entry.factor)
            image = gated_add(image, of_image.gate, _sum([one.image for one in updates]), entry.factor)
        return Streams(text, image)

    def _part(self, name: str, text: Tensor, image: Tensor, context: BlockContext) -> Streams:
        part, part_text = getattr(self, name), getattr(self, f"{name}_text")
        if kind_of(name) == "ffn":
            return Streams(part_text(text), part(image))
        image_out, text_out = part(image, self.heads, context, text=text, of_text=part_text)
        return Streams(text_out, image_out)


def normed_places(entries: Sequence[Entry], bare_cross: bool) -> tuple[int | None, ...]:
    """For each entry which norm (and triple) is its own, counted from 0; None = none, as bare cross-attention has."""
    places: list[int | None] = []
    for entry in entries:
        is_bare = bare_cross and all(kind_of(name) == "cross" for name in entry.names)
        places.append(None if is_bare else sum(place is not None for place in places))
    return tuple(places)


def norm_eps(entry: Entry, ffn_norm_eps: float) -> float:
    """Epsilon of an entry's norm: a setting where it serves feed-forward layers alone."""
    return ffn_norm_eps if all(kind_of(name) == "ffn" for name in entry.names) else EPS


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
