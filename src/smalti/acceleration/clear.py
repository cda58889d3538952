"""CLEAR: every image token attends to the tokens in a circle around it, and to all text.

Attention becomes as local as a convolution and its cost linear in the number of tokens: N (M + pi r^2). With `pool`,
image tokens also see cells of `pool` x `pool` tokens, one pooled key and value each (a weight of that shape for every
attention, the mean at the start, applied after norm and rotation); text never sees them. The radius counts tokens, not
pixels. In clips the circle is the same in every frame.

Put on a model as it is, a small radius breaks its pictures: the form without training is a comparator. A student that
was distilled for the circle (`training.distill`) is drawn with by `distilled`, in one line.

Source: CLEAR (arXiv 2412.16112), section 3.2 and 3.3. Differences: M is read from the model and not fixed at 512.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError, unknown_name
from smalti.core.method import CoreCall, CoreMethod, Method, Site
from smalti.core.protocols import TokenLayout
from smalti.ops.circle_mask import (
    Backend,
    Pooled,
    Shape,
    choose,
    circle_attention,
    circle_layout,
    pool_tokens,
    tiles_for,
)
from smalti.seams.anatomy import read_anatomy
from smalti.seams.apply import apply, denoisers
from smalti.seams.handle import Handle
from smalti.seams.image_attention import check_image_grid, image_grid, keys_alone
from smalti.seams.schedule import is_early
from smalti.training.attention_deltas import Deltas, load_deltas, merged


class PoolWeights(nn.Module):
    """Pooling weights (s, s), one for every attention, each the mean at the start.

    Args:
        sites: names of the attentions.
        pool: s.
    """

    def __init__(self, sites: tuple[str, ...], pool: int):
        super().__init__()
        self.weights = nn.ParameterDict({_key(one): torch.full((pool, pool), 1 / pool**2) for one in sites})

    @classmethod
    def of(cls, model: nn.Module, pool: int) -> Self:
        """Fresh weights for every attention of a model."""
        return cls(tuple(str(one.site) for block in read_anatomy(model).blocks for one in block.attentions), pool)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Those of a file, (s, s) by site."""
        made = cls(tuple(tensors), next(iter(tensors.values())).shape[0])
        for site, tensor in tensors.items():
            made.weights[_key(site)].data.copy_(tensor)
        return made.requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """(s, s) by site."""
        return {name.replace("/", "."): one.detach() for name, one in self.weights.items()}

    def at(self, site: Site) -> Tensor:
        """The weight of one attention.

        Raises:
            UserError: they were made for another model.
        """
        name = f"{site.stack}.{site.index}.{site.name}"
        if _key(name) not in self.weights:
            raise UserError(f"the pooling weights know no attention {name}; they were made for another model")
        return self.weights[_key(name)]

    def __repr__(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return f"PoolWeights({digest.hexdigest()[:8]})"


def _key(site: str) -> str:
    return site.replace(".", "/")  # names of parameters have no dots


@dataclass(frozen=True)
class CLEAR(CoreMethod):
    """Attention within a circle.

    Args:
        radius: r in tokens, strict; infinite = everything.
        pool: s, side of the cells whose pooled keys image tokens see too; None = none.
        dense_steps: first steps with full attention, a number or a share of the run below 1.
        shape: circle, or square as a comparator.
        weights: learned pooling weights; None = means.
        backend: gather, flex or dense; None = the one of least products. With few tokens `dense` is quicker though it
            saves none.

    Raises:
        UserError: a setting out of range.
    """

    radius: float = 8
    pool: int | None = None
    dense_steps: float = 0
    shape: Shape = "circle"
    weights: PoolWeights | None = None
    backend: Backend | None = None

    owns = frozenset({"attention pattern"})
    work = "less"
    supports_grad = True

    def __post_init__(self):
        if not self.radius > 0 or self.dense_steps < 0 or (self.pool is not None and self.pool < 2):
            raise UserError(
                f"got radius={self.radius}, pool={self.pool}, dense_steps={self.dense_steps}; give a radius above 0, a "
                "pool from 2 or none, steps from 0"
            )
        if self.shape not in get_args(Shape):
            raise unknown_name("shape of CLEAR", self.shape, get_args(Shape))
        if self.backend is not None and self.backend not in get_args(Backend):
            raise unknown_name("backend of CLEAR", self.backend, get_args(Backend))
        if self.weights is not None and self.pool is None:
            raise UserError("got pooling weights without a pool; give the pool that they were learned for")

    @classmethod
    def neutral(cls) -> Self:
        return cls(radius=float("inf"))

    @classmethod
    def active(cls) -> Self:
        return cls(radius=1)

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        return (cls(radius=1, dense_steps=3), cls(radius=1, pool=4), cls(radius=1.2, shape="square"))

    @property
    def is_neutral(self) -> bool:
        return self.radius == float("inf") and self.pool is None

    def check_cores(self, model: str, cores: Mapping[str, tuple[TokenLayout, TokenLayout]]) -> None:
        check_image_grid(model, cores, "CLEAR")

    def idle_reason(self, evaluations: int) -> str:
        return (
            f"in {evaluations} evaluations a radius of {self.radius} reached over the whole grid of tokens, or "
            f"dense_steps={self.dense_steps} covered all; take a smaller radius or fewer dense steps"
        )

    def at_core(self, state: None, call: CoreCall) -> Tensor:
        grid = image_grid(call.layout, call.key_layout)
        if self.is_neutral or grid is None or is_early(call.moment, self.dense_steps):
            return call.attend(call.q, call.k, call.v, call.mask)
        image = call.layout.span("image")
        mask, pooled = keys_alone(call.mask, str(call.site)), None
        group = tiles_for(grid, call.q.device, mask) if self.backend in (None, "flex") else None
        layout = circle_layout(grid, self.radius, image.start, len(call.layout) - image.stop, self.shape, group)
        if layout.is_full and self.pool is None:
            return call.attend(call.q, call.k, call.v, call.mask)
        if self.pool is not None:
            mean = call.q.new_full((self.pool, self.pool), 1 / self.pool**2)
            weight = mean if self.weights is None else self.weights.at(call.site).to(call.q.device)
            pooled = Pooled(*(pool_tokens(one[:, :, image], grid, weight) for one in (call.k, call.v)))
        cells = 0 if pooled is None else pooled.k.shape[2]
        backend = choose(layout, call.q.device, cells, mask) if self.backend is None else self.backend
        call.note(backend)
        return circle_attention(call.q, call.k, call.v, layout, mask, call.scale, pooled, backend)


@contextmanager
def distilled(target: Any, student: str | Path | Deltas, *methods: Method, **settings: Any) -> Iterator[Handle]:
    """A distilled student in place of the model it was learned from, for as long as the context lasts.

    Args:
        target: a pipeline or model: the teacher, or a sibling fine-tuned from it.
        student: a name of the zoo, a folder, or what `load_deltas` gave.
        methods: further ones.
        settings: of `CLEAR`, in place of those that it was learned with.

    Example:
        >>> with distilled(pipe, "clear-emoji-1k"):
        ...     picture = pipe("a green apple").images[0]
    """
    deltas = student if isinstance(student, Deltas) else load_deltas(student)
    (model,) = denoisers(target)
    with merged(model, deltas), apply(target, method_of(deltas, **settings), *methods) as handle:
        yield handle


def method_of(deltas: Deltas, **settings: Any) -> CLEAR:
    """The method that a student was learned with."""
    weights = PoolWeights.from_tensors(deltas.extra) if deltas.extra else None
    return CLEAR(**{"weights": weights, **deltas.card["method"], **settings})
