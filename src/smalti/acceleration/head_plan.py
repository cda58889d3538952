"""A plan: which mode every head of every attention takes, and when; a json file.

A plan knows the class of the model and the grid of tokens that it was made for. Modes and widths hold on any grid: on
another one they are laid out anew, by the same shares, and a second search would be wise. Attentions that a plan does
not name take its `rest`, one mode after another over their heads.

Steps fall into groups, each with its own modes, since early steps need more than the mean over all; before the first
group attention is full.

Source: Sparse-vDiT (arXiv 2506.03065), section 4.2.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from smalti.core.errors import Refusal, UserError
from smalti.core.files import read_json, write_json
from smalti.core.method import Moment, Reading
from smalti.ops.head_patterns import MODES, Mode, Patterns, mode_density
from smalti.ops.token_order import Grid
from smalti.seams.schedule import is_early

KIND = "sparse-vdit plan"
WIDTHS = Patterns()
LETTERS = {"full": "F", "skip": "-", "diagonal": "d", "multi-diagonal": "m", "stripes": "s"}


@dataclass(frozen=True)
class SiteModes:
    """Heads of one attention.

    Args:
        site: its name.
        modes: of its heads.
        losses: of the modes as measured; empty = not measured.
        cells: of the stripes of each head on the plan's grid; empty = the lattice.
    """

    site: str
    modes: tuple[Mode, ...]
    losses: tuple[float, ...] = ()
    cells: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class StepGroup:
    """Modes from a step on.

    Args:
        start: share of the run at which the group begins, in [0, 1).
        sites: attentions that are named.
    """

    start: float
    sites: tuple[SiteModes, ...]

    @cached_property
    def by_name(self) -> dict[str, SiteModes]:
        """The attentions by name."""
        return {one.site: one for one in self.sites}


@dataclass(frozen=True)
class HeadPlan:
    """Modes of all heads.

    Args:
        groups: of steps, by their start; what lies before the first is full.
        rest: modes of the heads of attentions that no group names, over and over.
        patterns: widths of the modes.
        model: class name of the model; "" = any.
        grid: (F, H, W) of the image tokens that it was made on; None = any.
        eps: threshold of the search.

    Raises:
        UserError: an unknown mode, or groups out of order.
    """

    groups: tuple[StepGroup, ...] = ()
    rest: tuple[Mode, ...] = ("full",)
    patterns: Patterns = WIDTHS
    model: str = ""
    grid: Grid | None = None
    eps: float | None = None

    def __post_init__(self):
        named = {mode for group in self.groups for one in group.sites for mode in one.modes} | {*self.rest}
        starts = [group.start for group in self.groups]
        if not named <= set(MODES) or not self.rest:
            raise UserError(f"got the modes {sorted(named)}; a plan has some of {', '.join(MODES)}")
        if starts != sorted(set(starts)) or any(not 0 <= start < 1 for start in starts):
            raise UserError(f"got groups of steps that start at {starts}; give rising shares of the run from 0")

    @property
    def is_full(self) -> bool:
        """Whether no head is sparse."""
        sites = [one for group in self.groups for one in group.sites]
        return {mode for one in sites for mode in one.modes} | {*self.rest} == {"full"}

    def at(self, moment: Moment, site: str, heads: int) -> SiteModes:
        """The heads of one attention in one call.

        Raises:
            Refusal: the attention has another number of heads.
        """
        begun = [group for group in self.groups if not group.start or not is_early(moment, group.start)]
        if self.groups and not begun:
            return SiteModes(site, ("full",) * heads)
        found = begun[-1].by_name.get(site) if begun else None
        if found is None:
            return SiteModes(site, tuple(self.rest[head % len(self.rest)] for head in range(heads)))
        if len(found.modes) != heads:
            raise Refusal(f"the plan has {len(found.modes)} heads for {site}, the model {heads}; search a plan for it")
        return found

    def check(self, reading: Reading) -> None:
        """Raises `Refusal` if the plan was made for another model."""
        if self.model and self.model != reading.model:
            raise Refusal(f"the plan was made for {self.model}, not for {reading.model}; search one for this model")
        known = {str(site) for site in reading.sites}
        missing = [name for group in self.groups for name in group.by_name if name.split("#")[0] not in known]
        if missing:
            raise Refusal(f"the plan names {missing[0]}, which {reading.model} does not have; search a plan for it")

    def density(self, grid: Grid | None = None) -> float:
        """Mean share of image keys that the named heads attend to, groups weighted by their share of the run.

        Raises:
            UserError: no attention is named, or no grid given or known.
        """
        grid = grid or self.grid
        if grid is None or not self.groups:
            raise UserError("the density needs a plan that names attentions, and a grid (F, H, W)")
        cost = {mode: mode_density(mode, self.patterns, grid) for mode in MODES}
        total = self.groups[0].start
        for group, end in zip(self.groups, [*(one.start for one in self.groups[1:]), 1.0], strict=True):
            shares = [cost[mode] for one in group.sites for mode in one.modes]
            total += (end - group.start) * sum(shares) / len(shares)
        return total

    def table(self) -> str:
        """Attentions by heads as letters: F full, - skip, d diagonal, m multi-diagonal, s stripes."""
        rows = []
        for group in self.groups:
            rows += [f"from {group.start:.0%} of the steps"] if len(self.groups) > 1 else []
            width = max(len(one.site) for one in group.sites)
            rows += [f"{one.site:{width}}  {' '.join(LETTERS[mode] for mode in one.modes)}" for one in group.sites]
        return "\n".join(rows)

    def save(self, path: Path | str) -> None:
        """Writes json."""
        write_json(path, {"kind": KIND, **asdict(self)})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads what `save` wrote.

        Raises:
            UserError: it is no plan, or a torn one.
        """
        content = read_json(path)
        if not isinstance(content, dict) or content.pop("kind", None) != KIND:
            raise UserError(f"{path} is no plan of heads; give a file that HeadPlan.save wrote")
        try:
            groups = tuple(
                StepGroup(float(group["start"]), tuple(_site_modes(**one) for one in group["sites"]))
                for group in content["groups"]
            )
            grid = content["grid"]
            known = {
                "groups": groups,
                "rest": tuple(content["rest"]),
                "patterns": Patterns(**content["patterns"]),
                "grid": grid if grid is None else (int(grid[0]), int(grid[1]), int(grid[2])),
            }
            return cls(**{**content, **known})
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{path} does not describe a plan of heads: {error!r}; search it again") from error


