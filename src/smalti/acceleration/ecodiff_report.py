"""What cutting units out of a model saves: parameters, FLOPs, seconds and memory, and which layers lost most."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from smalti.acceleration.ecodiff_plan import MaskPlan
from smalti.evaluation.flops import count_flops
from smalti.evaluation.timing import Ratio, paired_ratio


@dataclass(frozen=True)
class PruningReport:
    """A cut model beside the whole one.

    Args:
        plan: by which it was cut.
        parameters: of the whole and of the cut model.
        flops: of one call of each.
        seconds: whole over cut.
        peak: weights and what a call needs beside them, in bytes; None without a GPU.
    """

    plan: MaskPlan
    parameters: tuple[int, int]
    flops: tuple[float, float]
    seconds: Ratio
    peak: tuple[int, int] | None

    def __str__(self) -> str:
        """One line a figure, then the layers."""
        lines = [
            f"parameters {self.parameters[0]:,} -> {self.parameters[1]:,} ({_less(*self.parameters)})",
            f"FLOPs      {self.flops[0]:.4g} -> {self.flops[1]:.4g} ({_less(*self.flops)})",
            f"seconds    {self.seconds.first:.4g} -> {self.seconds.second:.4g} (ratio {self.seconds.median:.2f})",
        ]
        if self.peak is not None:
            lines.append(f"memory     {self.peak[0]:,} -> {self.peak[1]:,} bytes ({_less(*self.peak)})")
        return "\n".join([*lines, self.plan.table()])


def pruning_report(
    whole: nn.Module, cut: nn.Module, plan: MaskPlan, call: Callable[[nn.Module], object], repeats: int = 5
) -> PruningReport:
    """Measures both models.

    Args:
        whole: the model as it was.
        cut: without the units that the plan lets go.
        plan: the plan.
        call: calls a model once, on inputs of the size that matters.
        repeats: timed pairs of calls.
    """
    with torch.no_grad():
        flops = tuple(count_flops(lambda model=model: call(model)).total for model in (whole, cut))
        seconds = paired_ratio(lambda: call(whole), lambda: call(cut), repeats, warmup=1)
        on_gpu = next(whole.parameters()).is_cuda
        peak = (_peak(whole, call), _peak(cut, call)) if on_gpu else None
    return PruningReport(plan, (_size(whole), _size(cut)), (flops[0], flops[1]), seconds, peak)


def _size(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


def _peak(model: nn.Module, call: Callable[[nn.Module], object]) -> int:
    """Its weights and what a call needs beside them; whatever else lies on the GPU does not count."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(model)
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    return torch.cuda.max_memory_allocated() - before + weights


def _less(before: float, after: float) -> str:
    return f"{1 - after / before:.1%} less"
