"""Distillation: the student nears its teacher, only attention projections move, and the Trainer's promises stay."""

import pytest
import torch
from torch import nn

from smalti.acceleration.clear import CLEAR, PoolWeights
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.objectives.flow_matching import FlowMatching
from smalti.seams.core_taps import CoreTaps
from smalti.training.attention_deltas import attention_parameters
from smalti.training.config import TrainConfig
from smalti.training.distill import Distillation, distill, make_student, prediction_errors
from smalti.training.progress import read_log

TAPS = "single[::2]"


class Pictures:
    """Latents (4, 12, 12) with a text each."""

    def __len__(self):
        return 16

    def batch(self, indices, generators):
        x0, text, pooled = [], [], []
        for index in indices.tolist():
            fixed = torch.Generator().manual_seed(index)
            x0.append(torch.randn(4, 3, 3, generator=fixed).repeat_interleave(4, 1).repeat_interleave(4, 2))
            text.append(torch.randn(5, 12, generator=fixed))
            pooled.append(torch.randn(10, generator=fixed))
        return Batch(torch.stack(x0), Cond(torch.stack(text), torch.stack(pooled)), indices)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = MMDiT.tiny()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def method(model, pool=2):
    return CLEAR(1, pool, weights=PoolWeights.of(model, pool), backend="dense")


def trainer(teacher, out, steps=40, losses=None, **settings):
    config = TrainConfig(**{"steps": steps, "batch": 8, "learning_rate": 1e-2, "log_every": 1, "ema": 0.9, **settings})
    student = make_student(teacher, [method(teacher)], TAPS)
    return distill(student, teacher, Pictures(), config, out, losses=losses, taps=TAPS)


def test_the_student_nears_its_teacher(teacher, tmp_path):
    before = prediction_errors(CoreTaps(teacher, [CLEAR(1, 2)]), teacher, Pictures())
    # A teacher of random weights knows no data, so its student is not drawn to these.
    done = trainer(teacher, tmp_path, losses={"pred": 1.0, "attn": 0.5}, steps=60)
    done.fit()
    after = prediction_errors(done.ema_model.eval(), teacher, Pictures())
    assert len(before) == len(after) == 16
    assert sum(after) < 0.7 * sum(before)


def test_only_projections_of_the_image_stream_and_pooling_weights_move(teacher, tmp_path):
    start = {name: one.clone() for name, one in teacher.named_parameters()}
    done = trainer(teacher, tmp_path, steps=2)
    done.fit()
    student = done.state.model
    moved = {name for name, one in student.denoiser.named_parameters() if not torch.equal(one, start[name])}
    assert moved == set(attention_parameters(teacher))
    assert moved == {
        f"{block}.attn.{layer}.{kind}"
        for block in ("double_blocks.0", "single_blocks.0", "single_blocks.1")
        for layer in ("to_qkv", "to_out")
        for kind in ("weight", "bias")
    }
    assert all(torch.equal(one, start[name]) for name, one in teacher.named_parameters())
    assert all(not torch.allclose(one, torch.full((2, 2), 0.25)) for one in student.parts.parameters())


def test_the_loss_is_the_weighted_sum_of_its_terms(teacher, tmp_path):
    weights = {"fm": 1.0, "pred": 0.5, "attn": 0.25}
    report = trainer(teacher, tmp_path, steps=3, losses=weights).fit()
    for line in read_log(report.curve):
        assert line["loss"] == pytest.approx(sum(weights[name] * line[name] for name in weights), abs=1e-5)
        assert min(line[name] for name in weights) > 0


def test_an_untouched_copy_has_no_error_and_the_plain_objective(teacher):
    source = Pictures()
    batch = source.batch(torch.arange(4), [])
    task = Distillation(CoreTaps(teacher, taps=TAPS), {"fm": 1, "pred": 1, "attn": 1}, FlowMatching())
    student = make_student(teacher, [], TAPS)
    found = task.loss(student, batch, TrainState(), generators_for(range(4)))
    assert found.metrics["pred"] == found.metrics["attn"] == 0
    plain = FlowMatching().loss(teacher, batch, TrainState(), generators_for(range(4))).loss
    assert torch.allclose(found.loss, plain)


