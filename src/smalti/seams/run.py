"""Which run, step, evaluation and branch a model call belongs to, inferred from the calls themselves.

A run is one walk along the times. Its first change of time gives its direction; a time that lies the other way, another
sample shape, dtype or device begins a new run, and so does a repeat of the very first time. Calls that repeat a time
with other conditioning are branches of guidance; with the same conditioning they are further evaluations of a
second-order solver. An argument that changes from one time to the next while the text stays is no conditioning but
moves with the run, such as the sound that is denoised beside a video. What cannot be inferred is said: a lane, a
branch, the beginning of a run.
"""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.core.errors import Refusal
from smalti.core.method import Moment

MAX_BRANCHES = 8
NOT_CONDITION = ("time", "sigma", "control", "return_dict", "kwargs", "residual", "ids", "rotary", "rope", "ofs")
"""Parts of the names of arguments that do not tell branches apart: some change at every step."""
STAYS = re.compile("encoder|text|caption|prompt|cap_feats|pooled|embed|label|class|ids|mask")
"""Parts of the names of arguments by which branches differ; such an argument never moves with a run."""


@dataclass
class Branch:
    """A conditioning that was seen: its values, and where its latest tensors lie."""

    name: str
    values: Mapping[str, Any]


@dataclass
class Run:
    """What is remembered of one run in one lane of one thread.

    Args:
        lane: name.
        steps: planned number of steps, if known.
        states: what methods remember, by method, model and branch.
        shapes: what modules returned when they last ran.
        branches: conditionings in order of appearance.
        signatures: of the sample, by model and said branch: two transformers of one pipeline may see different lengths.
        seen: branches that were called at the current evaluation.
        notes: events by method.
    """

    lane: str
    steps: int | None = None
    states: dict[tuple[int, int, str], Any] = field(default_factory=dict)
    shapes: dict[Any, Any] = field(default_factory=dict)
    branches: list[Branch] = field(default_factory=list)
    evaluation: int = -1
    step: int = -1
    t: float | None = None
    direction: int = 0
    signatures: dict[Any, tuple] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    notes: Counter[int] = field(default_factory=Counter)

    def fits(self, t: float, branch: str | None, caller: Any, signature: tuple) -> bool:
        """Whether a call may belong to this run, rather than begin another."""
        if self.t is None:
            return True
        if signature != self.signatures.get(caller, signature):
            return False
        if t == self.t:
            return self.step > 0 or branch not in self.seen
        return self.direction in (0, _sign(t - self.t))

    def advance(self, t: float, branch: str, caller: Any, signature: tuple) -> Moment:
        """Takes a call in and says where it stands."""
        if self.t is None or t != self.t:
            self.direction = self.direction or (0 if self.t is None else _sign(t - self.t))
            self.step, self.evaluation, self.seen = self.step + 1, self.evaluation + 1, set()
        elif branch in self.seen:
            self.evaluation, self.seen = self.evaluation + 1, set()
        self.t, self.signatures[caller] = t, signature
        self.seen.add(branch)
        return Moment(self.step, self.evaluation, t, self.steps, self.lane, branch)

    def branch_of(self, condition: Mapping[str, Any], t: float, moving: set[str]) -> str | None:
        """The branch with this conditioning; None if it is new.

        Args:
            condition: of the call.
            t: its time.
            moving: arguments of the model that move with the run; those that are found out now are added.
        """
        changed = [(branch, _changes(branch.values, condition) - moving) for branch in self.branches]
        found = next((branch for branch, names in changed if not names), None)
        if found is None and t != self.t:
            for branch, names in changed:
                if not any(STAYS.search(name) for name in names):
                    found = branch
                    moving |= names
                    break
        if found is None:
            return None
        found.values = condition
        return found.name

    def add_branch(self, condition: Mapping[str, Any]) -> str:
        """Names a new branch."""
        if len(self.branches) == MAX_BRANCHES:
            raise Refusal(
                f"the conditioning changed {MAX_BRANCHES} times within one run, so its branches cannot be told apart; "
                "name them: with handle.branch('cond'): ..."
            )
        self.branches.append(Branch(str(len(self.branches)), condition))
        return self.branches[-1].name


@dataclass
class ThreadRuns:
    """The runs of one thread by lane, and what was said about the next calls; `steps` may be a question for later."""

    runs: dict[str, Run] = field(default_factory=dict)
    lane: str = "main"
    branch: str | None = None
    steps: int | Callable[[], int | None] | None = None

    def begin(self) -> Run:
        """A new run in the current lane; only at its beginning does a pipeline know how many steps it takes."""
        self.runs[self.lane] = Run(self.lane, self.steps() if callable(self.steps) else self.steps)
        return self.runs[self.lane]


class Runs(threading.local):
    """The runs of every thread: two threads that draw with one model do not see each other's."""

    def __init__(self):
        self.here = ThreadRuns()


@contextmanager
def said(here: ThreadRuns, **words: Any) -> Iterator[None]:
    """Sets `lane`, `branch` or `steps` for the calls inside."""
    before = {name: getattr(here, name) for name in words}
    for name, value in words.items():
        setattr(here, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(here, name, value)


def planned_steps(pipe: Any, given: int | None) -> int | None:
    """How many times a diffusers pipeline is about to visit: from its scheduler once that is prepared, because starting
    from a picture takes fewer than were asked for and some solvers visit a time twice; else what was given."""
    count, times = getattr(pipe, "_num_timesteps", None), getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    if not isinstance(count, int) or not isinstance(times, Tensor) or not 0 < count <= len(times):
        return given
    return len(times[-count:].unique())


def time_of(value: Any) -> float:
    """A time argument as one number, in the model's units; of several times the noisiest is taken."""
    return float(value.max()) if isinstance(value, Tensor) else float(value)


def signature_of(sample: Any) -> tuple:
    """Shape, dtype and device of the sample, which may be a list of tensors."""
    if isinstance(sample, (list, tuple)):
        return tuple(signature_of(one) for one in sample)
    return (tuple(sample.shape), sample.dtype, sample.device) if isinstance(sample, Tensor) else ()


def condition_of(arguments: Mapping[str, Any], sample: str, time: str) -> dict[str, Any]:
    """What tells branches apart: arguments that are neither the sample nor change from step to step."""
    condition: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in (sample, time) or value is None or any(part in name for part in NOT_CONDITION):
            continue
        if is_dataclass(value) and not isinstance(value, type):
            inner = {one.name: getattr(value, one.name) for one in fields(value)}
            condition |= {f"{name}.{key}": one for key, one in condition_of(inner, sample, time).items()}
        else:
            condition[name] = value
    return condition


def _changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Names of the arguments in which two conditionings differ."""
    shared = one.keys() & other.keys()
    return (one.keys() ^ other.keys()) | {name for name in shared if not _is_same(one[name], other[name])}


def _is_same(one: Any, other: Any) -> bool:
    """Whether two conditionings agree; tensors are compared by identity first, because reading them waits for a GPU."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
            return False
        if one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.data_ptr() != 0:
            return True
        return torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_is_same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and not isinstance(one, Tensor) and one == other


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)
