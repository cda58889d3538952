"""One training loop for every denoiser and every objective, on one process or several.

Each step is a pure function of (weights, seed, step): data order, captions, noise, times and dropout follow from seeds
derived from them. So one process, several processes and accumulated parts walk the same curve at equal global batch,
and a run that was killed goes on from its last checkpoint as if nothing had happened.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn

from smalti.core.errors import UserError
from smalti.core.files import check_writable
from smalti.core.protocols import Objective, TrainState
from smalti.training import checkpoints
from smalti.training.alignment import AlignedModel, AlignedObjective, Alignment, denoiser_of
from smalti.training.config import TrainConfig
from smalti.training.data_order import SampleSource
from smalti.training.ema import EMA
from smalti.training.held_out import HeldOut
from smalti.training.interruption import Interruption
from smalti.training.messages import say
from smalti.training.optimizers import Factors, Optimizers
from smalti.training.processes import make_accelerator
from smalti.training.progress import Journal
from smalti.training.run_state import RunState, copy_weights, identity
from smalti.training.sharding import gather, put_away, shard
from smalti.training.stopping import Stopping, StopRule
from smalti.training.train_step import Outcome, TrainStep, autocast_call

BAD_STEPS = 10
"""So many skipped steps in a row end a training."""


@dataclass(frozen=True)
class TrainReport:
    """How a call of `fit` went.

    Args:
        steps: finished steps, those before a resume included.
        seconds: of this call.
        images_per_second: of this call, over its training steps.
        skipped_steps: steps skipped for a non-finite loss or gradient.
        loss: mean over the last logged interval; NaN if none was logged.
        held_out_loss: of the result: the last one, with patience the best; None if there was none.
        curve: the log, one json line a logged step.
        checkpoint: the last checkpoint.
        ended: steps or minutes, whichever was used up, or held-out: the patience with the held-out loss was.
    """

    steps: int
    seconds: float
    images_per_second: float
    skipped_steps: int
    loss: float
    held_out_loss: float | None
    curve: Path
    checkpoint: Path
    ended: str


class Trainer:
    """Trains a denoiser.

    Args:
        model: called as `model(xt, t, cond)`, returns the velocity; its weights are changed in place.
        objective: what is learned.
        source: training samples.
        config: how.
        out: folder of checkpoints, log and samples.
        held_out: samples for the held-out loss of the averaged weights.
        on_sample: called as `on_sample(averaged model, step, folder)` by the main process every `sample_every` steps.
        description: facts that identify the training (recipe, data hash), in json types; others are refused on resume.
        losses: alignment terms added to the objective; the averaged model and the held-out loss know nothing of them.
        stops: rules by which such losses end for good.
        factors: on rates and decays of parameters by name, such as muP's.

    Raises:
        UserError: the batch cannot be dealt out, the model cannot checkpoint gradients, the folder cannot be written.

    Example:
        >>> trainer = Trainer(model, FlowMatching(), source, TrainConfig(steps=1000, batch=64), Path("out"))
        >>> report = trainer.fit(resume=True)
        >>> trainer.ema_model.save_pretrained("out/model")
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        source: SampleSource,
        config: TrainConfig,
        out: Path | str,
        *,
        held_out: SampleSource | None = None,
        on_sample: Callable[[nn.Module, int, Path], None] | None = None,
        description: Mapping[str, Any] | None = None,
        losses: Sequence[Alignment] = (),
        stops: Sequence[StopRule] = (),
        factors: Mapping[str, Factors] | None = None,
    ):
        self.config, self.objective, self.out, self.on_sample = config, objective, Path(out), on_sample
        self.checkpoints = self.out / "checkpoints"
        self.accelerator = make_accelerator(config, self.out)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        terms = {"losses": {term.name: dict(term.settings) for term in losses}} if losses else {}
        terms |= {"stops": list(stops)} if stops else {}
        terms |= {"factors": {name: list(one) for name, one in factors.items()}} if factors else {}
        self.identity = identity(model, objective, config, {"samples": len(source), **terms, **(description or {})})
        if losses:
            model = AlignedModel(model, losses)
        self.stopping = Stopping(stops, model, config, self._average, self._compile_again)
        if isinstance(model, AlignedModel):
            objective = AlignedObjective(objective, model, self.stopping.angles)
        self.model = model.to(self.accelerator.device) if config.shard else self.accelerator.prepare_model(model)
        bare = self.accelerator.unwrap_model(self.model)
        ema = EMA(denoiser_of(bare), config.ema) if config.ema else None
        self._plain = self._cut(denoiser_of(bare), ema) if config.shard else None
        self.state = RunState(bare, ema, Optimizers(bare, config, factors), stops=self.stopping.memory)
        if config.compile:
            bare.compile()
        self.train_step = TrainStep(self.accelerator, self.model, objective, source, config)
        part = config.batch // (self.accelerator.num_processes * config.accumulate)
        self.held_out = None if held_out is None else HeldOut(held_out, config.eval_samples, part, config.seed)

    @property
    def ema_model(self) -> nn.Module:
        """The averaged model, or the trained one if nothing is averaged; of one in pieces a copy, as `fit` left it."""
        return self.state.averaged if self._plain is None else self._plain

    def fit(self, resume: bool = False) -> TrainReport:
        """Trains until the steps, the minutes or the patience with the held-out loss are used up.

        With patience, `ema_model` has the weights of the best held-out loss afterwards; the checkpoints do not change.

        Args:
            resume: go on from the newest whole checkpoint in the folder; without one, start.

        Raises:
            UserError: the folder holds another training or cannot be written; ten steps in a row were not finite.
            SystemExit: SIGTERM (status 143) or SIGINT (130) arrived; a checkpoint was saved first.
        """
        self._open(resume)
        started, first = time.monotonic(), self.state.step
        journal = Journal(self.accelerator, self.config, self.out, first)
        is_late = False
        self.model.train()
        try:
            with Interruption(self.config.minutes) as stop:
                while not (is_late or self._is_over()):
                    outcome = self._advance(stop, journal)
                    is_late = outcome.is_late
                    self._save_if_due(outcome)
                    if outcome.signal is not None:
                        self._leave(outcome.signal)
                if stop.signal is not None:  # came too late for the last step
                    self._leave(stop.signal)
        finally:
            journal.close()
            if isinstance(self.state.model, AlignedModel):
                self.state.model.close()
        is_best = self.config.patience > 0 and self.state.best < math.inf
        if is_best:
            copy_weights(self.state.best_weights, self.state.averaged)
        if self._plain is not None:
            gather(self.state.averaged, self._plain)
        self.accelerator.wait_for_everyone()
        images = (self.state.step - first) * self.config.batch
        return TrainReport(
            steps=self.state.step,
            seconds=time.monotonic() - started,
            images_per_second=images / journal.busy if journal.busy else 0.0,
            skipped_steps=self.state.skipped,
            loss=journal.loss,
            held_out_loss=self.state.best if is_best else journal.held_out_loss,
            curve=self.out / "log.jsonl",
            checkpoint=self._path(),
            ended=self._reason(),
        )

    def _is_impatient(self) -> bool:
        return 0 < self.config.patience <= self.state.stale

    def _is_over(self) -> bool:
        return self.state.step == self.config.steps or self._is_impatient()

    def _reason(self) -> str:
        if self._is_impatient():
            return "held-out"
        return "steps" if self._is_over() else "minutes"

    def _open(self, resume: bool) -> None:
        """Prepares the folder on the main process, and restores the same checkpoint on all."""
        found = torch.zeros(1, dtype=torch.int64, device=self.accelerator.device)
        if self.accelerator.is_main_process:
            check_writable(self.checkpoints)
            checkpoints.clear_leftovers(self.checkpoints)
            present = checkpoints.steps(self.checkpoints)
            if present and not resume:
                raise UserError(
                    f"{self.out} already holds checkpoints (up to {present[-1].name}); resume, or choose another folder"
                )
            path = checkpoints.latest(self.checkpoints)
            found += 0 if path is None else checkpoints.step_of(path)
        self.state.step = int(broadcast(found).item())  # type: ignore[union-attr]
        if self.state.step:
            self.state.restore(checkpoints.load(self._path()), self.identity)
            if self.state.step > self.config.steps:
                raise UserError(f"{self._path()} is beyond steps {self.config.steps}; ask for more steps")
        self.stopping.resume(self.state.step)

    def _advance(self, stop: Interruption, journal: Journal) -> Outcome:
        """One step: gradient, update, average, and what is due after it."""
        state, started = self.state, time.perf_counter()
        outcome = self.train_step(state.step, state.averaged, stop)
        if outcome.is_finite:
            state.optimizers.step(state.step)
            if state.ema is not None:
                state.ema.update()
            state.streak = 0
        else:
            state.skipped, state.streak = state.skipped + 1, state.streak + 1
        state.optimizers.zero_grad()
        rate = self.config.learning_rate * self.config.rate(state.step)
        state.step += 1
        self.stopping.after(state.step, outcome.metrics)
        journal.note(state.step, outcome, time.perf_counter() - started, rate, state.skipped)
        if state.streak == BAD_STEPS:
            raise UserError(self._divergence())
        is_end = outcome.is_late or state.step == self.config.steps
        if self.held_out is not None and is_due(state.step, self.config.eval_every, is_end):
            loss = self._held_out_loss()
            journal.note_held_out(state.step, loss)
            # One that is taken only because a run ends here would make a resumed or prolonged run end elsewhere.
            if self.config.patience and state.step % self.config.eval_every == 0:
                state.judge(loss)
        if self.on_sample is not None and is_due(state.step, self.config.sample_every, is_end):
            self._sample()
        return outcome

    def _save_if_due(self, outcome: Outcome) -> None:
        # In a streak of skipped steps the weights may be broken already: the last good checkpoint is not pushed out.
        is_end = outcome.signal is not None or outcome.is_late or self._is_over()
        if not is_end and (self.state.step % self.config.save_every or self.state.streak):
            return
        snapshot = self.state.capture(self.identity, self.state.step * self.config.batch)
        if self.accelerator.is_main_process:
            checkpoints.save(self.checkpoints, snapshot, self.config.keep_last)

    def _leave(self, signal: int) -> None:
        """Ends the process as its signal would have, after the checkpoint was saved."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            say(f"signal {signal} after step {self.state.step}: saved {self._path()}; resume goes on from there")
        raise SystemExit(128 + signal)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        assert self.held_out is not None

        def denoise(*inputs: Any, **named: Any) -> Any:
            return autocast_call(averaged, self.config, *inputs, **named)

        averaged = self.state.averaged.eval()
        accelerator = self.accelerator
        state = TrainState(self.state.step, averaged)
        rank, processes = accelerator.process_index, accelerator.num_processes
        total = self.held_out.loss(self.objective, denoise, state, accelerator.device, rank, processes)
        put_away(averaged)
        loss, count = accelerator.reduce(total, reduction="sum").tolist()  # type: ignore[union-attr]
        self.model.train()  # without an average, it was the model itself that was evaluated
        return loss / count

    @torch.no_grad()
    def _sample(self) -> None:
        assert self.on_sample is not None
        if self._plain is not None:
            gather(self.state.averaged, self._plain)
        if self.accelerator.is_main_process:
            self.ema_model.eval()
            self.on_sample(self.ema_model, self.state.step, check_writable(self.out / "samples"))
            self.model.train()

    def _cut(self, denoiser: nn.Module, ema: EMA | None) -> nn.Module:
        """Cuts the denoiser and its average into pieces; a plain copy of it is what is drawn with and handed out."""
        plain = copy.deepcopy(denoiser).eval().requires_grad_(False)
        for model in (denoiser, *([] if ema is None else [ema.model])):
            shard(model)
        return plain

    def _average(self, figure: torch.Tensor) -> torch.Tensor:
        """The mean over all processes."""
        return self.accelerator.reduce(figure.to(self.accelerator.device), reduction="mean")  # type: ignore[return-value]

    def _compile_again(self) -> None:
        """Compiles a model that has changed: hooks that came off are in no graph any more."""
        if self.config.compile:
            torch.compiler.reset()
            self.state.model.compile()

    def _path(self) -> Path:
        return self.checkpoints / f"step-{self.state.step:08d}"

    def _divergence(self) -> str:
        kept = checkpoints.steps(self.checkpoints)
        good = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet"
        return (
            f"{BAD_STEPS} steps in a row gave a non-finite loss or gradient (up to step {self.state.step}); {good}; "
            f"check the data, or train into a new folder with a lower learning_rate (now {self.config.learning_rate:g})"
        )


def is_due(step: int, every: int, is_end: bool) -> bool:
    """Whether something that happens every so many steps (0: never) and at the end happens now."""
    return every > 0 and (is_end or step % every == 0)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Switches it on; raises `UserError` if the model has none."""
    switch = getattr(model, "enable_gradient_checkpointing", None)
    try:
        if switch is None:
            raise ValueError("it has no enable_gradient_checkpointing")
        switch()
    except ValueError as error:
        raise UserError(
            f"{type(model).__name__} cannot checkpoint gradients ({error}); leave gradient_checkpointing off"
        ) from error
