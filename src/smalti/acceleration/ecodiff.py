"""EcoDiff: learns which parts of a diffusion transformer can go, by the picture at the end of the whole sampling run.

Every head, hidden neuron and modulation channel has a logit and a mask (see `ecodiff_masks`); the weights are frozen.
The masked model samples from the same noise, prompt, guidance and schedule as the original, and what is minimised is

    || z0 - z0_masked || + weight * (price of heads + of neurons + of channels),

z0 being the final latents. Gradients go back through all steps in the memory of one (`sampling.checkpointed`). Numbers
behind random masks are drawn once a run, so that the steps computed again are the same steps; `redraw` draws them anew
at every call, as the published code does. Then the units with the lowest logits are cut out.

Source: EcoDiff (arXiv 2412.02852), section 3.
"""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smalti.acceleration.ecodiff_masks import MASKS, PRICES
from smalti.acceleration.ecodiff_plan import MaskPlan, Scope, make_plan
from smalti.acceleration.ecodiff_runs import Originals, Runs, Starts, runs_of
from smalti.core.errors import UserError, unknown_name
from smalti.core.seeds import derive_seed
from smalti.sampling.checkpointed import sample_checkpointed
from smalti.sampling.conditions import Label
from smalti.sampling.guidance import bind
from smalti.sampling.pipeline import TextToImagePipeline
from smalti.seams.slicing import slice_units
from smalti.seams.units import KINDS, UnitGroup, masked, read_units

OBJECTIVES = ("final", "steps")


@dataclass(frozen=True)
class Learning:
    """How masks are learned.

    Args:
        updates: of the logits.
        batch: pictures at once; memory grows with it.
        accumulate: batches an update.
        rates: learning rate of the logits of each kind.
        start: every logit in the beginning; 3 makes masks of about 1.
        mask: hard-concrete, sigmoid or binary.
        price: squashed-l1, l0 or l2.
        weight: of the price.
        redraw: draw random numbers at every call of a layer instead of once a run; gradients are then not exact.
        objective: final, or steps: each step alone, from where the original stood (a comparator).
        seed: of the order of pictures and of the masks.
    """

    updates: int = 100
    batch: int = 4
    accumulate: int = 1
    rates: Mapping[str, float] = field(default_factory=lambda: {"heads": 0.5, "ffn": 0.1, "mod": 0.5})
    start: float = 3.0
    mask: str = "hard-concrete"
    price: str = "squashed-l1"
    weight: float = 0.01
    redraw: bool = False
    objective: Literal["final", "steps"] = "final"
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (("mask", MASKS), ("price", PRICES), ("objective", OBJECTIVES)):
            if getattr(self, name) not in allowed:
                raise unknown_name(name, getattr(self, name), allowed)
        if min(self.updates, self.batch, self.accumulate) < 1 or self.weight < 0:
            raise UserError(
                f"got updates={self.updates}, batch={self.batch}, accumulate={self.accumulate}, weight={self.weight}; "
                "give at least 1 of each and a weight from 0"
            )


def learn_masks(
    pipe: TextToImagePipeline,
    prompts: Sequence[str],
    ratio: float = 0.2,
    units: Sequence[str] = KINDS,
    steps: int = 8,
    *,
    style: Label | Sequence[Label] = None,
    guidance: float | None = None,
    select: str = "",
    scope: Scope = "local",
    learning: Learning = Learning(),
    seed: int = 0,
    progress: bool = True,
) -> MaskPlan:
    """Learns which units of a pipeline's transformer can go.

    Args:
        pipe: one of ours; for others make `Runs` and call `learn_logits` and `make_plan`.
        prompts: about 100; no pictures are needed.
        ratio: share of the units' parameters that goes.
        units: kinds of units: heads, ffn, mod.
        steps: of sampling while masks are learned.
        style: of the prompts, one or one each.
        guidance: None = the pipeline's default.
        select: regular expression that names of groups must contain.
        scope: local, the same share of every layer, or global.
        learning: how.
        seed: of the noise.
        progress: whether a bar may be shown.

    Raises:
        Refusal: the model has no such units, or the pipeline is not one of ours.

    Example:
        >>> plan = learn_masks(pipe, prompts, ratio=0.2)
        >>> pipe.transformer = prune(pipe.transformer, plan)
    """
    groups = read_units(pipe.transformer, units, select)
    runs = runs_of(pipe, prompts, steps, style=style, guidance=guidance, seed=seed)
    logits = learn_logits(pipe.transformer, groups, runs, learning, progress)
    return make_plan(pipe.transformer, groups, logits, ratio, scope)


