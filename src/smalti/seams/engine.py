"""One model call with methods: the frame that answers for wrapped modules and hands them to the methods in order."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from smalti.core.errors import Refusal
from smalti.core.method import (
    BlockCall,
    BlockMethod,
    CoreCall,
    CoreMethod,
    Method,
    Moment,
    Outputs,
    Site,
    StepCall,
    StepMethod,
    SublayerCall,
    SublayerMethod,
)  # fmt: skip
from smalti.core.protocols import TokenLayout
from smalti.core.tokens import TokenMemory, TokensCall, TokensMethod
from smalti.seams.anatomy import Block, Sublayer
from smalti.seams.frame import Attention, Forward, Frame, entered, inside
from smalti.seams.image_tokens import ImageTokens, read_image_tokens, stacked
from smalti.seams.layout import Layouts, core_name
from smalti.seams.token_rows import TokenRows, refusing
from smalti.seams.wrapping import is_outermost


@dataclass(frozen=True)
class Shape:
    """What a module returned when it last ran: its structure and the kind of every tensor in it."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]


@dataclass(frozen=True)
class Acting:
    """A method in a run: its place among the methods, and what it remembers."""

    index: int
    method: Method
    state: Any


@dataclass
class Tally:
    """Counts of one model call, for the report.

    Args:
        notes: events by method and name.
        sites: sites that were reached, by method.
    """

    notes: Counter[tuple[int, str]] = field(default_factory=Counter)
    sites: set[tuple[int, str]] = field(default_factory=set)

    def note(self, index: int, event: str) -> None:
        """Counts an event of a method."""
        self.notes[index, event] += 1


