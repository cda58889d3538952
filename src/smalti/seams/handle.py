"""Methods on a model while they are there: places every call in its run, builds its frame, keeps the counts."""

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline

from smalti.core.errors import NeverEngaged, Refusal
from smalti.core.method import BlockMethod, Bundle, CoreMethod, Method, Moment, StepMethod, SublayerMethod
from smalti.core.tokens import TokensMethod
from smalti.seams.anatomy import Anatomy
from smalti.seams.attach import Undo, attach, check_attached
from smalti.seams.engine import Acting, MethodFrame
from smalti.seams.frame import Forward, switch_attention
from smalti.seams.layout import Layouts, read_layouts, shapes_of
from smalti.seams.report import MethodReport, Report
from smalti.seams.run import Run, Runs, condition_of, planned_steps, said, signature_of, time_of
from smalti.seams.wrapping import wrap, wrap_call

INSIDE = (BlockMethod, SublayerMethod, CoreMethod, TokensMethod)
"""Methods for which the modules of a model are wrapped."""
_carrying: "dict[int, Handle]" = {}
_lock = threading.RLock()


@dataclass
class _Attached:
    """One model: its anatomy, the signature of its forward, the arguments that were found to move with a run, and the
    layouts that were read, by shapes of the inputs."""

    anatomy: Anatomy
    signature: inspect.Signature
    moving: set[str] = field(default_factory=set)
    layouts: dict[Any, Layouts] = field(default_factory=dict)


@dataclass
class _Counts:
    """Sums over all threads."""

    events: Counter[tuple[int, str]] = field(default_factory=Counter)
    reached: set[tuple[int, str]] = field(default_factory=set)
    kept: Counter[int] = field(default_factory=Counter)
    calls: int = 0
    runs: int = 0


