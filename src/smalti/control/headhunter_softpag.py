"""Guidance by perturbing chosen attention heads.

Each guided step runs the model twice: plainly, and with the attention maps of chosen heads damaged. The prediction is
led away from the damaged one,

    eps_hat = eps + w (eps - eps_damaged),    for a head (l, h) of the set:  O = (1 - u) A V + u A' V

where A' is the identity by default, so that each token of the head keeps its own value, and u softens it. Which heads
are chosen decides what is gained: structure, a colour, a style (`head_hunt` finds them).

Source: Fine-Grained Perturbation Guidance via Attention Head Selection (arXiv 2506.10978), section 4 (heads) and
section 5 (SoftPAG). The other kinds of damage are those of `ops.head_damage`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from smalti.control.damaged_pass import DamagedPass, Pass
from smalti.control.head_sets import HeadSet, read_heads_text
from smalti.core.errors import Refusal, UserError, unknown_name
from smalti.core.method import CoreCall, CoreMethod, Reading
from smalti.core.protocols import TokenLayout
from smalti.ops.head_damage import BLENDS, Blend, check_kind, soften, soften_maps
from smalti.seams.heads import Address, is_self_attention, strengths

Heads = HeadSet | Mapping[Address, float] | Mapping[tuple[int, int], float] | str
TARGETS = ("joint", "image")


@dataclass(frozen=True)
class PerturbedHeads(DamagedPass, CoreMethod):
    """Leads predictions away from those with damaged heads; the other settings are those of `DamagedPass`.

    Args:
        heads: strength u by (layer, head), a `HeadSet`, the path of a saved one, or words such as "L1H10+L2*0.5"; a
            head of None is the whole layer. A list holds one of these for each sample of the batch.
        target: joint (text rows of a head are damaged as well) or image (these rows alone).
        kind: identity, uniform, mean query, temperature:T or zero.
        blend: linear, or by written-out maps log-linear or slerp, for small shapes.

    Raises:
        UserError: a value is out of range or unknown.
    """

    heads: Heads | Sequence[Heads] | None = None
    target: str = "joint"
    kind: str = "identity"
    blend: Blend = "linear"

    _missing = "has no softmax attention of image tokens to their own sequence; leave its heads out"

    def __post_init__(self):
        super().__post_init__()
        check_kind(self.kind)
        for name, allowed in (("target", TARGETS), ("blend", BLENDS)):
            if getattr(self, name) not in allowed:
                raise unknown_name(name, getattr(self, name), allowed)
        if self.kind == "zero" and self.blend != "linear":
            raise UserError(f"zeroed attention has no {self.blend} blend; choose blend='linear'")
        _ = self.sets

    @cached_property
    def sets(self) -> tuple[HeadSet, ...]:
        """The heads: one set for all samples, or one for each."""
        if self.heads is None:
            return ()
        is_one = isinstance(self.heads, (HeadSet, Mapping, str))
        return tuple(self._read(one) for one in ((self.heads,) if is_one else self.heads))  # type: ignore[arg-type]

    def _read(self, heads: Heads) -> HeadSet:
        if isinstance(heads, Mapping):
            return HeadSet(heads, self.kind, self.target)  # type: ignore[arg-type]
        if isinstance(heads, str) and not heads.endswith(".json"):
            return HeadSet(read_heads_text(heads), self.kind, self.target)
        found = HeadSet.load(Path(heads)) if isinstance(heads, str) else heads
        if (found.kind, found.target) != (self.kind, self.target):
            raise UserError(
                f"these heads were found with kind={found.kind!r}, target={found.target!r}, "
                f"got {self.kind!r}, {self.target!r}; give the ones that they were found with"
            )
        return found

    @property
    def damage(self) -> tuple[Mapping[Address, float], ...]:
        return tuple(one.heads for one in self.sets)

    @classmethod
    def neutral(cls) -> Self:
        return cls({(0, 0): 1.0}, scale=0.0, guidance=1.0)

    @classmethod
    def active(cls) -> Self:
        return cls({(0, 0): 1.0}, scale=2.0, guidance=1.0)

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        return (
            cls({(0, None): 0.5}, guidance=1.0, target="image", kind="mean query", rescale=0.5),
            cls({(0, 1): 0.5}, guidance=1.0, blend="slerp"),
        )

    def check(self, reading: Reading) -> None:
        if not self.sets and not self.is_neutral:
            raise Refusal("no heads are named; give heads={(layer, head): u}, or find some with hunt_heads")
        super().check(reading)
        models = {one.model for one in self.sets} - {"", reading.model}
        if models:
            raise Refusal(f"these heads were found in {', '.join(models)}; {reading.model} has others: hunt there")

    def check_cores(self, model: str, cores: Mapping[str, tuple[TokenLayout, TokenLayout]]) -> None:
        if not any(is_self_attention(*layouts) for layouts in cores.values()):
            raise Refusal(
                f"{model} has no softmax attention of image tokens to their own sequence, and only there each token "
                "has a value of its own to keep"
            )

    def at_core(self, state: Pass, call: CoreCall) -> Tensor:
        if not is_self_attention(call.layout, call.key_layout):
            return call.attend(call.q, call.k, call.v, call.mask)
        state.batch = call.q.shape[0]
        strength = self._strength(state, call) if state.is_damaged else None
        if strength is None:
            return call.attend(call.q, call.k, call.v, call.mask)
        target = _image_rows(call.layout, call.q.device) if self.target == "image" else None
        state.layers.add(call.site.depth)
        if self.blend == "linear":
            return soften(call.q, call.k, call.v, call.mask, strength, call.attend, self.kind, target)
        maps = soften_maps(call.q, call.k, call.v, call.mask, strength, call.scale, self.kind, target, self.blend)
        return torch.where(strength > 0, maps, call.attend(call.q, call.k, call.v, call.mask))

    def _strength(self, state: Pass, call: CoreCall) -> Tensor | None:
        """u of the heads at this attention, (1, h, 1, 1) or (B, h, 1, 1); None if all are 0."""
        layer, (batch, heads) = call.site.depth, call.q.shape[:2]
        key = (layer, batch, heads, call.q.device)
        if key not in state.kept:
            found = [strengths(one.heads, layer, heads) for one in self.sets]
            values = torch.stack([torch.zeros(heads) if one is None else one for one in found])  # (sets, h)
            if len(values) > 1:  # the unconditional half has the same heads, and nobody reads what it gives
                values = values if state.half is None else values.repeat(2, 1)
                values = values.repeat_interleave(batch // len(values), 0)
            state.kept[key] = values[:, :, None, None].to(call.q.device) if values.any() else None
        return state.kept[key]


@lru_cache(maxsize=64)
def _image_rows(layout: TokenLayout, device: torch.device) -> Tensor:
    """Which tokens are image (L, 1), bool."""
    return torch.cat([torch.full((one.length, 1), one.kind == "image", device=device) for one in layout.segments])
