"""How long, how fast and how carefully to train: one frozen, checked bundle of settings."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from smalti.core.errors import UserError, unknown_name
from smalti.core.seeds import check_seed

DECAYS = ("constant", "cosine", "linear-cooldown", "inverse-sqrt")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("no", "bf16")
OPERATIONAL = (
    "accumulate", "gradient_checkpointing", "compile", "shard", "save_every", "keep_last", "sample_every", "log_every",
    "eval_every", "eval_samples", "patience", "tracker", "minutes",
)  # fmt: skip
"""Fields that may change when a run is resumed: they do not name another training."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training.

    Args:
        steps: optimizer steps in all.
        batch: global batch: samples a step over all processes and accumulated parts.
        learning_rate: peak rate of AdamW.
        warmup: steps of linear warm-up.
        decay: constant; cosine to a tenth of the peak at the last step; linear-cooldown to zero over the last fifth;
            inverse-sqrt, `sqrt(warmup / step)` behind the warm-up (arXiv 1706.03762, section 5.3, eq. 3).
        optimizer: adamw, or muon (Muon on the matrices of the blocks, AdamW on everything else).
        muon_rate: peak rate of Muon, scaled so that its updates are as large as AdamW's; none takes `learning_rate`.
        weight_decay: decoupled decay of the matrices; norms, biases and embeddings have none.
        betas: moment decays of AdamW.
        clip: largest norm of the whole gradient; none does not clip.
        ema: decay of the averaged weights, which ramps up as (1 + n) / (10 + n); 0 averages nothing.
        accumulate: parts of a process's share of the batch that run one after the other.
        precision: no (float32) or bf16 (autocast; weights, EMA and loss stay float32).
        gradient_checkpointing: recompute activations in the backward pass.
        compile: compile the model's forward.
        shard: each process holds a part of weights, gradients and moments (FSDP2) in place of all of them (DDP).
        seed: of data order, noise, times and dropout.
        save_every: steps between checkpoints; the last step is always saved.
        keep_last: checkpoints that are kept.
        sample_every: steps between calls of `on_sample`; 0 never.
        log_every: steps between lines of the log.
        eval_every: steps between held-out losses of the averaged weights; 0 never.
        eval_samples: held-out samples that are used.
        patience: held-out losses in a row without a new best that end the training; 0 never. With it, the averaged
            weights of the best held-out loss are the result.
        tracker: none or tensorboard.
        minutes: wall-clock budget of one call of `fit`; it ends with a checkpoint. The rates follow the steps alone.
    """

    steps: int
    batch: int
    learning_rate: float = 1e-3
    warmup: int = 0
    decay: Literal["constant", "cosine", "linear-cooldown", "inverse-sqrt"] = "constant"
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_rate: float | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float | None = 1.0
    ema: float = 0.999
    accumulate: int = 1
    precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    seed: int = 0
    save_every: int = 1000
    keep_last: int = 2
    sample_every: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_samples: int = 256
    patience: int = 0
    tracker: Literal["tensorboard"] | None = None
    minutes: float | None = None

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "save_every", "keep_last", "log_every", "eval_samples"):
            self._check(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a whole number from 1"
            )
        for name in ("warmup", "sample_every", "eval_every", "patience"):
            self._check(
                name, isinstance(getattr(self, name), int) and getattr(self, name) >= 0, "a whole number from 0"
            )
        self._check("warmup", self.warmup <= self.steps, f"at most steps ({self.steps})")
        self._check("warmup", self.warmup > 0 or self.decay != "inverse-sqrt", "at least 1 where the decay counts it")
        self._check("patience", self.eval_every > 0 or not self.patience, "0 unless eval_every is above 0")
        self._check("learning_rate", 0 < self.learning_rate < math.inf, "above 0")
        for name in ("muon_rate", "clip", "minutes"):
            value = getattr(self, name)
            self._check(name, value is None or 0 < value < math.inf, "above 0, or none")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, "from 0")
        self._check(
            "betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers from 0, below 1"
        )
        self._check("ema", 0 <= self.ema < 1, "from 0 (off), below 1")
        self._check("batch", self.batch % self.accumulate == 0, f"a multiple of accumulate ({self.accumulate})")
        self._check("tracker", self.tracker in (None, "tensorboard"), "none or tensorboard")
        for name, allowed in (("decay", DECAYS), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise unknown_name(name, str(getattr(self, name)), allowed)
        if self.shard and self.optimizer == "muon":
            raise UserError("muon needs whole matrices, and shard cuts them; choose adamw, or leave shard off")
        if self.shard and self.compile:
            raise UserError("a model in pieces is not compiled; leave compile or shard off")
        check_seed(self.seed)

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")

    def identity(self) -> dict[str, Any]:
        """The fields that decide the weights after each step; a checkpoint with others belongs to another training.

        `steps` counts only where the rate depends on it, so that a run at constant rate, say, can be prolonged.
        """
        skipped = {*OPERATIONAL, *(("steps",) if self.decay in ("constant", "inverse-sqrt") else ())}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        return {**values, "betas": list(self.betas)}

    def rate(self, step: int) -> float:
        """The factor on the peak rates at this step, a pure function: warm-up times decay."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.decay == "constant":
            return warm
        if self.decay == "inverse-sqrt":
            return min(warm, math.sqrt(self.warmup / (step + 1)))
        if self.decay == "cosine":
            progress = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
            return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        cooldown = max(1, self.steps // 5)
        return warm * min(1.0, (self.steps - step) / cooldown)
