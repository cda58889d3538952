"""What a system page holds, and what its claim gives back.

A page is `systems/<slug>.py` with `SYSTEM = System(...)`, written in literals so that it can be read without importing
anything, `small(ctx) -> Verdict` (minutes on two cores) and, where the paper's size matters, `full(ctx)` for one GPU.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

Outcome = Literal["holds", "fails", "unresolved"]
OUTCOMES = ("holds", "fails", "unresolved")


@dataclass(frozen=True)
class System:
    """The header of a page.

    Args:
        slug: name of the system.
        uses: dotted names inside smalti of what it is made of, such as "acceleration.taylorseer.TaylorSeer".
        models: models of the zoo that its claim runs on.
        data: prepared data sets that its claim runs on.
        name, summary, title, arxiv, home: as in the catalogue, which fills them in; given by a system outside of it.
    """

    slug: str
    uses: tuple[str, ...]
    models: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    name: str = ""
    summary: str = ""
    title: str = ""
    arxiv: str = ""
    home: str = ""


@dataclass(frozen=True)
class Check:
    """One further figure of a claim: what was measured, its rule, and whether it holds (None = reported only)."""

    name: str
    value: float | str
    rule: str = ""
    holds: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """What a claim found.

    Args:
        measured: what the numbers are.
        unit: of the numbers.
        ours: the system's number.
        comparators: the others', by name.
        rule: one rule with one direction, such as "ours < 0.7 * reuse".
        outcome: holds, fails, or unresolved: the interval includes the threshold.
        interval: 95 % interval of what the rule compares with 0.
        seeds: that were used.
        checks: the system's other figures.
        figures: anything else worth keeping, in json types.
        notes: what a reader must know, such as the model's preset.
        tried: what was done to make a failing claim hold.
        weaker: the paper's own threshold and why this rule is weaker; empty if it is not.
    """

    measured: str
    unit: str
    ours: float
    comparators: dict[str, float]
    rule: str
    outcome: Outcome
    interval: tuple[float, float] | None = None
    seeds: tuple[int, ...] = ()
    checks: tuple[Check, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    notes: str = ""
    tried: tuple[str, ...] = ()
    weaker: str = ""

    def __post_init__(self):
        if self.outcome not in OUTCOMES:
            raise ValueError(f"an outcome is one of {', '.join(OUTCOMES)}, got {self.outcome!r}")

    def as_json(self) -> dict[str, Any]:
        """In json types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The verdict of `as_json`; keys of later versions are left out."""
        known = {one.name: content[one.name] for one in fields(cls) if one.name in content}
        known["checks"] = tuple(Check(**check) for check in known.get("checks", ()))
        for name in ("seeds", "tried", "interval"):
            if known.get(name) is not None:
                known[name] = tuple(known[name])
        return cls(**known)
