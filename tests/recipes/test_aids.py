"""Aids compose into one training, and each changes what it should."""

import pytest
import torch

from smalti.backbones.dit import DiT
from smalti.backbones.mixed_dit import MixedDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.objectives.flow_matching import FlowMatching
from smalti.recipes.aids import AIDS, Aids
from smalti.training.alignment import AlignedModel, AlignedObjective
from smalti.training.config import TrainConfig
from smalti.training.ema import EMA
from smalti.training.latent_source import LatentSource
from smalti.training.trainer import Trainer

ALL = Aids("vit-caption", 0.5, mask=0.5, time="logit-normal", optimizer="muon", tuned_width=32)
SHAPE = {"in_channels": 1, "patch_size": 4, "num_labels": 10, "base_size": 4}


def batch(aids):
    extra = {"teacher": torch.randn(3, 16, 6)} if aids.teacher else {}
    return Batch(torch.randn(3, 1, 16, 16), Cond(label=torch.tensor([1, 2, 3]), extra=extra), torch.arange(3))


def test_without_aids_it_is_a_plain_training():
    started = Aids().model(32, 2, **SHAPE)
    assert isinstance(started.model, DiT)
    assert started.factors is None
    assert Aids().losses(32, 2, 6, 20) == []
    assert isinstance(Aids().objective(100), FlowMatching)


def test_joined_aids_keep_what_each_says():
    both = Aids(teacher="vit-caption", mask=0.5) | Aids(mask=0.75, time="logit-normal")
    assert both == Aids(teacher="vit-caption", mask=0.75, time="logit-normal")
    assert Aids(mask=0.5) | Aids() == Aids(mask=0.5)


@pytest.mark.parametrize("wrong", [{"mask": 1.0}, {"time": "evening"}, {"optimizer": "sgd"}, {"ends": 0.0}])
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        Aids(**wrong)


@pytest.mark.parametrize("aids", [*AIDS.values(), ALL])
def test_every_aid_trains(aids):
    torch.manual_seed(0)
    model, objective = aids.model(64, 3, **SHAPE).model, aids.objective(100, 4)
    terms = aids.losses(64, 3, 6, 20)
    if terms:
        model = AlignedModel(model, terms)
        objective = AlignedObjective(objective, model)
    given = batch(aids)
    average = EMA(model.denoiser if terms else model, 0.9).model
    found = objective.loss(model, given, TrainState(10, average), generators_for([0, 1, 2]))
    found.loss.backward()
    assert torch.isfinite(found.loss)
    assert ("self distance" in found.metrics) == aids.is_own
    if aids.teacher:
        assert "alignment cosine" in found.metrics
        assert any(one.grad is not None and one.grad.abs().sum() > 0 for one in terms[0].parameters())


def test_masks_and_rotary_positions_exclude_each_other():
    with pytest.raises(UserError, match="rotary"):
        Aids(mask=0.5) | Aids(is_lightning=True)
    with pytest.raises(UserError, match="averaged"):
        Aids(mask=0.5, is_own=True)


def test_alignment_ends_at_its_share():
    [rule] = Aids("vit-caption", ends=0.3).stops(100)
    assert (rule.losses, rule.step) == (("repa",), 30)
    assert Aids("vit-caption").stops(100) == Aids(ends=0.3).stops(100) == []


def test_tokens_are_dropped_until_the_finish(monkeypatch):
    aids = Aids(mask=0.5)
    model, objective = aids.model(32, 3, **SHAPE).model, aids.objective(100, 4)
    assert isinstance(model, MixedDiT)
    assert len(model.dit.blocks) == 2  # and the mixer's
    kept = []
    monkeypatch.setattr(model, "forward", lambda x, t, cond: kept.append(cond.extra.get("keep")) or x)
    for step in (0, 89, 90):
        objective.loss(model, batch(aids), TrainState(step), generators_for([0, 1, 2]))
    assert [None if one is None else one.shape[1] for one in kept] == [8, 8, None]


def test_mup_slows_hidden_weights_of_a_wider_model():
    aids = Aids(tuned_width=32)
    assert not aids.model(32, 2, **SHAPE).factors or set(aids.model(32, 2, **SHAPE).factors.values()) == {(1.0, 1.0)}
    factors = aids.model(96, 2, **SHAPE).factors
    assert min(one[0] for one in factors.values()) == pytest.approx(1 / 3)


@pytest.mark.parametrize("aids", [*AIDS.values(), ALL])
def test_a_training_that_was_cut_ends_as_one_that_was_not(aids, tmp_path):
    torch.manual_seed(0)
    features = {"teacher": [torch.randn(8, 16, 6)]} if aids.teacher else {}
    views = [torch.randn(8, 1, 16, 16)]
    source = LatentSource(views, labels=torch.arange(8), dropped_label=10, features=features)

    def trained(folder, *minutes):
        torch.manual_seed(1)
        started = aids.model(64, 3, **SHAPE)
        for most in minutes:
            config = TrainConfig(steps=20, batch=4, optimizer=aids.optimizer, save_every=1, minutes=most)
            trainer = Trainer(
                started.model, aids.objective(20, 4), source, config, folder, factors=started.factors,
                losses=aids.losses(64, 3, 6, 20), stops=aids.stops(20),
            )  # fmt: skip
            trainer.fit(resume=True)
            torch.manual_seed(2)
            started = aids.model(64, 3, **SHAPE)
        return trainer.ema_model.state_dict()

    whole, cut = trained(tmp_path / "whole", None), trained(tmp_path / "cut", 1e-6, 1e-6, None)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
