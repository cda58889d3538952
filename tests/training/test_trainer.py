import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from toy_training import ToyDenoiser, ToySource

from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.objectives.flow_matching import FlowMatching
from smalti.training import checkpoints
from smalti.training.config import TrainConfig
from smalti.training.progress import read_log
from smalti.training.trainer import Trainer


def make(out, source=None, model=None, objective=None, **settings):
    """A trainer of equally initialised toys; settings go to the trainer, the model or the config by their name."""
    extra = {key: settings.pop(key) for key in ("held_out", "on_sample", "description") if key in settings}
    shape = {key: settings.pop(key) for key in ("width", "dropout") if key in settings}
    torch.manual_seed(0)
    model = (model or ToyDenoiser)(**shape)
    source = ToySource() if source is None else source
    config = TrainConfig(**{"steps": 20, "batch": 16, "log_every": 1, **settings})
    return Trainer(model, objective or FlowMatching(), source, config, out, **extra)


def losses(path):
    return [line["loss"] for line in read_log(path) if "loss" in line]


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_toy_learns_and_its_held_out_loss_falls(tmp_path, optimizer):
    trainer = make(
        tmp_path, steps=150, optimizer=optimizer, learning_rate=3e-3, ema=0.95, eval_every=50, held_out=ToySource(40)
    )
    report = trainer.fit()
    curve, held_out = losses(report.curve), [r["held_out_loss"] for r in read_log(report.curve) if "held_out_loss" in r]
    assert (report.steps, report.ended, report.skipped_steps) == (150, "steps", 0)
    assert sum(curve[-20:]) < 0.4 * sum(curve[:20])
    assert held_out == sorted(held_out, reverse=True)
    assert report.held_out_loss == pytest.approx(held_out[-1])
    assert report.held_out_loss < 0.5
    assert report.images_per_second > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_parts_walk_the_same_curve(tmp_path, optimizer):
    one = make(tmp_path / "one", steps=50, optimizer=optimizer).fit()
    parts = make(tmp_path / "parts", steps=50, optimizer=optimizer, accumulate=4).fit()
    assert max(abs(a - b) for a, b in zip(losses(one.curve), losses(parts.curve))) < 1e-4
    norms = [[line["norm"] for line in read_log(report.curve)] for report in (one, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)  # AdamW and clipping would hide a gradient of another size
    other = make(tmp_path / "other", steps=50, optimizer=optimizer, seed=1).fit()
    assert max(abs(a - b) for a, b in zip(losses(one.curve), losses(other.curve))) > 0.1


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "muon", "ema": 0.0}, {"dropout": 0.3, "decay": "cosine", "warmup": 3}]
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, settings):
    source = ToySource(groups=[torch.arange(0, 50), torch.arange(50, 64)])
    whole = make(tmp_path / "whole", source, save_every=6, **settings)
    whole.fit()
    make(tmp_path / "cut", source, save_every=6, **settings).fit()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000020")  # as if killed between steps 18 and 20
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write('{"step": 21, "lo')
    resumed = make(tmp_path / "cut", source, save_every=6, **settings)
    report = resumed.fit(resume=True)
    assert same_weights(whole.state.model, resumed.state.model)
    assert same_weights(whole.ema_model, resumed.ema_model)
    assert losses(report.curve) == losses(tmp_path / "whole" / "log.jsonl")
    for file in (tmp_path / "whole" / "checkpoints" / "step-00000020").glob("*.safetensors"):
        if file.stem != "random":  # global generators, which tests before this one have used
            assert file.read_bytes() == (report.checkpoint / file.name).read_bytes()


def test_a_run_at_constant_rate_can_be_prolonged(tmp_path):
    long = make(tmp_path / "long", steps=20)
    long.fit()
    make(tmp_path / "short", steps=12).fit()
    prolonged = make(tmp_path / "short", steps=20)
    assert prolonged.fit(resume=True).steps == 20
    assert same_weights(long.state.model, prolonged.state.model)
    with pytest.raises(UserError, match="more steps"):
        make(tmp_path / "short", steps=15).fit(resume=True)


