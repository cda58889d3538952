"""A frozen model that serves several tasks, each by a few parameters of its own.

`SharedBase` holds the model: hooks on its layers ask at every call for which tasks it is made, and without one do
nothing. `TaskSet` holds the parameters of K tasks, stacked; it is what is trained, averaged and saved. Copies of a set
share the base, which is neither among its parameters nor ever copied.

A task may have labels of its own (a table with one row more, for "none"; with no label at all that row alone), and
take a picture as a condition, whose patches become tokens that are added to the image tokens behind the patch embedder.

Source: Diffscaler (arXiv 2404.09976), section 3. Letters: K tasks, N image tokens, D width, S channels of a condition.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from smalti.core.errors import Refusal, UserError, unknown_name
from smalti.core.protocols import Cond
from smalti.nn.affiner import Affiner, Form, has_channels, rows_of
from smalti.nn.embeddings import LabelEmbedder
from smalti.nn.patchify import patchify

Method = Callable[[str, nn.Module], Form | None]
"""Gives each layer, by path and module, its form; None leaves the layer alone."""
TASK, SPATIAL = "task", "spatial"
"""Keys of `Cond.extra`: the index of each sample's task in the set (B,) long, and its condition (B, S, H, W)."""
PATCH_EMBEDDERS = ("x_embedder", "pos_embed", "patch_embed")


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


@dataclass
class Route:
    """For whom a call is made.

    Args:
        tasks: their parameters.
        names: the tasks that are asked for.
        given: index of the batch's task, of no dimension, or of each sample's; repeated for further branches. None:
            `Cond.extra` says it.
        spatial: condition of the samples, or None.
        index: `given` for all rows of the call.
        tokens: what the condition adds to the image tokens.
        label: of the call, as it was given.
        is_called, is_engaged: whether the model was called, and whether an adapted layer of it was.
    """

    tasks: "TaskSet"
    names: frozenset[str]
    given: Tensor | None = None
    spatial: Tensor | None = None
    index: Tensor = field(default_factory=lambda: torch.tensor(0))
    tokens: Tensor | None = None
    label: Tensor | None = None
    is_called: bool = False
    is_engaged: bool = False


