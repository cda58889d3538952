"""Sets of attention heads with their strengths: found once, kept as json, joined.

What heads do depends on how they are damaged, so a set names its kind and target, and only sets of one variant join.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from smalti.core.errors import UserError
from smalti.core.files import read_json, write_json
from smalti.seams.heads import Address, read_address, write_address


@dataclass(frozen=True)
class HeadSet:
    """Heads with strengths.

    Args:
        heads: strength u in [0, 1] by (layer, head); a head of None is the whole layer.
        kind, target: how they are damaged, as in `PerturbedHeads`.
        name: what it is for.
        model: class of the transformer in which they were found; "" = not said.
        facts: what else is known, in json types.

    Raises:
        UserError: a strength out of range, or an address that is none.
    """

    heads: Mapping[Address, float]
    kind: str = "identity"
    target: str = "joint"
    name: str = ""
    model: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for address, strength in self.heads.items():
            is_address = isinstance(address, tuple) and len(address) == 2
            if not is_address or not all(one is None or one >= 0 for one in address) or address[0] is None:
                raise UserError(f"got {address!r} for an attention head; give (layer, head), both from 0")
            if not 0 <= strength <= 1:
                raise UserError(f"got strength {strength} for {write_address(address)}; give a number from 0 to 1")

    def __len__(self) -> int:
        return len(self.heads)

    def __str__(self) -> str:
        return write_heads(self.heads)

    def __or__(self, other: Self) -> "HeadSet":
        """Both together; a head of both has the larger strength.

        Raises:
            UserError: they are damaged in different ways, or come from different models.
        """
        for what in ("kind", "target", "model"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs and (what != "model" or (mine and theirs)):
                raise UserError(f"sets of {what} {mine!r} and {theirs!r} do not join; find both with the same {what}")
        heads = {
            address: max(self.heads.get(address, 0.0), other.heads.get(address, 0.0))
            for address in (*self.heads, *other.heads)
        }
        name = " + ".join(one for one in (self.name, other.name) if one)
        return HeadSet(heads, self.kind, self.target, name, self.model or other.model)

    def weighted(self, factor: float) -> "HeadSet":
        """All strengths times a factor."""
        heads = {address: strength * factor for address, strength in self.heads.items()}
        return HeadSet(heads, self.kind, self.target, self.name, self.model, self.facts)

    def save(self, path: Path | str) -> None:
        """Writes it as json."""
        heads = {write_address(address): strength for address, strength in self.heads.items()}
        rest = {"kind": self.kind, "target": self.target, "name": self.name, "model": self.model}
        write_json(Path(path), {"heads": heads, **rest, "facts": dict(self.facts)})

    @classmethod
    def load(cls, path: Path | str) -> "HeadSet":
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file, or it holds something else.
        """
        content = read_json(Path(path))
        known = {"heads", "kind", "target", "name", "model", "facts"}
        if not isinstance(content, dict) or content.keys() != known or not isinstance(content["heads"], dict):
            raise UserError(f"{path} is no set of heads; HeadSet.save writes one with {', '.join(sorted(known))}")
        return cls(**{**content, "heads": {read_address(one): float(u) for one, u in content["heads"].items()}})


def write_heads(heads: Mapping[Address, float]) -> str:
    """L1H10+L2*0.5"""
    words = (write_address(one) + (f"*{u:g}" if u != 1 else "") for one, u in heads.items())
    return "+".join(words)


def read_heads_text(text: str) -> dict[Address, float]:
    """The heads of L1H10+L2*0.5."""
    heads: dict[Address, float] = {}
    for word in text.split("+"):
        address, star, strength = word.strip().partition("*")
        try:
            heads[read_address(address)] = float(strength) if star else 1.0
        except ValueError as error:
            raise UserError(f"got {word!r} among heads; write L1H10, or L1H10*0.5 for half the strength") from error
    return heads


def whole_layers(layers: Iterable[int], strength: float = 1.0) -> HeadSet:
    """Every head of these layers: perturbed-attention guidance as first published."""
    return HeadSet({(layer, None): strength for layer in layers}, name="layers")


def random_heads(pool: Sequence[Address], count: int, seed: int) -> HeadSet:
    """So many of these heads, drawn blindly: what a chosen set is held against.

    Raises:
        UserError: there are not as many.
    """
    if not 0 < count <= len(pool):
        raise UserError(f"got {count} random heads of {len(pool)}; give a number from 1 to {len(pool)}")
    picks = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return HeadSet({pool[index]: 1.0 for index in sorted(picks)}, name=f"random {seed}")