class MethodFrame(Frame):
    """A model call in which methods act.

    Args:
        model: the transformer.
        acting: the methods with their states, outermost first.
        moment: where in the run the call is.
        layouts: of the tokens, if a method acts on attention cores, blocks or tokens.
        shapes: what modules returned in this run, by module; filled here.
        sample: the noisy sample of the call.
        watch: sees the raw output of every attention core, before its projection.
    """

    def __init__(
        self,
        model: nn.Module,
        acting: Sequence[Acting],
        moment: Moment,
        layouts: Layouts | None,
        shapes: dict[nn.Module, Shape],
        sample: Any = None,
        watch: Callable[[Site, Tensor], None] | None = None,
    ):
        self.model, self.moment, self.layouts, self.shapes, self.sample = model, moment, layouts, shapes, sample
        self.acting, self.watch = acting, watch
        self.steps = [one for one in acting if isinstance(one.method, StepMethod)]
        self.blocks = [one for one in acting if isinstance(one.method, BlockMethod)]
        self.sublayers = [one for one in acting if isinstance(one.method, SublayerMethod)]
        self.cores = [one for one in acting if isinstance(one.method, CoreMethod)]
        self.tokens = [one for one in acting if isinstance(one.method, TokensMethod)]
        self.rows: TokenRows | None = None
        self.tally = Tally()
        self.occurrences: Counter[Site] = Counter()
        self.core_calls: Counter[Site] = Counter()
        self.decisions: dict[Site, Decision | None] = {}

    def run(self, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """The model call, through all step methods and the one that chooses tokens."""

        def plain(sample: Any = None) -> Outputs:
            def given(one: Any) -> Any:
                return sample if sample is not None and one is self.sample else one

            for counted in (self.occurrences, self.core_calls, self.decisions):
                counted.clear()  # a step method may run the model again: its sites are the same
            with entered(self):
                output = forward(*map(given, args), **{name: given(one) for name, one in kwargs.items()})
            leaves, spec = pytree.tree_flatten(output)
            self.shapes[self.model] = Shape(spec, ())
            return tuple(leaves)

        call: Callable[..., Outputs] = plain
        for one in self.tokens:
            call = partial(self._tokens, one, call)
        for one in reversed(self.steps):
            call = partial(self._step, one, call)
        return pytree.tree_unflatten(list(call()), self.shapes[self.model].spec)

    def again(self) -> "MethodFrame":
        """For a part of this call that is computed once more, by gradient checkpointing; nothing is watched then."""
        return MethodFrame(self.model, self.acting, self.moment, self.layouts, {})

    def _step(self, one: Acting, run: Callable[..., Outputs], sample: Any = None) -> Outputs:
        assert isinstance(one.method, StepMethod)
        sample = self.sample if sample is None else sample

        def run_on(other: Any = None) -> Outputs:
            return run(sample if other is None else other)

        return one.method.at_step(one.state, StepCall(self.moment, sample, run_on, self._note(one)))

    def _tokens(self, one: Acting, run: Callable[..., Outputs], sample: Any = None) -> Outputs:
        assert isinstance(one.method, TokensMethod)
        assert self.layouts is not None
        sample = self.sample if sample is None else sample
        tokens, outputs = read_image_tokens(type(self.model).__name__, self.layouts, sample), []

        def run_rows(active: Tensor | None, memory: TokenMemory | None) -> Tensor:
            outputs[:] = self._run_rows(partial(run, sample), tokens, active, memory)
            return tokens.prediction(outputs)

        call = TokensCall(
            self.moment, stacked(sample), tokens.count, run_rows, tokens.places.to_tokens,
            tokens.places.from_tokens, self._note(one),
        )  # fmt: skip
        return tokens.with_prediction(outputs, one.method.at_tokens(one.state, call))

    def _run_rows(
        self, run: Callable[[], Outputs], tokens: ImageTokens, active: Tensor | None, memory: TokenMemory | None
    ) -> Outputs:
        """The model call with some tokens, or with all and a memory to fill."""
        if memory is None:
            return run()
        assert self.layouts is not None
        name = type(self.model).__name__
        self.rows = TokenRows(name, self.layouts, tokens, active, memory)
        try:
            with nullcontext() if active is None else refusing(name):
                return run()
        finally:
            self.rows.finish()
            self.rows = None

    def at_block(self, block: Block, forward: Forward, args: tuple, kwargs: dict) -> Any:
        if self.rows is not None:
            for one in self.tokens:
                self._reach(one, block.site)
            return self.rows.at_block(block, forward, args, kwargs)
        if not self.blocks:
            return forward(*args, **kwargs)
        assert self.layouts is not None
        known = self.layouts.streams[block.site.stack]
        if known.fault:
            raise Refusal(f"the token streams of {block.site} in {type(self.model).__name__} {known.fault}")
        site = self._occurrence(block.site)
        arguments: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        others: list[Any] = [None] * len(known.outputs)  # what a block gives besides its streams

        def plain(streams: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            given = {**arguments, **{name: streams[kind] for name, kind in known.inputs.items()}}
            positional = [given[index] for index in range(len(args))]
            output = forward(*positional, **{name: given[name] for name in kwargs})
            others[:] = output if isinstance(output, (tuple, list)) else (output,)
            return {
                kind: tensor
                for kind, tensor in zip(known.outputs, others, strict=True)
                if kind is not None and tensor is not None
            }

        call: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = plain
        for one in reversed(self.blocks):
            call = partial(self._block, one, site, call)
        result = call({kind: arguments[name] for name, kind in known.inputs.items()})
        outputs = tuple(
            other if kind is None else result.get(kind) for kind, other in zip(known.outputs, others, strict=True)
        )
        return outputs if known.is_tuple else outputs[0]

    def _block(self, one: Acting, site: Site, run: Callable, streams: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert isinstance(one.method, BlockMethod)
        self._reach(one, site)
        return one.method.at_block(one.state, BlockCall(self.moment, site, streams, run, self._note(one)))

    def at_sublayer(self, sublayer: Sublayer, forward: Forward, args: tuple, kwargs: dict) -> Any:
        if not self.sublayers:
            return self._attend(sublayer, forward, args, kwargs)
        decision = self.decisions.pop(sublayer.site, None) or self._decide(sublayer)
        if decision.skipper is not None:
            method = decision.skipper.method
            assert isinstance(method, SublayerMethod)
            given = method.forecast(decision.skipper.state, self._call(decision.skipper, decision.site))
            return pytree.tree_unflatten(list(given), self.shapes[sublayer.module].spec)
        leaves, spec = pytree.tree_flatten(self._attend(sublayer, forward, args, kwargs))
        self.shapes[sublayer.module] = Shape(spec, ())
        outputs: Outputs = tuple(leaves)
        for one in reversed(self.sublayers):
            assert isinstance(one.method, SublayerMethod)
            outputs = one.method.observe(one.state, self._call(one, decision.site), outputs)
        return pytree.tree_unflatten(list(outputs), spec)

    def at_feeder(self, sublayer: Sublayer, feeder: Sublayer, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """A feeder of a skipped sublayer gives stand-ins; what follows from them costs little or nothing."""
        if not self.sublayers:
            return self._attend(feeder, forward, args, kwargs)
        decision = self.decisions.setdefault(sublayer.site, None) or self._decide(sublayer)
        self.decisions[sublayer.site] = decision
        if decision.skipper is not None:
            shape = self.shapes[feeder.module]
            return pytree.tree_unflatten(list(shape.leaves), shape.spec)
        output = self._attend(feeder, forward, args, kwargs)
        leaves, spec = pytree.tree_flatten(output)
        is_unseen = sublayer.is_alone and all(is_outermost(one.module) for one in (sublayer, *sublayer.feeders))
        self.shapes[feeder.module] = Shape(spec, tuple(_stand_in(leaf, is_unseen) for leaf in leaves))
        return output

    def at_core(self, sublayer: Sublayer, attention: Attention) -> Tensor:
        out = self._through_cores(sublayer, attention)
        if self.watch is not None:
            self.watch(sublayer.site, out)
        return out

    def _through_cores(self, sublayer: Sublayer, attention: Attention) -> Tensor:
        if self.rows is not None:
            with inside(self, None):
                return self.rows.at_core(sublayer, attention)
        q, k, v, attend = attention.q, attention.k, attention.v, attention.attend
        if not self.cores or self.layouts is None:
            return attend(q, k, v, attention.mask)
        call = self.core_calls[sublayer.site]
        self.core_calls[sublayer.site] += 1
        key = (sublayer.site.stack, core_name(sublayer.site.name, call))
        layout, key_layout = self.layouts.queries.get(key), self.layouts.keys.get(key)
        if layout is None or key_layout is None or (len(layout), len(key_layout)) != (q.shape[-2], k.shape[-2]):
            return attend(q, k, v, attention.mask)  # unlike the first block's: the report lists it as left off
        site = replace(sublayer.site, occurrence=call)
        for one in reversed(self.cores):
            attend = partial(self._core, one, site, attention.scale, layout, key_layout, attend)
        with inside(self, None):  # attention that a method computes is no further call of this module
            return attend(q, k, v, attention.mask)

    def _core(
        self,
        one: Acting,
        site: Site,
        scale: float | None,
        layout: TokenLayout,
        key_layout: TokenLayout,
        attend: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        assert isinstance(one.method, CoreMethod)
        self._reach(one, site)
        note = self._note(one)
        return one.method.at_core(
            one.state, CoreCall(self.moment, site, q, k, v, mask, scale, layout, key_layout, attend, note)
        )

    def _attend(self, sublayer: Sublayer, forward: Forward, args: tuple, kwargs: dict) -> Any:
        with inside(self, sublayer if sublayer.site.kind == "attention" else None):
            return forward(*args, **kwargs)

    def _decide(self, sublayer: Sublayer) -> "Decision":
        """Asks the methods, outermost first, whether one of them gives this sublayer's output."""
        site = self._occurrence(sublayer.site)
        for one in self.sublayers:
            assert isinstance(one.method, SublayerMethod)
            self._reach(one, site)
            if one.method.skips(one.state, self._call(one, site)):
                return Decision(site, one)
        return Decision(site, None)

    def _occurrence(self, site: Site) -> Site:
        count = self.occurrences[site]
        self.occurrences[site] += 1
        return replace(site, occurrence=count) if count else site

    def _call(self, one: Acting, site: Site) -> SublayerCall:
        return SublayerCall(self.moment, site, self._note(one))

    def _note(self, one: Acting) -> Callable[[str], None]:
        return partial(self.tally.note, one.index)

    def _reach(self, one: Acting, site: Site) -> None:
        self.tally.sites.add((one.index, str(site)))


@dataclass(frozen=True)
class Decision:
    """For one call of a sublayer: its site, and the method that gives its output, or None if it runs."""

    site: Site
    skipper: Acting | None


def _stand_in(leaf: Any, is_unseen: bool) -> Any:
    """For a tensor that nobody reads: without memory, or of one number where another sublayer or a hook may see it."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_like(leaf, device="meta") if is_unseen else leaf.new_zeros(()).expand(leaf.shape)
