"""What a training costs: FLOPs counted on a sample, device hours from the clock, and both of several stages.

A training step is linear in its samples, so one small batch tells the rest. Counted are matrix products and attention
of forward and backward, as everywhere in `flops`; the optimizer's own work is not.

Source: MicroDiT (arXiv 2407.15811), table 6, reports GPU hours and dollars of each stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from smalti.core.protocols import Batch, Objective, TrainState
from smalti.core.seeds import generators_for
from smalti.evaluation.flops import count_flops


@dataclass(frozen=True)
class TrainingCost:
    """The cost of a stage.

    Args:
        name: of the stage.
        steps: that were taken.
        samples: that were seen.
        flops: in all.
        hours: of one device, times the devices.
    """

    name: str
    steps: int
    samples: int
    flops: float
    hours: float

    @property
    def rate(self) -> float:
        """FLOP/s of one device; 0 where nothing was timed."""
        return self.flops / (3600 * self.hours) if self.hours else 0.0


def sample_flops(model: nn.Module, objective: Objective, batch: Batch) -> float:
    """FLOPs of forward and backward for one sample; weights and gradients are left as they were.

    Args:
        model: the denoiser.
        objective: what is learned.
        batch: a few samples on the model's device, which ids name.
    """
    before = [None if one.grad is None else one.grad.clone() for one in model.parameters()]

    def step() -> None:
        objective.loss(model, batch, TrainState(), generators_for(batch.ids.tolist())).loss.backward()

    total = count_flops(step).total
    for parameter, gradient in zip(model.parameters(), before):
        parameter.grad = gradient
    return total / len(batch.x0)


def cost_table(costs: Sequence[TrainingCost]) -> str:
    """One line a stage and one for all, in plain text."""
    whole = TrainingCost(
        "in all", *(sum(getattr(one, field) for one in costs) for field in ("steps", "samples", "flops", "hours"))
    )
    lines = [f"{'stage':<24}{'steps':>9}{'samples':>12}{'PFLOP':>12}{'hours':>10}{'GFLOP/s':>10}"]
    for one in (*costs, whole):
        lines.append(
            f"{one.name:<24}{one.steps:>9}{one.samples:>12}{one.flops / 1e15:>12.4g}{one.hours:>10.3g}"
            f"{one.rate / 1e9:>10.4g}"
        )
    return "\n".join(lines)
