"""Alignment terms: trained beside the denoiser, gone afterwards, in the log, resumable, nothing where they are off."""

import torch
from toy_training import DIM, DotTeacher, PlanesSource

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.protocols import Cond, TrainState
from smalti.objectives.flow_matching import FlowMatching
from smalti.training.alignment import AlignedModel, measure_terms
from smalti.training.config import TrainConfig
from smalti.training.progress import read_log
from smalti.training.repa import REPA, REPASettings, TeacherPort
from smalti.training.stopping import StopAt
from smalti.training.trainer import Trainer


def term(teacher=None, **settings):
    torch.manual_seed(3)
    return REPA(16, [TeacherPort("teacher", DIM, teacher)], REPASettings(**{"depth": 1, "hidden": 16, **settings}))


def trainer(out, losses=(), source=None, steps=60, model=None, stops=(), **settings):
    torch.manual_seed(0)
    config = TrainConfig(**{"steps": steps, "batch": 16, "learning_rate": 3e-3, "log_every": 1, "ema": 0.9, **settings})
    source = source or PlanesSource()
    return Trainer(model or DiT.tiny(), FlowMatching(), source, config, out, losses=losses, stops=stops)


def column(report, name):
    return [line[name] for line in read_log(report.curve) if name in line]


def test_the_cosine_rises_and_is_logged_apart_from_the_objective(tmp_path):
    report = trainer(tmp_path, [term()]).fit()
    cosines, losses = column(report, "alignment cosine"), column(report, "loss")
    assert sum(cosines[-5:]) / 5 > sum(cosines[:5]) / 5 + 0.3
    objectives = column(report, "objective")
    assert all(
        abs(loss - (objective - 0.5 * cosine)) < 1e-4
        for loss, objective, cosine in zip(losses, objectives, cosines, strict=True)
    )


def test_weight_zero_and_a_stop_at_step_zero_are_the_plain_training_bit_for_bit(tmp_path):
    plain = trainer(tmp_path / "plain", steps=6)
    plain.fit()
    for number, (weight, stops) in enumerate(((0.0, []), (0.5, [StopAt(("repa",), 0)]))):
        other = trainer(tmp_path / str(number), [term(weight=weight)], steps=6, stops=stops)
        other.fit()
        assert all(torch.equal(a, b) for a, b in zip(plain.ema_model.parameters(), other.ema_model.parameters()))
    acting = trainer(tmp_path / "acting", [term()], steps=6)
    acting.fit()
    assert not all(torch.equal(a, b) for a, b in zip(plain.ema_model.parameters(), acting.ema_model.parameters()))


def test_the_term_stops_at_its_step(tmp_path):
    report = trainer(tmp_path, [term()], steps=8, stops=[StopAt(("repa",), 4)]).fit()
    assert ["alignment cosine" in line for line in read_log(report.curve)] == [True] * 4 + [False] * 4


def test_what_is_averaged_and_exported_has_no_projector_and_no_hook(tmp_path):
    done = trainer(tmp_path / "run", [term()], steps=3)
    done.fit()
    assert set(done.ema_model.state_dict()) == set(DiT.tiny().state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in done.ema_model.modules())
    done.ema_model.save_pretrained(tmp_path / "model")
    again = DiT.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), done.ema_model.parameters()))


def test_the_trained_denoiser_is_left_without_hooks_and_can_be_measured(tmp_path):
    model, losses = DiT.tiny(), [term()]
    done = trainer(tmp_path, losses, model=model)
    assert done.fit().steps == 60
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    figures = measure_terms(AlignedModel(model, losses), PlanesSource())
    assert figures["alignment cosine"] > 0.3
    strangers = measure_terms(AlignedModel(model, losses), PlanesSource(shuffled=True))
    assert strangers["alignment cosine"] < figures["alignment cosine"] - 0.2


def test_projectors_are_resumed_too(tmp_path):
    whole = trainer(tmp_path / "whole", [term()], steps=8)
    whole.fit()
    trainer(tmp_path / "parts", [term()], steps=8, minutes=1e-9).fit()
    parts = trainer(tmp_path / "parts", [term()], steps=8)
    parts.fit(resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.ema_model.parameters(), parts.ema_model.parameters()))
    one, other = (one.state.model.terms[0].state_dict() for one in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_live_teacher_equals_its_cached_features(tmp_path):
    cached = trainer(tmp_path / "cached", [term()], steps=4)
    cached.fit()
    live = trainer(tmp_path / "live", [term(DotTeacher())], PlanesSource(is_cached=False), steps=4)
    live.fit()
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(cached.ema_model.parameters(), live.ema_model.parameters())
    )
    assert not any("weight" in name and "conv" in name for name in live.state.model.state_dict())


def test_only_the_image_tokens_of_a_joint_sequence_are_aligned():
    model = AlignedModel(MMDiT.tiny(), [term(depth=2)])
    cond = Cond(text=torch.randn(2, 5, 12), pooled=torch.randn(2, 10), extra={"teacher": torch.randn(2, 12, DIM)})
    output = model(torch.randn(2, 4, 6, 8), torch.tensor([0.2, 0.7]), cond)
    assert output.losses["repa"].shape == ()
    assert output.velocity.shape == (2, 4, 6, 8)
    assert model._taps.taken.tokens[2].shape == (2, 12, 16)
    assert model._taps.taken.grid == (1, 3, 4)


def test_the_objective_alone_is_measured_on_held_out_samples(tmp_path):
    torch.manual_seed(0)
    config = TrainConfig(steps=2, batch=16, eval_every=2, ema=0.9)
    done = Trainer(
        DiT.tiny(), FlowMatching(), PlanesSource(), config, tmp_path, held_out=PlanesSource(), losses=[term()]
    )
    report = done.fit()
    state, device = TrainState(2, done.ema_model), torch.device("cpu")
    total, count = done.held_out.loss(FlowMatching(), done.ema_model, state, device).tolist()
    assert abs(report.held_out_loss - total / count) < 1e-6