def test_times_are_weighed_in_every_term(teacher):
    batch = Pictures().batch(torch.arange(4), [])
    student = make_student(teacher, [method(teacher)], TAPS)

    def metrics(weight):
        task = Distillation(CoreTaps(teacher, taps=TAPS), {"fm": 1, "pred": 1, "attn": 1}, FlowMatching(weight=weight))
        return task.loss(student, batch, TrainState(), generators_for(range(4))).metrics

    plain, tripled = metrics(None), metrics(lambda t: torch.full_like(t, 3))
    assert all(torch.allclose(3 * plain[name], tripled[name]) for name in ("fm", "pred", "attn"))


@pytest.mark.parametrize("settings", [{"accumulate": 4}, {"gradient_checkpointing": True}])
def test_parts_and_checkpointed_gradients_walk_the_same_curve(teacher, tmp_path, settings):
    """The taps of each part are its own: mixed up, these curves would part."""
    one, other = trainer(teacher, tmp_path / "one", steps=4), trainer(teacher, tmp_path / "other", steps=4, **settings)
    one.fit(), other.fit()
    assert all(
        torch.allclose(a, b, atol=1e-4) for a, b in zip(one.ema_model.parameters(), other.ema_model.parameters())
    )


def test_a_training_is_resumed_pooling_weights_and_all(teacher, tmp_path):
    whole = trainer(teacher, tmp_path / "whole", steps=6)
    whole.fit()
    trainer(teacher, tmp_path / "parts", steps=6, minutes=1e-9).fit()
    parts = trainer(teacher, tmp_path / "parts", steps=6)
    parts.fit(resume=True)
    one, other = whole.ema_model.state_dict(), parts.ema_model.state_dict()
    assert any("parts" in name for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
    other = distill(
        make_student(teacher, [CLEAR(2, backend="dense")], TAPS), teacher, Pictures(), whole.config,
        tmp_path / "parts", taps=TAPS,
    )  # fmt: skip
    with pytest.raises(UserError, match="another training"):
        other.fit(resume=True)


def test_the_held_out_loss_is_the_students_with_its_method(teacher, tmp_path):
    config = TrainConfig(steps=1, batch=8, learning_rate=1e-9, ema=0.9, eval_every=1, eval_samples=16)
    student = make_student(teacher, [CLEAR(1)], TAPS)
    losses = {"pred": 1.0}
    done = distill(student, teacher, Pictures(), config, tmp_path, losses=losses, taps=TAPS, held_out=Pictures())
    found = done.fit().held_out_loss
    errors = prediction_errors(CoreTaps(teacher, [CLEAR(1)]), teacher, Pictures())
    assert found == pytest.approx(sum(errors) / len(errors), rel=1e-3)
    assert found > 0


def test_what_cannot_be_is_refused(teacher, tmp_path):
    config = TrainConfig(steps=1, batch=8)
    with pytest.raises(UserError, match="unknown distillation loss"):
        trainer(teacher, tmp_path, losses={"prediction": 1.0})
    with pytest.raises(UserError, match="at least 0"):
        trainer(teacher, tmp_path, losses={"pred": -1.0})
    with pytest.raises(UserError, match="same taps"):
        distill(make_student(teacher, [method(teacher)]), teacher, Pictures(), config, tmp_path, taps=TAPS)
    with pytest.raises(UserError, match="no taps"):
        student = make_student(teacher, [method(teacher)])
        distill(student, teacher, Pictures(), config, tmp_path, losses={"attn": 1.0})
    with pytest.raises(UserError, match="no parameter of the student trains"):
        distill(CoreTaps(teacher.requires_grad_(False), taps=TAPS), teacher, Pictures(), config, tmp_path, taps=TAPS)
