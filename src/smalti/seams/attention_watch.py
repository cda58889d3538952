"""Sees what the attention function is called with inside chosen modules; the function computes what it always does.

Nothing is wrapped: hooks on the modules say which of them is running, and while the watch is on, the switched attention
function shows its arguments. They are those of the softmax, so after any norm and rotation of queries and keys.
"""

from collections.abc import Iterable
from contextvars import Token
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.method import Site
from smalti.seams.anatomy import Block, Sublayer
from smalti.seams.frame import CURRENT, Attention, Forward, Frame, switch_attention


class AttentionWatch(Frame):
    """A watch on attentions of a model, from `begin()` to `end()` of each call, until `remove()`.

    Args:
        model: whose modules they are.
        sublayers: modules inside which the attention function is called.
    """

    def __init__(self, model: nn.Module, sublayers: Iterable[Sublayer]):
        self.model, self.calls = model, dict[Site, list[Attention]]()
        self._token: Token | None = None
        self._hooks: list[Any] = []
        leave: Any = torch.compiler.disable(self._leave)
        for one in sublayers:
            enter: Any = torch.compiler.disable(partial(self._enter, one))
            self._hooks.append(one.module.register_forward_pre_hook(enter))
            self._hooks.append(one.module.register_forward_hook(leave, always_call=True))

    def begin(self) -> None:
        """From now on calls are kept in `calls`, by site and in their order; those of the last time are dropped."""
        self.end()
        self.calls, self.attention = {}, None
        switch_attention(True)
        self._token = CURRENT.set(self)

    def end(self) -> None:
        """Sees nothing more; safe to call at any time."""
        if self._token is not None:
            CURRENT.reset(self._token)
            switch_attention(False)
            self._token = None

    def remove(self) -> None:
        """Takes the hooks off."""
        self.end()
        while self._hooks:
            self._hooks.pop().remove()

    def _enter(self, sublayer: Sublayer, *_: Any) -> None:
        self.attention = sublayer

    def _leave(self, *_: Any) -> None:
        self.attention = None

    def at_core(self, sublayer: Sublayer, attention: Attention) -> Tensor:
        self.calls.setdefault(sublayer.site, []).append(attention)
        return attention.attend(attention.q, attention.k, attention.v, attention.mask)

    def at_block(self, block: Block, forward: Forward, args: tuple, kwargs: dict) -> Any:
        return forward(*args, **kwargs)

    def at_sublayer(self, sublayer: Sublayer, forward: Forward, args: tuple, kwargs: dict) -> Any:
        return forward(*args, **kwargs)

    def at_feeder(self, sublayer: Sublayer, feeder: Sublayer, forward: Forward, args: tuple, kwargs: dict) -> Any:
        return forward(*args, **kwargs)