def learn_logits(
    model: nn.Module, groups: Sequence[UnitGroup], runs: Runs, learning: Learning = Learning(), progress: bool = True
) -> dict[str, Tensor]:
    """The logits of all units (count,) after learning, by the name of their group.

    Args:
        model: whose units they are; its weights stay as they are.
        groups: of units.
        runs: by which the original and the masked model are compared.
        learning: how.
        progress: whether a bar may be shown.
    """
    device = runs.starts.noise.device
    logits = {
        group.name: torch.full((group.count,), learning.start, device=device, requires_grad=True) for group in groups
    }
    optimizer = torch.optim.AdamW(
        [{"params": [logits[group.name]], "lr": learning.rates[group.kind]} for group in groups]
    )
    originals = runs.originals(learning.batch)
    batches, current = _batches(len(runs), learning), _Masks(learning)
    frozen = [one for one in model.parameters() if one.requires_grad]
    bar = tqdm(range(learning.updates), desc="masks", file=sys.stderr, disable=not progress, delay=2)
    for one in frozen:
        one.requires_grad_(False)
    try:
        with masked(model, groups, current), torch.enable_grad():
            for update in bar:
                optimizer.zero_grad()
                for part in range(learning.accumulate):
                    rows = next(batches)
                    current.draw(logits, derive_seed(learning.seed, "masks", update, part))
                    loss = _backward(runs, runs.starts[rows], originals[rows], current, learning)
                    bar.set_postfix_str(f"distance {loss:.3f}")
                (learning.weight * _price(groups, logits, learning)).backward()
                optimizer.step()
    finally:
        for one in frozen:
            one.requires_grad_(True)
    return {name: one.detach() for name, one in logits.items()}


class _Masks(dict[str, Tensor]):
    """Masks by group: drawn once a run, or, with `redraw`, at every look-up from their logits."""

    def __init__(self, learning: Learning):
        super().__init__()
        self.learning, self.weights = learning, list[Tensor]()

    def draw(self, logits: Mapping[str, Tensor], seed: int) -> None:
        """Begins a run; `weights` are the tensors that gradients are wanted of."""
        self.generator = torch.Generator().manual_seed(seed)
        self.update(logits if self.learning.redraw else {name: self._mask(one) for name, one in logits.items()})
        self.weights = list(self.values())

    def __getitem__(self, name: str) -> Tensor:
        return self._mask(super().__getitem__(name)) if self.learning.redraw else super().__getitem__(name)

    def _mask(self, logits: Tensor) -> Tensor:
        uniform = torch.rand(logits.shape, generator=self.generator).to(logits.device)
        return MASKS[self.learning.mask](logits, uniform)


def _backward(runs: Runs, starts: Starts, originals: Originals, masks: _Masks, learning: Learning) -> float:
    """Adds the gradient of a batch's distance to its original to the logits; returns the distance."""
    share = 1 / learning.accumulate
    if learning.objective == "final":
        settings = runs.settings(starts)
        final = sample_checkpointed(runs.denoiser, starts.noise, runs.schedule, runs.solver, masks.weights, **settings)
        loss = _distance(final, originals.states[:, -1])
        (share * loss).backward()
        return float(loss.detach())
    bound = bind(runs.denoiser, starts.cond, starts.uncond, runs.guidance)
    gradients, total = [torch.zeros_like(one) for one in masks.weights], 0.0
    for step, (t, s) in enumerate(pairwise(runs.schedule)):
        loss = abs(s - t) * _distance(bound(originals.states[:, step], t), originals.velocities[:, step])
        found = torch.autograd.grad(loss, masks.weights)
        gradients = [old + share * new for old, new in zip(gradients, found, strict=True)]
        total += float(loss.detach())
    torch.autograd.backward(masks.weights, gradients)
    return total


def _distance(x: Tensor, target: Tensor) -> Tensor:
    """Mean L2 distance of samples."""
    return (x - target).flatten(1).norm(dim=1).mean()


def _price(groups: Sequence[UnitGroup], logits: Mapping[str, Tensor], learning: Learning) -> Tensor:
    """Prices of all layers, averaged over those of a kind; the kinds are summed."""
    total = torch.zeros(())
    for kind in dict.fromkeys(group.kind for group in groups):
        prices = [PRICES[learning.price](logits[group.name]) for group in groups if group.kind == kind]
        total = total.to(prices[0]) + torch.stack(prices).mean()
    return total


def _batches(count: int, learning: Learning) -> Iterator[Tensor]:
    """Rows of batches without end, every picture once before any comes again."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(derive_seed(learning.seed, "order", epoch))
        yield from torch.randperm(count, generator=generator).split(min(learning.batch, count))
        epoch += 1


def pruned(model: nn.Module, plan: MaskPlan) -> AbstractContextManager[None]:
    """Inside, the units that a plan lets go are masked by zeros; nothing is changed for good."""
    return masked(model, plan.groups, plan.masks)


def prune(model: nn.Module, plan: MaskPlan, in_place: bool = False) -> Any:
    """A model without the units that a plan lets go; ours is saved and loaded like any other.

    A model of diffusers' own is cut as well, but its configuration has no place for it: keep the plan beside the whole
    model, and cut after loading.

    Args:
        model: the transformer.
        plan: made for it.
        in_place: cut the model itself instead of a copy.

    Raises:
        Refusal: units cannot be cut out, with the reason.
    """
    small = model if in_place else copy.deepcopy(model)
    slice_units(small, plan.groups, plan.keep)
    return small
