"""Keeps two groups of image tokens apart: in self-attention a token sees its own group alone.

The groups come with each call, in its conditions; a call without them is what it always was. Experimental: for models
whose sequences are image tokens alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.errors import Refusal
from smalti.seams.anatomy import Sublayer, read_anatomy
from smalti.seams.attention_watch import AttentionWatch
from smalti.seams.frame import Attention


class GroupWatch(AttentionWatch):
    """Separates groups in a model `(x, t, cond) -> velocity` until `remove()`.

    Args:
        model: any that `seams.anatomy` reads.
        name: of the groups (B, N), bool, in `cond.extra`.

    Raises:
        Refusal: the model computes blocks again in the backward pass; or, at a call, it joins text and image.
    """

    def __init__(self, model: nn.Module, name: str):
        if getattr(model, "gradient_checkpointing", False):
            raise Refusal("groups of tokens are kept apart in the forward pass alone; leave gradient_checkpointing off")
        super().__init__(model, [one for block in read_anatomy(model).blocks for one in block.attentions])
        self.name, self.groups = name, None
        before: Any = torch.compiler.disable(self._before)
        after: Any = torch.compiler.disable(self._after)
        self._hooks.append(model.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(after, always_call=True))

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        cond = kwargs.get("cond", args[2] if len(args) > 2 else None)
        self.groups: Tensor | None = None if cond is None else cond.extra.get(self.name)
        if self.groups is not None:
            self.begin()

    def _after(self, *_: Any) -> None:
        self.end()

    def at_core(self, sublayer: Sublayer, attention: Attention) -> Tensor:
        q, k, v, mask = attention.q, attention.k, attention.v, attention.mask
        assert self.groups is not None
        count = self.groups.shape[1]
        if q.shape[2] == k.shape[2] == count and mask is None:
            mask = (self.groups[:, :, None] == self.groups[:, None, :])[:, None]  # (B, 1, N, N)
        elif q.shape[2] != count or k.shape[2] == q.shape[2]:
            raise Refusal(
                f"{sublayer.site} attends from {q.shape[2]} to {k.shape[2]} tokens under a mask or with text among "
                f"them; groups of {count} tokens are kept apart where a sequence holds image tokens alone"
            )
        return attention.attend(q, k, v, mask)