def test_a_folder_with_checkpoints_is_not_written_over(tmp_path):
    make(tmp_path, steps=3).fit()
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds checkpoints"):
        make(tmp_path, steps=3).fit()
    assert (tmp_path / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1e-5}, "learning_rate"),
        ({"width": 16}, "width"),
        ({"source": ToySource(63)}, "samples"),
        ({"objective": FlowMatching(shift=2.0)}, "shift"),
        ({"description": {"recipe": "other"}}, "recipe"),
    ],
)
def test_a_foreign_checkpoint_is_refused(tmp_path, change, named):
    make(tmp_path, steps=2).fit()
    with pytest.raises(UserError, match=named):
        make(tmp_path, **{"steps": 3, **change}).fit(resume=True)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    source = ToySource(broken=(3,))  # one step in four, for 64 samples in batches of 16
    trainer = make(tmp_path, source, steps=40, save_every=1000)
    report = trainer.fit()
    lines = read_log(report.curve)
    assert report.skipped_steps == 10 == lines[-1]["skipped"]
    assert sum("loss" not in line for line in lines) == 10
    assert all(torch.isfinite(p).all() for p in (*trainer.state.model.parameters(), *trainer.ema_model.parameters()))
    assert losses(report.curve)[-1] < losses(report.curve)[0]


def test_ten_skipped_steps_in_a_row_stop_and_keep_the_good_checkpoint(tmp_path):
    class Spoiled(ToySource):
        served = 0

        def batch(self, indices, generators):
            self.served += 1
            batch = super().batch(indices, generators)
            return replace(batch, x0=batch.x0 * math.nan) if self.served > 6 else batch

    trainer = make(tmp_path, Spoiled(), steps=100, save_every=2, keep_last=1)
    with pytest.raises(UserError, match=r"10 steps in a row .*step-00000006") as error:
        trainer.fit()
    assert "\n" not in str(error.value)
    last = checkpoints.latest(tmp_path / "checkpoints")
    assert last.name == "step-00000006"
    stored = checkpoints.load(last)
    assert all(torch.isfinite(t).all() for t in stored.tensors["model"].values())
    assert trainer.state.step == 16


def test_an_infinite_gradient_alone_is_caught(tmp_path):
    class Steep(FlowMatching):
        def loss(self, denoiser, batch, state, generator):
            result = super().loss(denoiser, batch, state, generator)
            if state.step == 4:  # a finite loss with an infinite slope
                result.loss.register_hook(lambda gradient: gradient * math.inf)
            return result

    report = make(tmp_path, objective=Steep(), steps=8).fit()
    assert report.skipped_steps == 1
    assert "norm" not in read_log(report.curve)[4]


def test_samples_are_drawn_from_the_averaged_model(tmp_path):
    seen = []

    def on_sample(model, step, folder):
        assert not torch.is_grad_enabled()
        assert not model.training
        torch.rand(100)  # callers may use the global generator
        seen.append((model, step, folder))

    trainer = make(tmp_path / "a", steps=9, sample_every=4, on_sample=on_sample, dropout=0.3)
    trainer.fit()
    assert [(model is trainer.ema_model, step) for model, step, _ in seen] == [(True, 4), (True, 8), (True, 9)]
    assert seen[0][2] == tmp_path / "a" / "samples"
    assert seen[0][2].is_dir()
    silent = make(tmp_path / "b", steps=9, dropout=0.3)
    silent.fit()
    assert same_weights(silent.state.model, trainer.state.model)


def test_a_signal_in_the_last_moment_still_ends_the_process(tmp_path):
    trainer = make(tmp_path, steps=3, sample_every=3, on_sample=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        trainer.fit()
    assert end.value.code == 143
    assert checkpoints.latest(tmp_path / "checkpoints").name == "step-00000003"


def test_the_model_trains_on_after_its_own_evaluation_without_an_average(tmp_path):
    settings = {"steps": 8, "ema": 0.0, "dropout": 0.5}
    plain = make(tmp_path / "a", **settings)
    watched = make(tmp_path / "b", eval_every=2, held_out=ToySource(8), **settings)
    plain.fit()
    watched.fit()
    assert same_weights(plain.state.model, watched.state.model)


def test_a_time_budget_ends_with_a_checkpoint_and_can_be_resumed(tmp_path):
    report = make(tmp_path, ToySource(delay=0.02), steps=10**6, minutes=0.3 / 60).fit()
    assert report.ended == "minutes"
    assert 1 < report.steps < 100
    assert checkpoints.latest(tmp_path / "checkpoints") == report.checkpoint
    assert make(tmp_path, steps=report.steps + 3).fit(resume=True).steps == report.steps + 3


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    plain, saving = make(tmp_path / "a"), make(tmp_path / "b", gradient_checkpointing=True)
    plain.fit()
    saving.fit()
    assert saving.state.model.gradient_checkpointing
    assert same_weights(plain.state.model, saving.state.model)
    with pytest.raises(UserError, match="cannot checkpoint gradients"):
        make(tmp_path / "c", model=lambda: torch.nn.Linear(2, 2), gradient_checkpointing=True)


def test_bf16_computes_in_half_precision_and_keeps_float32_weights(tmp_path):
    seen = []

    class Watching(ToyDenoiser):
        def forward(self, x, t, cond):
            out = super().forward(x, t, cond)
            seen.append(out.dtype)
            return out

    trainer = make(tmp_path / "half", model=Watching, precision="bf16", steps=50)
    half = trainer.fit()
    full = make(tmp_path / "full", steps=50).fit()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.state.model.parameters())
    assert losses(half.curve)[-1] == pytest.approx(losses(full.curve)[-1], rel=0.2)
    assert losses(half.curve) != losses(full.curve)