def _site_modes(site: str, modes: Sequence[Mode], losses: Sequence[float] = (), cells: Any = ()) -> SiteModes:
    return SiteModes(site, tuple(modes), tuple(losses), tuple(tuple(one) for one in cells))


def agreement(one: HeadPlan, other: HeadPlan) -> float:
    """Share of heads for which two plans choose the same mode.

    Raises:
        UserError: they name other heads.
    """
    modes = [[(g.start, s.site, i, mode) for g in plan.groups for s in g.sites for i, mode in enumerate(s.modes)]
             for plan in (one, other)]  # fmt: skip
    if [entry[:3] for entry in modes[0]] != [entry[:3] for entry in modes[1]] or not modes[0]:
        raise UserError("the plans name other heads; search both on one model with the same groups of steps")
    return sum(mine == theirs for mine, theirs in zip(*modes, strict=True)) / len(modes[0])


def shuffled_plan(plan: HeadPlan, seed: int) -> HeadPlan:
    """The same modes, as many of each, dealt to the heads of each group of steps by chance: equal density."""
    rng, groups = random.Random(seed), []
    for group in plan.groups:
        deck: list[Mode] = [mode for one in group.sites for mode in one.modes]
        rng.shuffle(deck)
        sites = tuple(SiteModes(one.site, tuple(deck.pop() for _ in one.modes), cells=one.cells) for one in group.sites)
        groups.append(replace(group, sites=sites))
    return replace(plan, groups=tuple(groups))
