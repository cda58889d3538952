"""The gradient of one step, over its parts and processes, and whether it can be used."""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from signal import SIGINT, SIGTERM
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smalti.core.protocols import Objective, TrainState
from smalti.core.seeds import derive_seed
from smalti.training.config import TrainConfig
from smalti.training.data_order import DataOrder, SampleSource
from smalti.training.interruption import Interruption
from smalti.training.sample_draws import Share, draw
from smalti.training.sharding import average, total_norm


@dataclass(frozen=True)
class Outcome:
    """One step's numbers, equal on all processes.

    Args:
        loss: mean over the global batch.
        norm: of the gradient before clipping.
        metrics: the objective's, of this process's last part.
        seconds: from data to gradient.
        signal: SIGTERM or SIGINT if one reached any process, else None.
        is_late: whether the time budget is spent.
    """

    loss: float
    norm: float
    metrics: Mapping[str, float | Tensor]
    seconds: float
    signal: int | None
    is_late: bool

    @property
    def is_finite(self) -> bool:
        """Whether the gradient may be used."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class TrainStep:
    """Computes gradients; updating is left to the trainer.

    Args:
        accelerator: knows device and processes.
        model: the prepared model.
        objective: what is learned.
        source: training samples.
        config: batch, seed, clip, precision, accumulate.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        objective: Objective,
        source: SampleSource,
        config: TrainConfig,
    ):
        self.accelerator, self.model, self.objective = accelerator, model, objective
        self.source, self.config = source, config
        self.order = DataOrder(source, config.batch, config.seed)
        self.share = Share(accelerator.process_index, accelerator.num_processes, config.accumulate)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __call__(self, step: int, ema: nn.Module, stop: Interruption) -> Outcome:
        """Leaves the clipped gradient of the global batch in the parameters."""
        started = time.perf_counter()
        config, device = self.config, self.accelerator.device
        seed_dropout(derive_seed(config.seed, "model", step, self.share.rank), device)
        loss, metrics = torch.zeros((), device=device), {}
        for part in range(config.accumulate):
            indices, positions = self.share.part(step, part, self.order)
            drawn = draw(self.source, indices, positions, config.seed, "train", device)
            is_last = part == config.accumulate - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                result = self.objective.loss(self.denoise, drawn.batch, TrainState(step, ema), drawn.generators)
                self.accelerator.backward(result.loss / config.accumulate)
            loss += result.loss.detach() / config.accumulate
            metrics = result.metrics
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if config.shard:
            average(gradients)
        outcome = self._agree(loss, total_norm(gradients), metrics, stop, started)
        if config.clip is not None and outcome.is_finite and outcome.norm > config.clip:
            torch._foreach_mul_(gradients, config.clip / outcome.norm)
        return outcome

    def denoise(self, *inputs: Any, **named: Any) -> Any:
        """The model under autocast, its result in float32; a denoiser's inputs are x, t and cond."""
        return autocast_call(self.model, self.config, *inputs, **named)

    def _agree(
        self, loss: Tensor, norm: Tensor, metrics: Mapping[str, float | Tensor], stop: Interruption, started: float
    ) -> Outcome:
        # All processes must skip and stop together, so what each of them saw is added up; the step's only transfer.
        numbers = torch.stack([loss, norm])
        if self.share.processes > 1:
            flags = [float(stop.signal == SIGTERM), float(stop.signal == SIGINT), float(stop.is_late)]
            numbers = torch.cat([numbers / self.share.processes, numbers.new_tensor(flags)])
            numbers = self.accelerator.reduce(numbers, reduction="sum")
            assert isinstance(numbers, Tensor)
            loss_, norm_, terminated, interrupted, late = numbers.tolist()
            signal = int(SIGTERM) if terminated else int(SIGINT) if interrupted else None
            is_late = bool(late)
        else:
            loss_, norm_ = numbers.tolist()
            signal, is_late = stop.signal, stop.is_late
        return Outcome(loss_, norm_, metrics, time.perf_counter() - started, signal, is_late)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seeds the global generators that layers such as dropout draw from; on the CPU `torch.manual_seed` takes 1 ms."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def autocast_call(model: nn.Module, config: TrainConfig, *inputs: Any, **named: Any) -> Any:
    """`model(*inputs, **named)` in the configured precision, its tensor or bundle of tensors in float32."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
        return model(*inputs, **named).to(torch.float32)