def test_clipping_bounds_the_gradient(tmp_path):
    free, bound = make(tmp_path / "a", clip=None, steps=1), make(tmp_path / "b", clip=1e-3, steps=1)
    seen = {}
    for name, trainer in (("free", free), ("bound", bound)):
        update = trainer.state.optimizers.step

        def step(index, trainer=trainer, name=name, update=update):
            seen[name] = torch.cat([p.grad.flatten() for p in trainer.state.model.parameters()]).norm().item()
            update(index)

        trainer.state.optimizers.step = step
        trainer.fit()
    logged = read_log(tmp_path / "b" / "log.jsonl")[0]["norm"]
    assert seen["free"] == pytest.approx(logged, rel=1e-4)
    assert seen["bound"] == pytest.approx(1e-3, rel=1e-4)


def test_tracker_writes_the_numbers_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = make(tmp_path, steps=3, tracker="tensorboard").fit()
    events = EventAccumulator(str(tmp_path / "tracker")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(report.curve), rel=1e-5)


def test_bad_input_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match="empty"):
        make(tmp_path / "a", ToySource(0))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        make(tmp_path / "file" / "out").fit()


class Swapped(ToySource):
    """Samples under the wrong label: what is learned of the labels makes their loss worse."""

    def batch(self, indices, generators):
        batch = super().batch(indices, generators)
        return replace(batch, cond=Cond(label=torch.where(batch.cond.label < 2, 1 - batch.cond.label, 2)))


def impatient(out, **settings):
    return make(out, **{"steps": 300, "learning_rate": 3e-3, "ema": 0.9, "eval_every": 6, "patience": 3,
                        "save_every": 10, "held_out": Swapped(40), **settings})  # fmt: skip


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_patience_ends_the_training_and_gives_the_best_weights(tmp_path, ema):
    trainer = impatient(tmp_path, ema=ema)
    report = trainer.fit()
    curve = [(r["step"], r["held_out_loss"]) for r in read_log(report.curve) if "held_out_loss" in r]
    best = min(curve, key=lambda pair: pair[1])
    assert (report.ended, report.steps, report.held_out_loss) == ("held-out", best[0] + 3 * 6, pytest.approx(best[1]))
    assert report.steps < 300
    assert checkpoints.latest(tmp_path / "checkpoints") == report.checkpoint
    assert trainer._held_out_loss() == pytest.approx(best[1], rel=1e-6)
    again = impatient(tmp_path, ema=ema)
    assert (again.fit(resume=True).ended, again.state.step) == ("held-out", report.steps)
    assert same_weights(trainer.ema_model, again.ema_model)


def test_a_resumed_run_loses_its_patience_at_the_same_step(tmp_path):
    whole = impatient(tmp_path / "whole")
    end = whole.fit()
    impatient(tmp_path / "cut", steps=end.steps - 5).fit()
    resumed = impatient(tmp_path / "cut")
    assert resumed.fit(resume=True).steps == end.steps
    assert same_weights(whole.ema_model, resumed.ema_model)


def test_without_patience_nothing_changes(tmp_path):
    plain, patient = (
        impatient(tmp_path / "plain", patience=0, steps=60),
        impatient(tmp_path / "patient", patience=99, steps=60),
    )
    one, other = plain.fit(), patient.fit()
    assert (one.ended, other.ended) == ("steps", "steps")
    assert losses(one.curve) == losses(other.curve)
    assert same_weights(plain.state.model, patient.state.model)
    assert not (one.checkpoint / "best.safetensors").exists()
    assert one.held_out_loss > other.held_out_loss
