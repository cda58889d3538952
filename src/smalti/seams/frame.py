"""What is going on right now in this thread: the frame of the model call that is running, if methods act on it.

Wrapped modules and the switched attention function ask for the current frame; without one they do what they always did.
A context variable holds it, so two threads never meet.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.seams.anatomy import Block, Sublayer

Forward = Callable[..., Any]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Attention:
    """One call of the attention function: q (B, h, L, d), k and v (B, h, L', d), mask, scale, and how to run it."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    attend: Attend


class Frame(ABC):
    """One running model call; `model` is the transformer whose modules it answers for."""

    model: nn.Module
    attention: Sublayer | None = None

    @abstractmethod
    def at_block(self, block: Block, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """Called in place of a block."""

    @abstractmethod
    def at_sublayer(self, sublayer: Sublayer, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """Called in place of a sublayer, or of an attention that feeds one."""

    @abstractmethod
    def at_feeder(self, sublayer: Sublayer, feeder: Sublayer, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """Called in place of `feeder`, which computes a part of the input of a fused sublayer."""

    @abstractmethod
    def at_core(self, sublayer: Sublayer, attention: Attention) -> Tensor:
        """Called in place of the attention function inside an attention module."""


CURRENT: ContextVar[Frame | None] = ContextVar("smalti_frame", default=None)


@contextmanager
def entered(frame: Frame | None) -> Iterator[None]:
    """Makes a frame the current one."""
    token = CURRENT.set(frame)
    try:
        yield
    finally:
        CURRENT.reset(token)


@contextmanager
def inside(frame: Frame, attention: Sublayer | None) -> Iterator[None]:
    """Says which attention module is running."""
    before, frame.attention = frame.attention, attention
    try:
        yield
    finally:
        frame.attention = before


_lock = threading.Lock()
_users = 0
_plain = F.scaled_dot_product_attention


def switch_attention(is_on: bool) -> None:
    """Counts users of the switched attention function; with none left, PyTorch's own stands in its place again."""
    global _users
    with _lock:
        _users += 1 if is_on else -1
        F.scaled_dot_product_attention = _switched if _users else _plain


@torch.compiler.disable
def _switched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands for `scaled_dot_product_attention` while a method acts on attention cores."""
    frame = CURRENT.get()
    if frame is None or frame.attention is None:
        return _plain(query, key, value, *args, **kwargs)
    return _offer(frame, frame.attention, query, key, value, *args, **kwargs)


def _offer(
    frame: Frame,
    sublayer: Sublayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if is_causal or dropout_p:  # no diffusion transformer does this; the model's own attention is exact
        return _plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return _plain(q, k, v, attn_mask=mask, scale=scale)

    return frame.at_core(sublayer, Attention(query, key, value, attn_mask, scale, attend))
