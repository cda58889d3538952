"""What others offer for the same end, attached to the same model in the same process: diffusers' cache and cache-dit.

A peer is attached to a `twin` of the model, which shares its weights, so that the plain model runs beside it. Each is
told the schedule of full evaluations that ours has (`warmup` at the beginning, then one in `interval`), and the sites
that are read from the model's anatomy, so that none loses by a careless setting:

- diffusers' TaylorSeer cache keeps a series for every sublayer ("full") or for the last projection ("lite"). By its own
  rule the warm-up is followed by one forecast, a full evaluation, then one in `interval`: other places than ours, as
  many if the steps fit. Replayed, it follows our places.
- cache-dit keeps a series for the sum of all blocks but the first of a stack ("blocks"), by a fixed mask of steps.

Bytes held: those of every tensor storage that can be reached from a method's state after a run, each counted once,
without the model's weights and the tensors that the caller gave.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from smalti.core.errors import Refusal
from smalti.seams.anatomy import Anatomy, is_linear, read_anatomy

NOT_STATE = (nn.Module, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, logging.Logger)


class NotInstalled(Refusal):
    """The peer's package is missing."""


@dataclass(frozen=True)
class Schedule:
    """Which evaluations are full.

    Args:
        steps: of the run.
        warmup: full ones at the beginning.
        interval: after them one in so many is full.
    """

    steps: int
    warmup: int
    interval: int

    @property
    def mask(self) -> list[int]:
        """1 for a full evaluation, 0 for another, one a step."""
        later = [(step - self.warmup + 1) % self.interval == 0 for step in range(self.warmup, self.steps)]
        return [1] * min(self.warmup, self.steps) + [int(one) for one in later]


@dataclass(frozen=True)
class Attached:
    """A model that carries a method.

    Args:
        model: called in the model's place.
        run: the surroundings of one run, at whose beginning everything remembered is dropped.
        state: what holds the tensors that are remembered.
    """

    model: Callable[..., Any]
    run: Callable[[], AbstractContextManager[Any]]
    state: Callable[[], Any]


