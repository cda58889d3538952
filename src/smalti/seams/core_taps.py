"""A model that is called with methods at its attention cores while gradients flow, and whose core outputs are tapped.

`smalti.apply` places calls in a run: steps, branches, a schedule. In training every call stands alone, its samples at
times of their own. Here a method acts on one call at a time, and the raw outputs of chosen attentions (before their
out-projection) come back beside the prediction, with gradients, as one bundle: what one call left can never be paired
with another's. Under gradient checkpointing a block runs once more in the backward pass: it meets the same methods
there, and nothing is tapped twice.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.core.method import CoreMethod, Method, Moment, Site
from smalti.core.protocols import TensorBundle
from smalti.seams.anatomy import Anatomy, read_anatomy
from smalti.seams.attach import attached
from smalti.seams.engine import Acting, MethodFrame
from smalti.seams.frame import CURRENT, Forward, entered
from smalti.seams.layout import Layouts, read_layouts, shapes_of


@dataclass(frozen=True)
class Tapped(TensorBundle):
    """What a call gave: its prediction (B, ...), and raw core outputs (B, h, L, d) by site."""

    velocity: Tensor
    attended: Mapping[str, Tensor]


class CoreTaps(nn.Module):
    """A denoiser with methods and taps: `(x, t, cond) -> Tapped`.

    Args:
        denoiser: any transformer that `seams.anatomy` reads; wrapped for as long as a call lasts.
        methods: at attention cores; with gradients on, each must support them.
        taps: attentions by stack and slice, such as "single_blocks[::4]", several joined by +; "" = none.

    Raises:
        Refusal: a method acts elsewhere, or the model cannot be read.
        UserError: the taps name no attention.
    """

    def __init__(self, denoiser: nn.Module, methods: Sequence[Method] = (), taps: str = ""):
        super().__init__()
        cores = tuple(one for one in methods if isinstance(one, CoreMethod))
        for method in methods:
            if method not in cores:
                raise Refusal(f"{method} acts elsewhere than on attention cores, and a call outside a run has no more")
        self.denoiser, self.methods, self.anatomy = denoiser, cores, read_anatomy(denoiser)
        self.parts = nn.ModuleList(part for one in cores for part in vars(one).values() if isinstance(part, nn.Module))
        self.sites = sites_of_taps(self.anatomy, taps)
        self._known: dict[Any, Layouts] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Tapped:
        if torch.is_grad_enabled():
            refusing = [str(method) for method in self.methods if not method.supports_grad]
            if refusing:
                raise Refusal(f"{refusing[0]} takes no gradients, so nothing can be learned through it")
        taken: dict[str, Tensor] = {}

        def watch(site: Site, out: Tensor) -> None:
            if str(site) in self.sites:
                taken[str(site)] = out

        forward = self.denoiser.forward
        with attached(self.anatomy):
            acting = [Acting(index, method, method.init()) for index, method in enumerate(self.methods)]
            layouts = self._layouts(forward, args, kwargs)
            frame = MethodFrame(self.denoiser, acting, Moment(0, 0, 0.0), layouts, {}, watch=watch)
            velocity = frame.run(forward, args, kwargs)
        if any(not method.is_neutral for method in self.methods) and not frame.tally.notes:
            raise NeverEngaged(f"{', '.join(map(str, self.methods))} changed nothing in a call")
        return Tapped(velocity, taken)

    def _layouts(self, forward: Forward, args: tuple, kwargs: dict) -> Layouts:
        """The token layouts at these inputs, read once a shape."""
        arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
        key = shapes_of({name: one for name, one in arguments.items() if name != self.anatomy.time})
        if key not in self._known:
            layouts = read_layouts(self.anatomy, forward, arguments)
            cores = {".".join(key): (layouts.queries[key], layouts.keys[key]) for key in layouts.queries}
            for method in self.methods:
                method.check_cores(type(self.denoiser).__name__, cores)
            self._known[key] = layouts
        return self._known[key]

    def enable_gradient_checkpointing(self) -> None:
        """Blocks are computed again in the backward pass, with the same methods.

        Raises:
            ValueError: the denoiser cannot.
        """
        switch: Any = getattr(self.denoiser, "enable_gradient_checkpointing", None)
        if switch is None:
            raise ValueError("its denoiser has no enable_gradient_checkpointing")
        switch(self._checkpoint)

    def _checkpoint(self, function: Callable, *inputs: Any) -> Any:
        frame, calls = CURRENT.get(), count()

        def run(*inputs: Any) -> Any:
            if next(calls) == 0 or not isinstance(frame, MethodFrame):
                return function(*inputs)
            with attached(self.anatomy), entered(frame.again()):
                return function(*inputs)

        return checkpoint(run, *inputs, use_reentrant=False)


def sites_of_taps(anatomy: Anatomy, taps: str) -> tuple[str, ...]:
    """Names of the attentions that taps such as "single_blocks[::4]+double_blocks[0]" choose.

    Raises:
        UserError: a word that cannot be read, an unknown stack, or no attention in what it chooses.
    """
    stacks: dict[str, list[list[str]]] = {}
    for block in anatomy.blocks:
        stacks.setdefault(block.site.stack, []).append([str(one.site) for one in block.attentions])
    known = ", ".join(f"{name} of {len(blocks)}" for name, blocks in stacks.items())
    found: list[str] = []
    for word in filter(None, taps.split("+")):
        match = re.fullmatch(r"([\w.]+?)(?:_blocks)?\[(-?\d*(?::-?\d*){1,2})\]", word)
        name = next((one for one in stacks if match and one.removesuffix("_blocks") == match[1]), None)
        chosen = [] if match is None or name is None else stacks[name][_slice(match[2])]
        if not any(chosen):
            raise UserError(f"taps {word!r} choose no attention; give a stack and a slice such as [::4]: {known}")
        found += [site for sites in chosen for site in sites]
    return tuple(dict.fromkeys(found))


def _slice(words: str) -> slice:
    return slice(*(int(one) if one else None for one in words.split(":")))
