"""A frozen model whose layers ask at every call for which tasks it is made, and without one do nothing.

Hooks act on the outputs of its layers, its label embedder and its patch embedder; weights and modules stay what they
are. What the tasks' parameters make of an output is up to the set that is served (`training.task_set`).

Source: Diffscaler (arXiv 2404.09976), section 3.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from smalti.core.errors import Refusal, UserError
from smalti.core.protocols import Cond
from smalti.nn.affiner import Form, has_channels
from smalti.nn.embeddings import LabelEmbedder

Method = Callable[[str, nn.Module], Form | None]
"""Gives each layer, by path and module, its form; None leaves the layer alone."""
TASK, SPATIAL = "task", "spatial"
"""Keys of `Cond.extra`: the index of each sample's task in the set (B,) long, and its condition (B, S, H, W)."""
PATCH_EMBEDDERS = ("x_embedder", "pos_embed", "patch_embed")


class Served(Protocol):
    """What the hooks want of a set of tasks; see `TaskSet`."""

    layers: nn.ModuleDict
    tables: nn.ParameterDict

    @property
    def names(self) -> list[str]: ...

    def has_own(self, index: Tensor) -> Tensor: ...

    def embed(self, label: Tensor | None, index: Tensor, out: Tensor) -> Tensor: ...

    def tokens(self, spatial: Tensor, index: Tensor) -> Tensor: ...


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
        thread: that asks, 0 in a compiled call.
        is_called, is_engaged: whether the model was called, and whether an adapted layer of it was.
    """

    tasks: Served
    names: frozenset[str]
    given: Tensor | None = None
    spatial: Tensor | None = None
    index: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))
    tokens: Tensor | None = None
    label: Tensor | None = None
    thread: int = 0
    is_called: bool = False
    is_engaged: bool = False


class Merged(NamedTuple):
    """A task whose scales and shifts stand in the weights of the base.

    Args:
        tasks: the set that it is in.
        task: its name.
        parts: by path of the layer, whether its scale and its shift are inside.
        kept: the weights as they were, by path and name of the parameter.
    """

    tasks: Served
    task: str
    parts: Mapping[str, tuple[bool, bool]]
    kept: Mapping[tuple[str, str], Tensor]


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
        if not torch.compiler.is_compiling():
            route.thread = threading.get_ident()
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
        if not torch.compiler.is_compiling() and route.thread not in (0, threading.get_ident()):
            raise Refusal("the model is serving tasks in another thread; give each thread a model of its own")
        route.is_called = True
        values = [*args, *kwargs.values()]
        cond = next((one for one in values if isinstance(one, Cond)), None)
        x = next(one for one in values if isinstance(one, Tensor))
        extra: Mapping[str, Tensor] = cond.extra if cond is not None else {}
        given = route.given if route.given is not None else extra.get(TASK)
        if given is None:
            if len(route.tasks.names) > 1:
                raise UserError(f"several tasks are loaded; give cond.extra[{TASK!r}] one index a sample, or a task")
            given = torch.zeros((), dtype=torch.long, device=x.device)
        route.index = _for_rows(given, len(x), "tasks") if given.ndim else given
        spatial = extra.get(SPATIAL, route.spatial)
        if spatial is not None:
            spatial = route.tasks.tokens(_for_rows(spatial, len(x), "conditions"), route.index)
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


def key_of(path: str) -> str:
    """A path as the name of a child: without dots, and never that of a method such as `values`."""
    return "/" + path.replace(".", "/")


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