class SharedBase:
    """A frozen model and its hooks; a deep copy of it is the thing itself.

    Args:
        model: frozen in place.
        method: which layers are adapted, and how.

    Raises:
        Refusal: the method adapts no layer of the model, or the model has a bank already.
    """

    def __init__(self, model: nn.Module, method: Method):
        self.model, self.method = model, method
        in_labels = {id(child) for one in model.modules() if isinstance(one, LabelEmbedder) for child in one.children()}
        found = {path: (layer, method(path, layer)) for path, layer in model.named_modules()
                 if has_channels(layer) and id(layer) not in in_labels}  # fmt: skip
        self.forms = {path: form for path, (_, form) in found.items() if form is not None}
        self.layers = {path: found[path][0] for path in self.forms}
        if not self.forms:
            raise Refusal(f"the method adapts none of the {len(found)} layers of this {type(model).__name__}")
        if any(getattr(hook, "is_of_tasks", False) for hook in model._forward_pre_hooks.values()):
            raise Refusal(f"this {type(model).__name__} has a bank of tasks already; detach it first")
        self.route: Route | None = None
        self.merged: Merged | None = None
        self.learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        self.labels = next((one for one in model.modules() if isinstance(one, LabelEmbedder)), None)
        self.patches = next((getattr(model, name) for name in PATCH_EMBEDDERS if hasattr(model, name)), None)
        if any(one._compiled_call_impl is not None for one in model.modules()):
            torch.compiler.reset()  # what was compiled without hooks would go on without them
        self.handles = [model.register_forward_pre_hook(_marked(self._begin), with_kwargs=True)]
        self.handles += [layer.register_forward_hook(self._adapt(path)) for path, layer in self.layers.items()]
        if self.labels is not None:
            self.handles.append(self.labels.register_forward_pre_hook(self._keep_label))
            self.handles.append(self.labels.register_forward_hook(self._embed_label))
        if self.patches is not None:
            self.handles.append(self.patches.register_forward_hook(self._add_tokens))

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    def call(self, route: Route, *args: Any, **kwargs: Any) -> Any:
        """Calls the model for tasks.

        Raises:
            Refusal: as `enter`.
        """
        self.enter(route)
        try:
            return self.model(*args, **kwargs)
        finally:
            self.route = None

    def enter(self, route: Route) -> None:
        """Makes all calls from now on for these tasks, until `route` is None again.

        Raises:
            Refusal: another call for tasks is under way, in this thread or another, or another task is merged.
        """
        if self.route is not None:
            raise Refusal("the model is serving other tasks at this moment; end that call first")
        if self.merged is not None and (route.tasks is not self.merged.tasks or route.names != {self.merged.task}):
            self.refuse_merged()
        self.route = route

    def refuse_merged(self) -> None:
        """Raises `Refusal` if a task is merged."""
        if self.merged is not None:
            raise Refusal(f"the task {self.merged.task!r} is merged into the model; unmerge it first")

    def detach(self) -> None:
        """Takes all hooks off and lets the model's parameters learn again."""
        for handle in self.handles:
            handle.remove()
        for parameter in self.learned:
            parameter.requires_grad_(True)

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        route = self.route
        if route is None:
            return
        route.is_called = True
        values = [*args, *kwargs.values()]
        cond = next((one for one in values if isinstance(one, Cond)), None)
        rows = next(one.shape[0] for one in values if isinstance(one, Tensor))
        extra: Mapping[str, Tensor] = cond.extra if cond is not None else {}
        given = route.given if route.given is not None else extra.get(TASK)
        if given is None:
            if len(route.tasks.names) > 1:
                raise UserError(f"several tasks are loaded; give cond.extra[{TASK!r}] one index a sample, or a task")
            given = torch.tensor(0, device=values[0].device)
        route.index = _for_rows(given, rows, "tasks") if given.ndim else given
        spatial = extra.get(SPATIAL, route.spatial)
        if spatial is not None:
            spatial = route.tasks.tokens(_for_rows(spatial, rows, "conditions"), route.index)
        route.tokens = spatial

    def _adapt(self, path: str) -> Callable:
        key = key_of(path)

        def hook(layer: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            if self.route is None:
                return None
            self.route.is_engaged = True
            merged = (False, False) if self.merged is None else self.merged.parts[path]
            affiner: Any = self.route.tasks.layers[key]
            return affiner(args[0], out, getattr(layer, "bias", None), self.route.index, merged)

        return hook

    def _keep_label(self, module: nn.Module, args: tuple) -> tuple | None:
        """Labels of tasks with their own may lie beyond the base's table."""
        if self.route is None or not self.route.tasks.tables:
            return None
        assert self.labels is not None
        label = self.route.label = args[0]
        if label is None:
            return None
        own = self.route.tasks.has_own(self.route.index)
        return (torch.where(own, label.clamp(max=self.labels.num_labels), label), *args[1:])

    def _embed_label(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        if self.route is None or not self.route.tasks.tables:
            return None
        return self.route.tasks.embed(self.route.label, self.route.index, out)

    def _add_tokens(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
        if self.route is None or self.route.tokens is None:
            return None
        if self.route.tokens.shape != out.shape:
            raise UserError(
                f"the spatial condition makes tokens {tuple(self.route.tokens.shape)} beside {tuple(out.shape)} of the "
                "image; give it the size of the image in patches"
            )
        return out + self.route.tokens.to(out.dtype)


class Merged(NamedTuple):
    """A task whose scales and shifts stand in the weights of the base.

    Args:
        tasks: the set that it is in.
        task: its name.
        parts: by path of the layer, whether its scale and its shift are inside.
        kept: the weights as they were, by path and name of the parameter.
    """

    tasks: "TaskSet"
    task: str
    parts: Mapping[str, tuple[bool, bool]]
    kept: Mapping[tuple[str, str], Tensor]


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
        with torch.no_grad():
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
        row = self.names.index(name)
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


def key_of(path: str) -> str:
    """A path as the name of a child, which must not hold a dot."""
    return path.replace(".", "/")


def _for_rows(given: Tensor, rows: int, what: str) -> Tensor:
    """One entry a row, the same for each branch of guidance, which stand one after the other in a batch."""
    if rows % len(given):
        raise UserError(f"got {len(given)} {what} for {rows} rows; give one for each sample")
    return given if len(given) == rows else given.repeat(rows // len(given), *(1,) * (given.ndim - 1))


def _marked(begin: Callable) -> Callable:
    def hook(model: nn.Module, args: tuple, kwargs: dict) -> None:
        begin(model, args, kwargs)

    vars(hook)["is_of_tasks"] = True
    return hook
