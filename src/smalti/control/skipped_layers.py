"""Skip-layer guidance: the damaged pass leaves whole blocks out.

    eps_hat = eps + w (eps - eps_skipped),    block l of the set:  y = (1 - u) block(x) + u x

What a block would add is missing from the second pass, attention and feed-forward alike, and with it what the model is
led towards. It is the coarsest damage in the frame of chosen heads, and stands there to be held against them.

Source: Fine-Grained Perturbation Guidance via Attention Head Selection (arXiv 2506.10978), section 2, which names it
among earlier perturbations; u as in its section 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from smalti.control.damaged_pass import DamagedPass, Pass
from smalti.core.errors import Refusal, UserError
from smalti.core.method import BlockCall, BlockMethod, Reading
from smalti.seams.heads import Address


@dataclass(frozen=True)
class SkippedLayers(DamagedPass, BlockMethod):
    """Leads predictions away from those of the model without some of its blocks; see `DamagedPass` for the rest.

    Args:
        layers: strength u in [0, 1] by block, from 0 over all stacks in the order in which they run; 1 = left out.

    Raises:
        UserError: a value is out of range or unknown.

    Example:
        >>> with smalti.apply(pipe, SkippedLayers({2: 1.0}, scale=1.0, guidance=3.0)):
        ...     pipe(prompt, guidance_scale=3.0)
    """

    layers: Mapping[int, float] | None = None

    _missing = "did not run; name blocks that every call goes through"

    def __post_init__(self):
        super().__post_init__()
        for layer, strength in (self.layers or {}).items():
            if layer < 0 or not 0 <= strength <= 1:
                raise UserError(
                    f"got strength {strength} for layer {layer}; layers count from 0, strengths lie in [0, 1]"
                )

    @property
    def damage(self) -> tuple[Mapping[Address, float], ...]:
        return ({(layer, None): strength for layer, strength in (self.layers or {}).items()},)

    @classmethod
    def neutral(cls) -> Self:
        return cls({0: 1.0}, scale=0.0, guidance=1.0)

    @classmethod
    def active(cls) -> Self:
        return cls({0: 1.0}, scale=2.0, guidance=1.0)

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        return (cls({0: 0.5}, guidance=1.0, rescale=0.5),)

    def check(self, reading: Reading) -> None:
        if not self.layers and not self.scale == 0:
            raise Refusal("no layers are named; give layers={layer: u}")
        super().check(reading)

    def at_block(self, state: Pass, call: BlockCall) -> Mapping[str, Tensor]:
        strength = (self.layers or {}).get(call.site.depth, 0.0) if state.is_damaged else 0.0
        if not strength:
            return call.run(call.streams)
        state.layers.add(call.site.depth)
        if strength == 1:
            return call.streams
        done = call.run(call.streams)
        return {kind: one.lerp(call.streams[kind], strength) for kind, one in done.items()}
