"""Losses that stop for good before a training ends, by a rule; the optimizer's state and everything else go on.

A helper that shows the way early on may hold a model back later. A rule looks at finished steps and, every so often, at
a figure of the step, averaged over all processes, so that they stop together. What it remembers stands in the
checkpoints: a resumed run neither starts a stopped loss again nor counts anew.

Source: HASTE (arXiv 2505.16792), section 4: one-shot termination at a fixed step, motivated by the angle between the
gradients of objective and alignment. The rules on that angle, a plateau and a collapse are ours.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from smalti.core.errors import UserError, unknown_name
from smalti.training.config import TrainConfig

ANGLE = "gradient cosine"
"""Name of the cosine between the gradients of objective and alignment among a step's figures."""


class Stoppable(Protocol):
    """A model in training that adds losses which can be stopped."""

    @property
    def loss_names(self) -> tuple[str, ...]: ...

    def stop(self, names: Sequence[str]) -> None: ...


class StopRule(ABC):
    """When some losses stop; a frozen dataclass of hyperparameters.

    Args:
        losses: names of those that it stops, all at once.
        every: steps between two looks at the figures.
    """

    losses: tuple[str, ...]
    every: int

    @property
    def figures(self) -> tuple[str, ...]:
        """The step's figures whose sum it looks at; none if it looks at the step alone."""
        return ()

    @abstractmethod
    def judge(self, memory: dict[str, Any], step: int, figure: float) -> bool:
        """Whether to stop now.

        Args:
            memory: what it knows, in json types; changed in place.
            step: finished steps.
            figure: the sum of its figures, 0 without any.
        """


@dataclass(frozen=True)
class StopAt(StopRule):
    """At a fixed step: the losses count while fewer than `step` steps are finished (tau in the paper)."""

    losses: tuple[str, ...]
    step: int
    every: int = 1

    def __post_init__(self):
        if self.step < 0:
            raise UserError(f"losses stop at step {self.step}; it must be at least 0")

    def judge(self, memory: dict[str, Any], step: int, figure: float) -> bool:
        return step >= self.step


@dataclass(frozen=True)
class StopOnConflict(StopRule):
    """When the losses' gradient turns against the objective's at the parameters of the tapped blocks.

    Args:
        losses: names.
        threshold: of the running mean of the cosine; -1 never stops, and logs the cosine alone.
        checks: so many looks in a row below it.
        every: steps between looks; each costs two backward passes down to the first tapped block.
        keep: share of the running mean that a look keeps, in [0, 1).
    """

    losses: tuple[str, ...]
    threshold: float = 0.0
    checks: int = 5
    every: int = 100
    keep: float = 0.8

    def __post_init__(self):
        _check(self)

    @property
    def figures(self) -> tuple[str, ...]:
        return (ANGLE,)

    def judge(self, memory: dict[str, Any], step: int, figure: float) -> bool:
        is_below = _running_mean(memory, figure, self.keep) < self.threshold
        memory["below"] = memory.get("below", 0) + 1 if is_below else 0
        return memory["below"] >= self.checks


@dataclass(frozen=True)
class StopOnPlateau(StopRule):
    """When the losses themselves no longer fall.

    Args:
        losses: names.
        least: fall of the running mean below its best that counts, in units of the loss.
        checks: so many looks in a row without one.
        every: steps between looks.
        keep: share of the running mean that a look keeps, in [0, 1).
    """

    losses: tuple[str, ...]
    least: float = 1e-3
    checks: int = 5
    every: int = 100
    keep: float = 0.8

    def __post_init__(self):
        _check(self)

    @property
    def figures(self) -> tuple[str, ...]:
        return self.losses

    def judge(self, memory: dict[str, Any], step: int, figure: float) -> bool:
        mean = _running_mean(memory, figure, self.keep)
        has_fallen = mean < memory.get("best", math.inf) - self.least
        memory["stale"] = 0 if has_fallen else memory.get("stale", 0) + 1
        memory["best"] = mean if has_fallen else memory["best"]
        return memory["stale"] >= self.checks


@dataclass(frozen=True)
class StopOnCollapse(StopRule):
    """When a figure has fallen to a small part of what it was at the first look, as features do that become all alike.

    Args:
        losses: names.
        figure: its name, such as "teacher deviation" of SRA.
        share: of its first value.
        every: steps between looks.
    """

    losses: tuple[str, ...]
    figure: str
    share: float = 0.1
    every: int = 50

    def __post_init__(self):
        if not 0 < self.share < 1 or self.every < 1:
            raise UserError(f"got {self}; share is above 0 and below 1, every at least 1")

    @property
    def figures(self) -> tuple[str, ...]:
        return (self.figure,)

    def judge(self, memory: dict[str, Any], step: int, figure: float) -> bool:
        return figure < self.share * memory.setdefault("first", figure)


class Stopping:
    """The rules of one training, at work.

    Args:
        rules: each has its own losses.
        model: that adds the losses.
        config: of the training.
        average: a tensor's mean over all processes.
        renew: called after losses have stopped.

    Raises:
        UserError: a rule names a loss that is not there, or cannot work in this training.
    """

    def __init__(
        self,
        rules: Sequence[StopRule],
        model: Any,
        config: TrainConfig,
        average: Callable[[Tensor], Tensor],
        renew: Callable[[], None],
    ):
        known = model.loss_names if rules else ()
        for rule in rules:
            for name in rule.losses:
                if name not in known:
                    raise unknown_name("loss that stops", name, known)
            if ANGLE in rule.figures and (config.shard or config.compile):
                raise UserError(
                    "the gradients' angle needs whole parameters and a graph that can be walked twice; stop at a step "
                    "or on a plateau, or leave shard and compile off"
                )
        self.rules, self.model, self.average, self.renew = tuple(rules), model, average, renew
        self.memory: list[dict[str, Any]] = [{} for _ in rules]
        self.angles = tuple(rule.every for rule in rules if ANGLE in rule.figures)

    def resume(self, step: int) -> None:
        """Stops, before the next step, what the memory says or the step asks for."""
        for rule, mine in zip(self.rules, self.memory):
            if "stopped" in mine:
                self._stop(rule)
            elif not rule.figures and rule.judge(mine, step, 0.0):
                self._end(rule, mine, step)

    def after(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Looks at a finished step; all processes do so together."""
        for rule, mine in zip(self.rules, self.memory):
            if "stopped" in mine or step % rule.every:
                continue
            figure = 0.0
            if rule.figures:
                found = [torch.as_tensor(metrics.get(name, math.nan), dtype=torch.float32) for name in rule.figures]
                figure = self.average(torch.stack(found).sum()).item()
            if math.isfinite(figure) and rule.judge(mine, step, figure):
                self._end(rule, mine, step)

    def _end(self, rule: StopRule, memory: dict[str, Any], step: int) -> None:
        memory["stopped"] = step
        self._stop(rule)

    def _stop(self, rule: StopRule) -> None:
        self.model.stop(rule.losses)
        self.renew()


def _running_mean(memory: dict[str, Any], figure: float, keep: float) -> float:
    memory["mean"] = keep * memory.get("mean", figure) + (1 - keep) * figure
    return memory["mean"]


def _check(rule: Any) -> None:
    if rule.checks < 1 or rule.every < 1 or not 0 <= rule.keep < 1:
        raise UserError(f"got {rule}; checks and every are at least 1, keep from 0 and below 1")
