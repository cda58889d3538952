"""The parameters of several tasks on one frozen model: what is trained, averaged and saved.

Those of K tasks are stacked. Copies of a set share the base, which is neither among its parameters nor ever copied.

A task may have labels of its own (a table with one row more, for "none"; with no label at all that row alone), and
take a picture as a condition, whose patches become tokens that are added to the image tokens behind the patch embedder.

Source: Diffscaler (arXiv 2404.09976), section 3. Letters: K tasks, N image tokens, D width, S channels of a condition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smalti.core.errors import Refusal, UserError, unknown_name
from smalti.core.protocols import Cond
from smalti.nn.affiner import Affiner, rows_of
from smalti.nn.patchify import patchify
from smalti.training.shared_base import PATCH_EMBEDDERS, Route, SharedBase, key_of


class Spatial(NamedTuple):
    """Form of a condition that is a picture: its channels, and how many of its pixels stand beside a token."""

    channels: int
    patch: int


@dataclass(frozen=True)
class Task:
    """What a task takes.

    Args:
        classes: its own labels, 0 for none at all; None keeps those of the base.
        spatial: form of its condition, or None.
    """

    classes: int | None = None
    spatial: Spatial | None = None


class TaskSet(nn.Module):
    """The parameters of K tasks on one base; a denoiser like the base itself.

    Args:
        base: what they share.
        tasks: by name, what each takes. New ones compute what the base does for no label.

    Raises:
        Refusal: a task wants labels or a condition, and the base has no place for them.
    """

    starts: Tensor
    sizes: Tensor

    def __init__(self, base: SharedBase, tasks: Mapping[str, Task]):
        super().__init__()
        self.base, self.tasks = base, dict(tasks)
        self.layers = nn.ModuleDict(
            {key_of(path): Affiner(layer, base.forms[path], len(tasks)) for path, layer in base.layers.items()}
        )
        self.tables, self.spatials = nn.ParameterDict(), nn.ModuleDict()
        for name, task in self.tasks.items():
            if task.classes is not None:
                self.tables[key_of(name)] = self._new_table(task.classes)
            if task.spatial is not None:
                self.spatials[key_of(name)] = self._new_spatial(task.spatial)
        sizes = [len(self.tables[key_of(n)]) if key_of(n) in self.tables else 0 for n in self.tasks]
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)
        self.register_buffer("starts", torch.tensor(sizes).cumsum(0) - torch.tensor(sizes), persistent=False)
        self.to(next(base.model.parameters()).device)

    @property
    def names(self) -> list[str]:
        """Of the tasks, in the order of their indices."""
        return list(self.tasks)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The base's velocity for the tasks in `cond.extra["task"]` (B,), which a set of one does not need."""
        return self.base.call(Route(self, frozenset(self.tasks)), x, t, cond)

    def index(self, task: str | Sequence[str]) -> Tensor:
        """Index of one task for the whole batch, of no dimension, or of each sample's (B,)."""
        names = [task] if isinstance(task, str) else list(task)
        for name in names:
            if name not in self.tasks:
                raise unknown_name("task", name, self.tasks)
        numbers = torch.tensor([self.names.index(name) for name in names], device=self.sizes.device)
        return numbers[0] if isinstance(task, str) else numbers

    def has_own(self, index: Tensor) -> Tensor:
        """Whether tasks have labels of their own."""
        return rows_of(self.sizes, index) > 0

    def embed(self, label: Tensor | None, index: Tensor, out: Tensor) -> Tensor:
        """Embedded labels (B, D): of the tasks' own tables, or what the base made (B, D) where a task has none.

        A label from the number of the task's classes on, or None, is "none".
        """
        last = rows_of(self.sizes, index) - 1
        row = last if label is None else torch.minimum(label, last)
        table = torch.cat(list(self.tables.values())).to(out.dtype)
        place = (rows_of(self.starts, index) + row).clamp(0, len(table) - 1)
        own = table.index_select(0, place.reshape(-1)).reshape(*place.shape, -1)
        return torch.where(self.has_own(index)[..., None], own, out)

    def tokens(self, spatial: Tensor, index: Tensor) -> Tensor:
        """What conditions (B, S, H, W) add to the image tokens, (B, N, D); nothing for tasks that take none.

        Raises:
            UserError: no task takes a condition of this form.
        """
        total = None
        for number, (name, task) in enumerate(self.tasks.items()):
            if task.spatial is None or task.spatial.channels != spatial.shape[1]:
                continue
            is_its = (index == number).expand(len(spatial))[:, None, None]
            made = self.spatials[key_of(name)](patchify(spatial, task.spatial.patch)) * is_its
            total = made if total is None else total + made
        if total is None:
            forms = {name: tuple(task.spatial) for name, task in self.tasks.items() if task.spatial}
            raise UserError(f"got a condition of {spatial.shape[1]} channels; tasks take (channels, patch): {forms}")
        return total

    def select(self, names: Sequence[str]) -> "TaskSet":
        """A set of some of the tasks, with copies of their parameters."""
        self.index(list(names))
        some = TaskSet(self.base, {name: self.tasks[name] for name in names})
        for name in names:
            some.load_task(name, self.task_state(name))
        return some

    def task_state(self, name: str) -> dict[str, Tensor]:
        """The parameters of one task by name; the same tensors, not copies."""
        row = int(self.index(name))
        state = {f"layers.{key}": value[row] for key, value in self.layers.named_parameters()}
        if key_of(name) in self.tables:
            state["label"] = self.tables[key_of(name)]
        if key_of(name) in self.spatials:
            state |= {f"spatial.{key}": value for key, value in self.spatials[key_of(name)].named_parameters()}
        return state

    @torch.no_grad()
    def load_task(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Puts the parameters of one task in their place.

        Raises:
            UserError: names or shapes are others.
        """
        own = self.task_state(name)
        unlike = sorted({*own} ^ {*state}) or [key for key in own if own[key].shape != state[key].shape]
        if unlike:
            raise UserError(
                f"these parameters do not fit the task {name!r} ({len(unlike)} differ, such as {unlike[0]}); they fit "
                "a bank of the same method on the same model"
            )
        for key, value in own.items():
            value.copy_(state[key])

    def count(self, name: str) -> int:
        """Parameters of one task."""
        return sum(value.numel() for value in self.task_state(name).values())

    def _new_table(self, classes: int) -> nn.Parameter:
        """One row a class and one for "none", all at what the base has for "none"."""
        labels = self.base.labels
        if labels is None:
            raise Refusal(
                f"this {type(self.base.model).__name__} has no label embedder of ours, so a task cannot have labels of "
                "its own; leave classes out"
            )
        none = labels.table.weight[labels.num_labels].detach().float()
        return nn.Parameter(none.expand(classes + 1, -1).clone())

    def _new_spatial(self, form: Spatial) -> nn.Module:
        if self.base.patches is None:
            raise Refusal(
                f"no patch embedder of this {type(self.base.model).__name__} is named {', '.join(PATCH_EMBEDDERS)}"
            )
        width = getattr(self.base.patches, "out_features", None) or getattr(self.base.patches, "embed_dim", None)
        width = width or self.base.patches.proj.out_channels  # type: ignore[union-attr]
        embedder = nn.Linear(form.channels * form.patch**2, width)
        nn.init.zeros_(embedder.weight)
        nn.init.zeros_(embedder.bias)
        return embedder