def twin(model: nn.Module) -> Any:
    """A copy of the tree of modules over the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def diffusers_taylorseer(
    model: nn.Module, schedule: Schedule, order: int = 1, is_lite: bool = False, is_replayed: bool = False
) -> Attached:
    """diffusers' TaylorSeer cache on every sublayer, or on the last projection alone.

    Args:
        model: a twin.
        schedule: warm-up and interval.
        order: highest derivative.
        is_lite: forecast the last projection and skip all blocks.
        is_replayed: full evaluations at the places of the schedule, not at those of diffusers' own rule.

    Raises:
        NotInstalled: this diffusers has no such cache, or another interface to it.
        Refusal: nothing of the model can be hooked.
    """
    try:
        from diffusers import TaylorSeerCacheConfig
        from diffusers.hooks import HookRegistry, apply_taylorseer_cache
        from diffusers.hooks.hooks import CacheContext, _set_cache_context
    except ImportError as error:
        raise NotInstalled(f"this diffusers has no TaylorSeer cache that is known here: {error}") from error
    anatomy = read_anatomy(model)
    cached, skipped = _lite_sites(anatomy) if is_lite else _sublayer_sites(anatomy)
    config = TaylorSeerCacheConfig(
        cache_interval=schedule.interval, disable_cache_before_step=schedule.warmup, max_order=order,
        taylor_factors_dtype=next(model.parameters()).dtype, cache_identifiers=_patterns(cached),
        skip_predict_identifiers=_patterns(skipped) or None,
    )  # fmt: skip
    apply_taylorseer_cache(model, config)
    registries: list[Any] = [one._diffusers_hook for one in model.modules() if hasattr(one, "_diffusers_hook")]
    hooks = [hook for registry in registries for hook in registry.hooks.values()]
    if len(hooks) != len(cached) + len(skipped):
        raise Refusal(f"{len(hooks)} modules of {type(model).__name__} were hooked, not {len(cached) + len(skipped)}")
    if is_replayed:
        for hook in hooks:
            hook._measure_should_compute = partial(_replay, hook, schedule.mask)

    def call(*args: Any, **kwargs: Any) -> Any:
        _set_cache_context(model, CacheContext("run"))  # what `cache_context` does, which not every model has
        try:
            return model(*args, **kwargs)
        finally:
            _set_cache_context(model, None)

    @contextmanager
    def run() -> Iterator[None]:
        HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
        yield

    return Attached(call, run, lambda: hooks)


def cache_dit_taylorseer(model: nn.Module, schedule: Schedule, order: int = 1) -> Attached:
    """cache-dit's cache with a fixed mask of steps, its TaylorSeer calibrator, and the first block always computed.

    Raises:
        NotInstalled: the package is missing.
    """
    try:
        import cache_dit
    except ImportError as error:
        raise NotInstalled("not installed (pip install 'smalti[peers]')") from error
    for name in [one for one in logging.root.manager.loggerDict if one.startswith(("CACHE_DIT", "cache_dit"))]:
        logging.getLogger(name).setLevel(logging.ERROR)
    cache_dit.enable_cache(
        model,
        cache_config=cache_dit.DBCacheConfig(
            num_inference_steps=schedule.steps, enable_separate_cfg=False, Fn_compute_blocks=1, Bn_compute_blocks=0,
            max_warmup_steps=schedule.warmup, steps_computation_mask=schedule.mask, steps_computation_policy="static",
        ),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order),
    )  # fmt: skip

    @contextmanager
    def run() -> Iterator[None]:
        cache_dit.refresh_context(model, num_inference_steps=schedule.steps)
        yield

    return Attached(model, run, lambda: model._context_manager)


class Watch:
    """Which evaluations of a model were full, and what it was last called with.

    Args:
        model: without anything attached; the first linear layer of its last block's attention tells full evaluations.
    """

    def __init__(self, model: nn.Module):
        self.full: list[int] = []
        self.inputs: Any = ()
        attention = read_anatomy(model).blocks[-1].attentions[0].module
        probe = next(one for one in attention.modules() if is_linear(one))
        self._hook = probe.register_forward_pre_hook(self._ran)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, seen."""

        def seen(*args: Any, **kwargs: Any) -> Any:
            self.full.append(0)
            self.inputs = (args, kwargs)
            return call(*args, **kwargs)

        return seen

    def end(self) -> None:
        """Later calls are not seen."""
        self._hook.remove()

    def _ran(self, *call: Any) -> None:
        self.full[-1] = 1


def held_bytes(state: Any, but: Any = ()) -> int:
    """Bytes of the tensor storages that can be reached from an object and not from `but`, each counted once."""
    foreign = _storages(but)
    return sum(size for place, size in _storages(state).items() if place not in foreign)


def _storages(state: Any) -> dict[int, int]:
    """Sizes of storages by address; items and attributes are followed, modules, classes and functions not entered."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    open_ends = [state]
    while open_ends:
        one = open_ends.pop()
        if id(one) in seen or isinstance(one, NOT_STATE):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, Mapping):
            open_ends += one.values()
        elif isinstance(one, (list, tuple, set, frozenset)):
            open_ends += one
        else:
            open_ends += getattr(one, "__dict__", {}).values()
    storages.pop(0, None)  # nothing was allocated
    return storages


def _replay(hook: Any, mask: list[int]) -> tuple[bool, Any]:
    """What a hook of diffusers asks before it computes: whether it should, and its state."""
    state = hook.state_manager.get_state()
    state.current_step += 1
    return bool(mask[state.current_step]), state


def _sublayer_sites(anatomy: Anatomy) -> tuple[list[str], list[str]]:
    """Names of the modules whose outputs are forecast, and of those that need not run then."""
    sublayers = [(block, one) for block in anatomy.blocks for one in block.sublayers]
    skipped = [feeder for _, one in sublayers for feeder in one.feeders]
    return [str(one.site) for _, one in sublayers], [str(one.site) for one in skipped]


def _lite_sites(anatomy: Anatomy) -> tuple[list[str], list[str]]:
    """The model's last projection, and all blocks."""
    last = [name for name, child in anatomy.model.named_children() if is_linear(child)][-1:]
    if not last:
        raise Refusal(f"{type(anatomy.model).__name__} has no projection of its own to forecast")
    return last, [str(block.site) for block in anatomy.blocks]


def _patterns(names: list[str]) -> list[str]:
    return [re.escape(name) for name in names]
