"""A bank of tasks on one frozen model: added and removed, chosen by call or by sample, merged, saved one file a task.

Switching changes an index, never a module, so what was compiled stays compiled; only adding or removing a task makes
the stacks of parameters anew. Without a task the model is what it was, bit for bit.

Source: Diffscaler (arXiv 2404.09976), section 3, for tasks side by side on one model.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.core.files import atomic_file
from smalti.nn.affiner import merged_weights
from smalti.training.optimizers import Factors
from smalti.training.shared_base import Merged, Method, Route, SharedBase, key_of
from smalti.training.task_set import Spatial, Task, TaskSet
from smalti.zoo.loader import weights_hash

UNDECAYED = ("scale", "shift", "strength")


class TaskBank:
    """All tasks of one model.

    Args:
        base: the model and its hooks.

    Example:
        >>> bank = TaskBank.wrap(DiT.tiny(), DiffScaler(rank=2))
        >>> bank.add("faces", classes=10)
        >>> trainer = Trainer(bank.train("faces"), FlowMatching(), source, config, out, factors=bank.factors())
        >>> report = trainer.fit()
        >>> bank.put(trainer.ema_model)
        >>> velocity = bank(x, t, cond, task="faces")  # or task=["faces", "birds", ...], one a sample
    """

    def __init__(self, base: SharedBase):
        self.base = base
        self.tasks = TaskSet(base, {}).requires_grad_(False)

    @classmethod
    def wrap(cls, model: nn.Module, method: Method) -> Self:
        """Freezes a model and hooks its layers.

        Args:
            model: any model of linear layers, convolutions, norms and embeddings.
            method: `DiffScaler(...)`, or one of `training.adapters`.
        """
        return cls(SharedBase(model, method))

    @property
    def model(self) -> nn.Module:
        """The frozen model."""
        return self.base.model

    @property
    def names(self) -> list[str]:
        """Of all tasks."""
        return self.tasks.names

    def add(self, name: str, classes: int | None = None, spatial: Spatial | None = None) -> str:
        """Adds a task that computes what the model does.

        Args:
            name: of the task.
            classes: its own labels; 0 = unconditional, one learned token; None keeps the labels of the model.
            spatial: form of the picture that it takes as a condition.
        """
        if name in self.tasks.tasks:
            raise UserError(f"the task {name!r} is in the bank already; remove it first, or choose another name")
        self._rebuild({**self.tasks.tasks, name: Task(classes, spatial)})
        return name

    def remove(self, name: str) -> None:
        """Forgets a task."""
        self.tasks.index(name)
        self._rebuild({key: task for key, task in self.tasks.tasks.items() if key != name})

    def __call__(self, *args: Any, task: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Calls the model for one task, or for each sample's own; for None as it was."""
        with self.using(task):
            return self.model(*args, **kwargs)

    @contextmanager
    def using(self, task: str | Sequence[str] | None, spatial: Tensor | None = None) -> Iterator[nn.Module]:
        """Makes all calls of the model for a task, so that a pipeline that has it draws for that task.

        Args:
            task: one for the whole batch, or one a sample; branches of guidance in one batch get the same.
            spatial: condition (B, S, H, W) of the samples, for models that take no `Cond`.

        Raises:
            NeverEngaged: the model was called, and no layer of it asked for its task.
        """
        if task is None:
            self.base.refuse_merged()
            yield self.model
            return
        device = next(self.model.parameters()).device
        if self.tasks.sizes.device != device:
            self.tasks.to(device)
        names = frozenset([task] if isinstance(task, str) else task)
        route = Route(self.tasks, names, self.tasks.index(task), spatial)
        self.base.enter(route)
        try:
            yield self.model
        finally:
            self.base.route = None
        if route.is_called and not route.is_engaged:
            raise NeverEngaged(f"no adapted layer of this {type(self.model).__name__} was called")

    def train(self, *names: str) -> TaskSet:
        """A set of tasks to be trained: a denoiser whose only parameters are theirs; `put` it back afterwards."""
        self.base.refuse_merged()
        return self.tasks.select(names or self.names).requires_grad_(True).train()

    def put(self, trained: nn.Module) -> None:
        """Takes over what a set of tasks, or its average, has learned."""
        assert isinstance(trained, TaskSet)
        self.base.refuse_merged()
        self.tasks.index(trained.names)
        for name in trained.names:
            self.tasks.load_task(name, trained.task_state(name))

    def factors(self) -> dict[str, Factors]:
        """For the trainer: scales, shifts, strengths and labels are not decayed, however many tasks are stacked."""
        names = [name for name, _ in self.tasks.named_parameters()]
        undecayed = [name for name in names if name.rpartition(".")[2] in UNDECAYED or name.startswith("tables.")]
        return {name: Factors(decay=0.0) for name in undecayed}

    def groups(self, tasks: TaskSet, rate: float, decay: float) -> list[dict[str, Any]]:
        """Parameter groups for any optimizer of torch, without decay where there must be none."""
        free = self.factors()
        named = list(tasks.named_parameters())
        return [
            {"params": [one for name, one in named if name not in free], "lr": rate, "weight_decay": decay},
            {"params": [one for name, one in named if name in free], "lr": rate, "weight_decay": 0.0},
        ]

    def share(self, name: str) -> float:
        """Parameters of a task over those of the model."""
        return self.tasks.count(name) / sum(one.numel() for one in self.model.parameters())

    def save(self, name: str, path: Path | str) -> Path:
        """Writes one task into a safetensors file, atomically."""
        state = {key: one.detach().cpu().contiguous().clone() for key, one in self.tasks.task_state(name).items()}
        task = self.tasks.tasks[name]
        card = {"name": name, "classes": task.classes, "spatial": task.spatial, "model": self._hash()}
        with atomic_file(path) as temporary:
            save_file(state, temporary, {"task": json.dumps(card)})
        return Path(path)

    def load(self, path: Path | str, name: str | None = None) -> str:
        """Adds a task from a file.

        Args:
            path: that `save` wrote.
            name: to give it; None = the one it had.

        Raises:
            UserError: the file is torn, or of another model or method; the bank stays as it was.
        """
        try:
            with safe_open(path, "pt") as file:
                card = json.loads((file.metadata() or {}).get("task", "null"))
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}; save the task anew") from error
        if not isinstance(card, dict) or card.get("model") != self._hash():
            raise UserError(f"{path} is a task of another model; load it into a bank of the model it was trained on")
        before = dict(self.tasks.tasks)
        spatial = None if card["spatial"] is None else Spatial(*card["spatial"])
        name = self.add(name or card["name"], card["classes"], spatial)
        try:
            self.tasks.load_task(name, state)
        except UserError:
            self._rebuild(before)
            raise
        return name

    @torch.no_grad()
    def merge(self, name: str) -> None:
        """Puts scales and shifts of a task into the model's weights; its branches stay beside them.

        Until `unmerge` the bank serves this task alone.

        Raises:
            Refusal: a task is merged already, or a weight is quantised; nothing was changed then.
        """
        self.base.refuse_merged()
        row = int(self.tasks.index(name))
        values: dict[tuple[str, str], Tensor] = {}
        parts = {}
        for path, layer in self.base.layers.items():
            affiner: Any = self.tasks.layers[key_of(path)]
            scale, shift = (None if one is None else one[row].float() for one in (affiner.scale, affiner.shift))
            found, parts[path] = merged_weights(layer, scale, shift)
            values |= {(path, key): one for key, one in found.items()}
        kept = {}
        for (path, key), value in values.items():
            parameter = getattr(self.base.layers[path], key)
            kept[path, key] = parameter.detach().clone()
            parameter.copy_(value)
        self.base.merged = Merged(self.tasks, name, parts, kept)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the model its weights back, bit for bit."""
        if self.base.merged is None:
            raise UserError("no task is merged")
        for (path, key), value in self.base.merged.kept.items():
            getattr(self.base.layers[path], key).copy_(value)
        self.base.merged = None

    def detach(self) -> nn.Module:
        """Takes the bank off the model, which is then what it was, and gives it back."""
        if self.base.merged is not None:
            self.unmerge()
        self.base.detach()
        return self.model

    def _rebuild(self, tasks: dict[str, Task]) -> None:
        if self.base.merged is not None or self.base.route is not None:
            raise Refusal("tasks come and go only while none is merged or being served")
        made = TaskSet(self.base, tasks).requires_grad_(False)
        for name in tasks:
            if name in self.tasks.tasks:
                made.load_task(name, self.tasks.task_state(name))
        self.tasks = made

    def _hash(self) -> str:
        self.base.refuse_merged()
        return weights_hash(self.model)
