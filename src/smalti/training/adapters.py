"""Other ways to adapt a model with few parameters, in the form of `task_bank`, and two with many.

BitFit learns shifts alone (arXiv 2106.10199), SSF scales and shifts (arXiv 2210.08823), LoRA branches without ReLU
(arXiv 2106.09685), DiffFit shifts, norms and one scale for each sublayer's last layer (arXiv 2304.06648). `full_copy`
is ordinary fine-tuning; `ControlCopy` steers the frozen model by a copy of its first blocks, as ControlNet for
transformers does (PixArt-delta, arXiv 2401.05252, section 4.2).
"""

import copy
from typing import Any, Self

from torch import Tensor, nn

from smalti.core.errors import Refusal
from smalti.core.protocols import Cond
from smalti.nn.affiner import NORMS, Form
from smalti.nn.patchify import patchify
from smalti.training.shared_base import SPATIAL, Method
from smalti.training.task_set import Spatial

LAST = ("to_out", "proj_out", "to_out.0", "net.2")
"""Names of the layers that sublayers end with."""


def bias_only(path: str, layer: nn.Module) -> Form | None:
    """BitFit: shifts of the layers that have a bias."""
    return Form(scale=None) if getattr(layer, "bias", None) is not None else None


def scale_shift(path: str, layer: nn.Module) -> Form | None:
    """SSF: a scale and a shift for each channel of every layer."""
    return Form()


def lora(rank: int) -> Method:
    """LoRA on every layer that can have a branch."""

    def form(path: str, layer: nn.Module) -> Form | None:
        is_affine = isinstance(layer, (*NORMS, nn.Embedding))
        return None if is_affine else Form(scale=None, shift=False, rank=rank, relu=False, strength=None)

    return form


def bias_norm_scale(path: str, layer: nn.Module) -> Form | None:
    """DiffFit: shifts, norms, and one number for each sublayer."""
    if isinstance(layer, NORMS):
        return Form()
    if path.endswith(tuple(f".{name}" for name in LAST)):
        return Form(scale="scalar")
    return bias_only(path, layer)


def full_copy(model: nn.Module) -> Any:
    """A copy all of whose parameters learn."""
    return copy.deepcopy(model).requires_grad_(True)


class SharedModel:
    """Holds a model that is neither a child of who holds it nor ever copied."""

    def __init__(self, model: nn.Module):
        self.model: Any = model

    def __deepcopy__(self, memo: dict) -> Self:
        return self


class ControlCopy(nn.Module):
    """A frozen model with a copy of its first blocks, which see the condition: `(x, t, cond) -> velocity`.

    The output of each copied block is added to that of its original behind a linear layer that starts at 0.

    Args:
        model: frozen; it has a list `blocks` that takes (tokens, context), and a linear `x_embedder`.
        blocks: how many are copied; half of them if None.
        spatial: form of the condition in `cond.extra["spatial"]`, or None.
    """

    def __init__(self, model: nn.Module, blocks: int | None = None, spatial: Spatial | None = None):
        super().__init__()
        stack, embedder = getattr(model, "blocks", None), getattr(model, "x_embedder", None)
        if not isinstance(stack, nn.ModuleList) or not isinstance(embedder, nn.Linear):
            raise Refusal(f"{type(model).__name__} has no list `blocks` behind an `x_embedder`; use a DiT")
        self.shared = SharedModel(model.requires_grad_(False))
        count = (len(stack) + 1) // 2 if blocks is None else blocks
        width = embedder.out_features
        self.copies = nn.ModuleList(copy.deepcopy(block).requires_grad_(True) for block in stack[:count])
        self.joins = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.spatial = spatial
        self.embedder = None if spatial is None else nn.Linear(spatial.channels * spatial.patch**2, width)
        for layer in (*self.joins, *([] if self.embedder is None else [self.embedder])):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.to(embedder.weight.device)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The velocity; the model is hooked for the time of the call."""
        model, control = self.shared.model, {}

        def begin(block: nn.Module, args: tuple) -> None:
            control["tokens"] = args[0]
            if self.embedder is not None and self.spatial is not None:
                control["tokens"] = args[0] + self.embedder(patchify(cond.extra[SPATIAL], self.spatial.patch))

        def join(number: int):
            def hook(block: nn.Module, args: tuple, out: Tensor) -> Tensor:
                control["tokens"] = self.copies[number](control["tokens"], *args[1:])
                return out + self.joins[number](control["tokens"])

            return hook

        handles = [model.blocks[0].register_forward_pre_hook(begin)]
        handles += [model.blocks[i].register_forward_hook(join(i)) for i in range(len(self.copies))]
        try:
            return model(x, t, cond)
        finally:
            for handle in handles:
                handle.remove()
