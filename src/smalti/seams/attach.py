"""Puts the frame's questions into a model: its forward, its blocks, their sublayers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from smalti.seams.anatomy import Anatomy, Sublayer
from smalti.seams.frame import CURRENT, Forward, Frame, switch_attention
from smalti.seams.wrapping import is_compiled, wrap, wrap_block

Undo = Callable[[], None]
Answer = Callable[[Frame, Forward, tuple, dict], Any]


def attach(anatomy: Anatomy) -> list[Undo]:
    """Wraps every block and sublayer, so that they ask the current frame; without one nothing changes.

    Returns:
        What undoes it, to be called in reverse order.
    """
    undo: list[Undo] = []
    for block in anatomy.blocks:

        def at_block(frame: Frame, forward: Forward, args: tuple, kwargs: dict, block=block) -> Any:
            return frame.at_block(block, forward, args, kwargs)

        for sublayer in block.sublayers:
            undo += _attach_sublayer(anatomy.model, sublayer, is_compiled(block.module))
        undo += wrap_block(block.module, _asking(anatomy.model, at_block))
    return undo


@contextmanager
def attached(anatomy: Anatomy) -> Iterator[None]:
    """Wraps a model and switches attention for as long as it is looked at, without any method."""
    undo = attach(anatomy)
    switch_attention(True)
    try:
        yield
    finally:
        switch_attention(False)
        while undo:
            undo.pop()()


def check_attached(anatomy: Anatomy) -> str | None:
    """The first site whose module was replaced since, for instance by an adapter that was loaded; None if all stand."""
    for block in anatomy.blocks:
        for one in (part for sublayer in block.sublayers for part in (sublayer, *sublayer.feeders)):
            if block.module.get_submodule(one.site.name) is not one.module:
                return str(one.site)
    return None


def _attach_sublayer(model: nn.Module, sublayer: Sublayer, compiled: bool) -> list[Undo]:
    def at_sublayer(frame: Frame, forward: Forward, args: tuple, kwargs: dict) -> Any:
        return frame.at_sublayer(sublayer, forward, args, kwargs)

    undo = [wrap(sublayer.module, "forward", _asking(model, at_sublayer), compiled)]
    for feeder in sublayer.feeders:

        def at_feeder(frame: Frame, forward: Forward, args: tuple, kwargs: dict, feeder=feeder) -> Any:
            return frame.at_feeder(sublayer, feeder, forward, args, kwargs)

        undo.append(wrap(feeder.module, "forward", _asking(model, at_feeder), compiled))
    return undo


def _asking(model: nn.Module, answer: Answer) -> Callable[[Forward, tuple, dict], Any]:
    """Asks the current frame if it answers for this model; else runs what was there."""

    def around(forward: Forward, args: tuple, kwargs: dict) -> Any:
        frame = CURRENT.get()
        if frame is None or frame.model is not model:
            return forward(*args, **kwargs)
        return answer(frame, forward, args, kwargs)

    return around