class Handle:
    """Methods on a model, made by `apply`; `remove()` or the end of a `with` block takes them off.

    `lane`, `branch` and `run` say what the calls of a model do not tell.
    """

    def __init__(
        self, target: Any, anatomies: list[Anatomy], methods: tuple[Method, ...], bundles: Sequence[Bundle] = ()
    ):
        self.methods, self._bundles = methods, bundles
        self._runs, self._counts = Runs(), _Counts()
        self._attached = [_Attached(anatomy, inspect.signature(anatomy.model.forward)) for anatomy in anatomies]
        self._reads_layouts = any(isinstance(method, (CoreMethod, BlockMethod, TokensMethod)) for method in methods)
        self._undo: list[Undo] = []
        self._claim_models()
        try:
            self._attach_all(target)
        except BaseException:
            self.remove(check=False)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.remove(check=kind is None)

    def remove(self, check: bool = True) -> None:
        """Takes all methods off; the model is bit for bit what it was. A second call does nothing.

        Raises:
            NeverEngaged: the model ran and a method changed nothing (not with `check` off).
        """
        with _lock:
            is_first = bool(self._undo)
            while self._undo:
                self._undo.pop()()
            for attached in self._attached:
                if _carrying.get(id(attached.anatomy.model)) is self:
                    del _carrying[id(attached.anatomy.model)]
        self._runs = Runs()
        if check and is_first and self._counts.calls:
            engaged = {index for (index, _), count in self._counts.events.items() if count}
            self._check_engaged(engaged, self._counts.calls)

    def report(self) -> Report:
        """What was hooked, how often it engaged, what it kept, and what was left off."""
        with _lock:
            methods = tuple(self._report(index, method) for index, method in enumerate(self.methods))
            names = ", ".join(type(one.anatomy.model).__name__ for one in self._attached)
            return Report(names, self._counts.calls, self._counts.runs, methods)

    def layouts(self) -> list[Layouts]:
        """The token layouts that were read so far, one for each model and shape; none if no method needs them."""
        return [one for attached in self._attached for one in attached.layouts.values()]

    @contextmanager
    def lane(self, name: str) -> Iterator[Self]:
        """Calls inside belong to a run of their own: an inversion, a reference pass, a replay."""
        with said(self._runs.here, lane=name):
            yield self

    @contextmanager
    def branch(self, name: str) -> Iterator[Self]:
        """Calls inside belong to this branch of guidance."""
        with said(self._runs.here, branch=name):
            yield self

    @contextmanager
    def run(self, steps: int | None = None) -> Iterator[Self]:
        """Calls inside are one run, which begins here; what methods remembered is dropped at its end."""
        here = self._runs.here
        here.runs.pop(here.lane, None)
        try:
            with said(here, steps=steps):
                yield self
        finally:
            here.runs.pop(here.lane, None)

    def _claim_models(self) -> None:
        with _lock:
            for attached in self._attached:
                model = attached.anatomy.model
                if id(model) in _carrying:
                    held = ", ".join(str(method) for method in _carrying[id(model)].methods)
                    raise Refusal(
                        f"this {type(model).__name__} already carries {held}; give all methods to one apply, "
                        "or remove() the first handle"
                    )
            _carrying.update({id(attached.anatomy.model): self for attached in self._attached})

    def _attach_all(self, target: Any) -> None:
        is_inside = any(isinstance(method, INSIDE) for method in self.methods)
        for index, attached in enumerate(self._attached):
            model = attached.anatomy.model
            if is_inside:
                self._undo += attach(attached.anatomy)
            if hasattr(model, "cache_context"):
                self._undo.append(wrap(model, "cache_context", self._named_branch))
            self._undo.append(wrap(model, "forward", partial(self._call, index)))
        if self._reads_layouts:
            switch_attention(True)
            self._undo.append(partial(switch_attention, False))
        if isinstance(target, DiffusionPipeline):
            self._undo.append(wrap_call(target, self._pipeline_call))

    def _call(self, index: int, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """One call of a model's forward."""
        attached = self._attached[index]
        name = type(attached.anatomy.model).__name__
        if torch.is_grad_enabled():
            refusing = [str(method) for method in self.methods if not method.supports_grad]
            if refusing:
                raise Refusal(f"{refusing[0]} takes no gradients; call {name} under torch.no_grad(), or take it off")
        arguments = attached.signature.bind(*args, **kwargs).arguments
        run, moment = self._place(index, arguments)
        if moment.evaluation == 0:
            for bundle in self._bundles:
                bundle.check_run(moment, shape_of(arguments.get(attached.anatomy.sample)))
        frame = MethodFrame(
            attached.anatomy.model, self._acting(run, index, moment.branch), moment,
            self._layouts(attached, forward, arguments), run.shapes, arguments.get(attached.anatomy.sample),
        )  # fmt: skip
        output = frame.run(forward, args, kwargs)
        with _lock:
            self._counts.calls += 1
            self._counts.events += frame.tally.notes
            self._counts.reached |= frame.tally.sites
            for (one, _), count in frame.tally.notes.items():
                run.notes[one] += count
            kept = Counter[int]()
            for (one, _, _), state in run.states.items():
                kept[one] += self.methods[one].kept(state)
            self._counts.kept |= kept
        return output

    def _place(self, index: int, arguments: Mapping[str, Any]) -> tuple[Run, Moment]:
        """The run that a call belongs to, and where in it."""
        anatomy, moving, here = self._attached[index].anatomy, self._attached[index].moving, self._runs.here
        if arguments.get(anatomy.time) is None:
            raise Refusal(f"{type(anatomy.model).__name__} was called without {anatomy.time}, by which steps are told")
        t = time_of(arguments[anatomy.time])
        condition = condition_of(arguments, anatomy.sample, anatomy.time)
        caller, signature = (index, here.branch), signature_of(arguments.get(anatomy.sample))
        run = here.runs.get(here.lane)
        branch = here.branch or (None if run is None else run.branch_of(condition, t, moving))
        if run is None or not run.fits(t, branch, caller, signature):
            replaced = check_attached(anatomy)
            if replaced is not None:
                raise Refusal(
                    f"{replaced} was replaced after the methods were applied; apply them after loading adapters"
                )
            run = here.begin()
            branch = here.branch
            with _lock:
                self._counts.runs += 1
        return run, run.advance(t, branch or run.add_branch(condition), caller, signature)

    def _acting(self, run: Run, index: int, branch: str) -> list[Acting]:
        acting = []
        for one, method in enumerate(self.methods):
            key = (one, index, branch)
            if key not in run.states:
                run.states[key] = method.init()
            acting.append(Acting(one, method, run.states[key]))
        return acting

    def _layouts(self, attached: _Attached, forward: Forward, arguments: Mapping[str, Any]) -> Layouts | None:
        """The token layouts at these inputs, read once a shape."""
        if not self._reads_layouts:
            return None
        key = shapes_of({name: value for name, value in arguments.items() if name != attached.anatomy.time})
        with _lock:
            if key not in attached.layouts:
                layouts = read_layouts(attached.anatomy, forward, arguments)
                self._check_cores(type(attached.anatomy.model).__name__, layouts)
                attached.layouts[key] = layouts
        return attached.layouts[key]

    def _check_cores(self, name: str, layouts: Layouts) -> None:
        cores = {".".join(key): (layouts.queries[key], layouts.keys[key]) for key in layouts.queries}
        for method in self.methods:
            if isinstance(method, CoreMethod):
                if not cores:
                    raise Refusal(
                        f"no attention of {name} calls scaled_dot_product_attention: it is linear, written out in "
                        "products, or another backend is set (set_attention_backend('native') sets it back)"
                    )
                method.check_cores(name, cores)

    def _pipeline_call(self, pipe: Any, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """One call of the pipeline is one run."""
        here = self._runs.here
        lane = here.lane
        here.runs.pop(lane, None)
        try:
            with said(here, steps=partial(planned_steps, pipe, kwargs.get("num_inference_steps"))):
                result = forward(*args, **kwargs)
            run = here.runs.get(lane)
            if run is not None:
                self._check_engaged({index for index, count in run.notes.items() if count}, run.evaluation + 1)
        finally:
            here.runs.pop(lane, None)
        return result

    @contextmanager
    def _named_branch(self, original: Callable, args: tuple, kwargs: dict) -> Iterator[Any]:
        """The pipeline's own `cache_context(name)` names the branch."""
        name = args[0] if args else kwargs["name"]
        with said(self._runs.here, branch=str(name)), original(*args, **kwargs) as inner:
            yield inner

    def _check_engaged(self, engaged: set[int], evaluations: int) -> None:
        for index, method in enumerate(self.methods):
            if index not in engaged and not method.is_neutral:
                raise NeverEngaged(f"{method} never engaged: {method.idle_reason(evaluations)}")

    def _report(self, index: int, method: Method) -> MethodReport:
        hooked = [str(site) for attached in self._attached for site in sites_of(method, attached.anatomy)]
        reached = {site for one, site in self._counts.reached if one == index}
        events = {event: count for (one, event), count in self._counts.events.items() if one == index}
        left_off = tuple(site for site in hooked if site not in reached) if self._counts.calls else ()
        return MethodReport(str(method), events, len(hooked), left_off, self._counts.kept[index])


def shape_of(sample: Any) -> tuple[int, ...]:
    """Of the noisy sample; of a list of them its length alone."""
    return tuple(sample.shape) if isinstance(sample, torch.Tensor) else (len(sample),) if sample else ()


def sites_of(method: Method, anatomy: Anatomy) -> list[Any]:
    """The sites of a model at which a method acts."""
    sites: list[Any] = []
    for block in anatomy.blocks:
        sites += [block.site] if isinstance(method, (BlockMethod, TokensMethod)) else []
        sites += [one.site for one in block.sublayers] if isinstance(method, SublayerMethod) else []
        sites += [one.site for one in block.attentions] if isinstance(method, CoreMethod) else []
    return list(dict.fromkeys(sites)) or (["the model"] if isinstance(method, StepMethod) else [])
