"""A plan: which methods make one pipeline faster at one setting, what that costs, and what it was measured on.

A plan holds for the model class, the number of steps, the scheduler and the size that it was made for, and refuses any
other; another version of smalti or torch is said in one warning. It is a json file: methods as the words that `--apply`
takes, and the measured figures.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from smalti import __version__
from smalti.core.errors import Refusal, UserError
from smalti.core.files import atomic_file, read_json, write_json
from smalti.core.method import Bundle, Method, Moment
from smalti.seams.apply import denoisers
from smalti.seams.find import make_method
from smalti.zoo.loader import settings_hash

FORMAT = 1


@dataclass(frozen=True)
class Plan(Bundle):
    """What a planner found.

    Args:
        model: names of the transformers' classes, joined by +.
        steps: that a user asks for.
        drawn: steps that are drawn: fewer, where that was the best.
        scheduler: class and hash of its settings.
        sample: shape of the model's sample without its batch; None where it is no tensor.
        way: all of it in words; where there is no method, how to draw instead.
        methods: words of `--apply`; none where a plain way was the best.
        target: what was asked for, such as {"speedup": 3.0}.
        is_met: whether it was reached on held-out prompts.
        measured: figures on held-out prompts.
        front: every way that no other beats in time and distance, with its figures.
        alternatives: plain ways of about the same time.
        notes: what a user should know.
        versions: of smalti and torch.
    """

    model: str
    steps: int
    drawn: int
    scheduler: str
    sample: tuple[int, ...] | None
    way: str
    methods: tuple[str, ...]
    target: Mapping[str, float]
    is_met: bool
    measured: Mapping[str, float]
    front: tuple[Mapping[str, Any], ...] = ()
    alternatives: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: {"smalti": __version__, "torch": torch.__version__})

    def methods_for(self, target: Any) -> tuple[Method, ...]:
        """The methods.

        Raises:
            Refusal: the target has another model or scheduler, or a plain way was the best.
        """
        _check("model", model_of(target), self.model)
        if hasattr(target, "scheduler"):
            _check("scheduler", scheduler_of(target), self.scheduler)
        if not self.methods:
            raise Refusal(f"this plan has no method to apply, a plain way was the best: draw with {self.way}")
        now = {"smalti": __version__, "torch": torch.__version__}
        if dict(self.versions) != now:
            warnings.warn(f"the plan is of {dict(self.versions)}, now it is {now}: times may differ", stacklevel=3)
        return tuple(make_method(words) for words in self.methods)

    def check_run(self, moment: Moment, sample: tuple[int, ...]) -> None:
        if moment.steps is not None:
            _check("steps", moment.steps, self.drawn)
        if self.sample is not None:
            _check("samples of shape", list(sample[1:]), list(self.sample))

    def save(self, path: Path | str) -> Path:
        """Writes the plan as json, whole or not at all."""
        with atomic_file(Path(path)) as temporary:
            write_json(temporary, {"format": FORMAT, **asdict(self)})
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> "Plan":
        """Reads a plan.

        Raises:
            UserError: it is no plan, or one of another format.
        """
        content = read_json(Path(path))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path} is no plan of this version of smalti; make one with smalti plan")
        names = {one.name for one in fields(cls)}
        if content.keys() != {"format", *names}:
            raise UserError(f"{path} is a damaged plan: {', '.join(sorted(names ^ (content.keys() - {'format'})))}")
        given = {name: content[name] for name in names}
        for name in ("methods", "front", "alternatives", "notes"):
            given[name] = tuple(given[name])
        return cls(**{**given, "sample": None if given["sample"] is None else tuple(given["sample"])})


def model_of(pipe: Any) -> str:
    """Names of the classes of a pipeline's transformers."""
    return "+".join(type(one).__name__ for one in denoisers(pipe))


def scheduler_of(pipe: Any) -> str:
    """Class of a pipeline's scheduler, with a hash of its settings; "none" for a bare model."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return "none"
    settings = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    return f"{type(scheduler).__name__} {settings_hash(settings)}"


def _check(name: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise Refusal(
            f"this plan was made for {name} {wanted}, and here it is {found}; use it as it was made, or make another "
            "with smalti plan"
        )
