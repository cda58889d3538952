"""One model call that runs some image tokens, or that runs all and keeps what such calls will need.

Before the first block the rows of the active tokens are taken out of the stream that holds the image; text stays whole.
As long as the model hands a block's output to the next block as it is, the stream stays short; where it does anything
else with it, and after the last block, the rows go back among the others, which passed by unchanged. A block's further
arguments are cut along their token axis: the one axis, not the last, that is as long as a sequence with these tokens.
Where samples have sets of their own and an argument is shared by all of them, the samples run in turn. Every attention
that sees image keys sees those of all tokens: rows that run are written into what it kept.

Nothing here is taken on trust: in a call that fills the memory, the first block of each kind runs once more on half of
its tokens and must give what it gave.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smalti.core.errors import Refusal
from smalti.core.method import Site
from smalti.core.protocols import TokenLayout
from smalti.core.tokens import KeyValues, TokenMemory
from smalti.ops.token_subset import gather, scatter, whole_index, write_rows
from smalti.seams.anatomy import Block, Sublayer
from smalti.seams.block_rows import BlockRows, joined, refusing, visit
from smalti.seams.frame import Attention, Forward
from smalti.seams.image_tokens import ImageTokens
from smalti.seams.layout import Layouts, core_name

CLOSE = 0.02
"""How far a block may be from its own result, in units of what it adds to its stream, and of one rounding of that."""


@dataclass
class Turn:
    """What runs at once.

    Args:
        active: places among the image tokens, (n,) or (B, n), ascending.
        samples: which samples; None = all.
        known: places in sequences, by the place of the first image token and the length.
    """

    active: Tensor
    samples: Tensor | None = None
    known: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def index(self, start: int, count: int, length: int) -> Tensor:
        """The places that run in a sequence of this length."""
        key = (start, count, length)
        if key not in self.known:
            self.known[key] = whole_index(self.active, start, count, length)
        return self.known[key]

    def split(self) -> list["Turn"]:
        """A turn for every set; samples with the same one run together."""
        sets, which = self.active.unique(dim=0, return_inverse=True)
        return [Turn(one, (which == number).nonzero()[:, 0]) for number, one in enumerate(sets)]


class TokenRows:
    """Answers for blocks and attention in such a call.

    Args:
        model: class name.
        layouts: of the tokens.
        tokens: the image tokens.
        active: (n,), (B, n), or None for a call that runs all tokens and fills the memory.
        memory: of the method.
    """

    def __init__(self, model: str, layouts: Layouts, tokens: ImageTokens, active: Tensor | None, memory: TokenMemory):
        self.model, self.layouts, self.tokens, self.memory = model, layouts, tokens, memory
        if active is not None and active.ndim == 2 and bool((active == active[:1]).all()):
            active = active[0]
        self.turn = None if active is None else Turn(active)
        self.turns: list[Turn] = []  # one for each set, where they cannot run at once
        self.attends_to_all = active is None or memory.keeps_keys
        self.calls = -1  # of blocks with image tokens
        self.cores: Counter[Site] = Counter()
        self.last: Tensor | None = None  # what the last block gave
        self.base: Tensor | None = None  # the whole stream, from where it was cut
        if active is None:
            memory.kept.clear()
            memory.handed_on.clear()

    def at_block(self, block: Block, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """Called in place of a block."""
        known = self.layouts.streams[block.site.stack]
        if block.site.stack not in self.tokens.starts:
            return forward(*args, **kwargs)
        arguments: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        name, kind = next(pair for pair in known.inputs.items() if pair[1] in ("image", "joint"))
        call = BlockRows(block, forward, arguments, len(args), name, known.outputs.index(kind))
        self.calls += 1
        stream = call.stream
        if self.turn is None:
            return self._fill(call)
        if stream is not self.last:
            index = self._index(self.turn, stream.shape[1], block.site)
            self.base, call = stream, call.given({name: gather(stream, index)})
        assert self.base is not None
        outputs = self._run(call)
        self.last = short = call.image_of(outputs)
        if self.calls in self.memory.handed_on:
            return outputs
        index = self._index(self.turn, self.base.shape[1], block.site)
        return call.with_image(outputs, scatter(short, index, self.base.to(short.dtype)))

    def at_core(self, sublayer: Sublayer, attention: Attention) -> Tensor:
        """Called in place of the attention function inside an attention module."""
        site, q, k, v = sublayer.site, attention.q, attention.k, attention.v
        name = f"{site}#{self.cores[site]}"
        key = (site.stack, core_name(site.name, self.cores[site]))
        self.cores[site] += 1
        if site.stack not in self.tokens.starts:
            return attention.attend(q, k, v, attention.mask)
        queries, keys = self.layouts.queries.get(key), self.layouts.keys.get(key)
        if queries is None or keys is None:
            raise Refusal(f"{site} of {self.model} calls attention more often than when its tokens were read")
        sees_image = any(one.kind == "image" for one in keys.segments)
        if self.turn is None:
            if sees_image:
                self.memory.kept[name] = KeyValues(k.contiguous().clone(), v.contiguous().clone(), attention.mask)
            return attention.attend(q, k, v, attention.mask)
        kept = self.memory.kept[name] if sees_image and self.attends_to_all else None
        mask = self._mask(attention, kept, self._places(self.turn, queries), self._places(self.turn, keys))
        if kept is not None:
            k, v = self._renewed(kept, k, v, self.turn, self._places(self.turn, keys))
        return attention.attend(q, k, v, mask)

    def _renewed(
        self, kept: KeyValues, k: Tensor, v: Tensor, turn: Turn, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The kept keys and values with the rows of what runs."""
        assert index is not None
        write_rows(kept.k, k, index, samples=turn.samples)
        write_rows(kept.v, v, index, samples=turn.samples)
        return _samples(kept.k, turn), _samples(kept.v, turn)

    def _mask(
        self, attention: Attention, kept: KeyValues | None, queries: Tensor | None, keys: Tensor | None
    ) -> Tensor | None:
        """The model's mask for the queries that run and the keys that they see.

        Args:
            attention: as it was called.
            kept: keys of all tokens, if those are seen.
            queries: places of what runs among the queries, None if all do.
            keys: the same among the keys.
        """
        mask, turn = attention.mask, self.turn
        if mask is None or turn is None:
            return mask
        if kept is None and keys is not None and mask.shape[-1] not in (1, keys.shape[-1]):
            mask = gather(mask, keys, mask.ndim - 1)
        elif kept is not None and mask.shape[-1] not in (1, kept.k.shape[-2]):
            mask = kept.mask  # the model made one of the tokens that run: what it said of all of them holds
            mask = None if mask is None else _samples(mask, turn) if len(mask) > 1 else mask
        if mask is not None and queries is not None and mask.shape[-2] not in (1, queries.shape[-1]):
            mask = gather(mask, queries, mask.ndim - 2)
        return mask

    def finish(self) -> None:
        """After the call: keys that attention shall not see later are dropped."""
        if not self.memory.keeps_keys:
            self.memory.kept.clear()

    def _fill(self, call: BlockRows) -> Any:
        """Runs a block on all tokens, and sees to it that it could run on some."""
        stream, before = call.stream, Counter(self.cores)
        if len(stream) != self.tokens.batch:
            raise Refusal(
                f"{call.block.site} of {self.model} has {len(stream)} rows for {self.tokens.batch} samples; sets of "
                "tokens need all tokens of a sample in one row"
            )
        for one in call.block.attentions:
            if (call.block.site.stack, one.site.name) not in self.layouts.queries:
                raise Refusal(
                    f"{one.site} of {self.model} calls no scaled_dot_product_attention (it is linear, or written out), "
                    "so there are no keys to keep of tokens that do not run"
                )
        output = call.run(call.arguments)
        if stream is self.last:
            self.memory.handed_on.add(self.calls - 1)
        self.last = call.image_of(output)
        kind = (call.block.site.stack, *map(type, call.block.module.modules()))
        if kind not in self.layouts.proven:
            after, self.cores = self.cores, before
            self._prove(call, output)
            self.cores = after
            self.layouts.proven.add(kind)
        return output

    def _prove(self, call: BlockRows, output: Any) -> None:
        """Runs a block on half of its tokens, with the keys of all, and compares."""
        tokens, stream, generator = self.tokens, call.stream, torch.Generator().manual_seed(0)
        orders = torch.stack([torch.randperm(tokens.count, generator=generator) for _ in range(tokens.batch)])
        active = orders[:, : max(1, tokens.count // 2)].sort().values.to(stream.device)
        self.turn = Turn(active if tokens.batch > 1 else active[0])
        try:
            index = self._index(self.turn, stream.shape[1], call.block.site)
            with refusing(f"{call.block.site} of {self.model}"):
                found = call.image_of(self._run(call.given({call.name: gather(stream, index)})))
        finally:
            self.turn, self.turns = None, []
        expected, given = gather(call.image_of(output), index).float(), gather(stream, index).float()
        error, eps = (found.float() - expected).norm(), torch.finfo(stream.dtype).eps
        if not error <= CLOSE * (expected - given).norm() + eps * expected.norm():
            raise Refusal(
                f"{call.block.site} of {self.model} gives a token another result when only some tokens run; it mixes "
                "them outside of attention, or has arguments that cannot be cut"
            )

    def _run(self, call: BlockRows) -> Any:
        """A block on the active rows of its stream: all samples at once, or in turn."""
        known, turn = self.layouts.streams[call.block.site.stack], self.turn
        assert turn is not None
        whole = {*known.inputs, *known.memory}
        others: list[Any] = [call.arguments.get(name) for name in whole - {call.name}]
        text = [one.shape[1] for one in others if isinstance(one, Tensor) and one.ndim == 3]
        axes: dict[int, int | None] = {}

        def find(leaf: Tensor) -> None:
            axes[id(leaf)] = self._token_axis(leaf, text, call.block.site)

        visit({name: one for name, one in call.arguments.items() if name not in whole}, find)
        if turn.active.ndim == 1 or 0 not in axes.values():
            return call.run(self._cut(call, axes, turn))
        self.turns = self.turns or turn.split()
        before, outputs = Counter(self.cores), []
        try:
            for one in self.turns:
                self.turn, self.cores = one, Counter(before)
                outputs.append(call.run(self._cut(call, axes, one)))
        finally:
            self.turn = turn
        return joined(outputs, torch.cat([one.samples for one in self.turns if one.samples is not None]).argsort())

    def _cut(self, call: BlockRows, axes: Mapping[int, int | None], turn: Turn) -> dict[int | str, Any]:
        """The arguments of a block for one turn; streams are cut already."""

        def cut(leaf: Tensor) -> Tensor:
            axis = axes.get(id(leaf))
            length = 0 if axis is None else leaf.shape[axis]
            if turn.samples is not None and axis != 0 and leaf.ndim and len(leaf) == self.tokens.batch:
                leaf = leaf.index_select(0, turn.samples)
            return leaf if axis is None else gather(leaf, self._index(turn, length, call.block.site), axis)

        return visit(call.arguments, cut)

    def _token_axis(self, leaf: Tensor, text: list[int], site: Site) -> int | None:
        """The axis of an argument that is as long as a sequence with image tokens, None if there is none."""
        lengths, batch = self.tokens.starts[site.stack], self.tokens.batch
        found = [axis for axis, size in enumerate(leaf.shape[:-1]) if size in lengths]
        if len(found) > 1 and found[0] == 0 and len(leaf) == batch:
            found = found[1:]
        if len(found) > 1 or (found and (leaf.shape[found[0]] in text or (found == [0] and len(leaf) == batch))):
            raise Refusal(
                f"{site} of {self.model} got an argument {tuple(leaf.shape)}: with {batch} samples, sequences of "
                f"{', '.join(map(str, lengths))} tokens and text of {text} it cannot be told which axis holds tokens; "
                "another batch size or length of the text helps"
            )
        return found[0] if found else None

    def _index(self, turn: Turn, length: int, site: Site) -> Tensor:
        starts = self.tokens.starts[site.stack]
        if length not in starts:
            raise Refusal(f"{site} of {self.model} got {length} tokens; {', '.join(map(str, starts))} were read")
        return turn.index(starts[length], self.tokens.count, length)

    def _places(self, turn: Turn, layout: TokenLayout) -> Tensor | None:
        """What runs of a sequence, None if it holds no image."""
        if all(one.kind != "image" for one in layout.segments):
            return None
        return turn.index(layout.span("image").start, self.tokens.count, len(layout))


def _samples(x: Tensor, turn: Turn) -> Tensor:
    return x if turn.samples is None else x.index_select(0, turn.samples)
