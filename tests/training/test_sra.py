"""SRA by its formula, and what is easy to get wrong."""

import pytest
import torch
from toy_training import DIM, PlanesSource

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.core.time import interpolate
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.paired_noise import StraightPairs
from smalti.objectives.two_groups import GROUPS, LesserPairs, TwoGroupFlowMatching
from smalti.seams.taps import Taps
from smalti.training.alignment import AlignedModel, AlignedObjective
from smalti.training.config import TrainConfig
from smalti.training.ema import EMA
from smalti.training.progress import read_log
from smalti.training.sra import DEVIATION, SelfAlignment, SRASettings, deviation, distance
from smalti.training.stopping import StopAt, StopOnCollapse
from smalti.training.trainer import Trainer

SETTINGS = SRASettings(student=1, teacher=2)


def drawn_model(seed=0):
    torch.manual_seed(seed)
    model = DiT.tiny()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(count=4):
    torch.manual_seed(1)
    cond = Cond(pooled=torch.randn(count, 10), label=torch.tensor([0, 1, 2, 3][:count]))
    return Batch(torch.randn(count, 4, 8, 8), cond, torch.arange(count))


def term(settings=SETTINGS):
    torch.manual_seed(3)
    return SelfAlignment(16, settings)


def trainer(out, losses=(), stops=(), source=None, **settings):
    torch.manual_seed(0)
    config = TrainConfig(**{"steps": 8, "batch": 16, "learning_rate": 3e-3, "log_every": 1, "ema": 0.9, **settings})
    return Trainer(DiT.tiny(), FlowMatching(), source or PlanesSource(), config, out, losses=losses, stops=stops)


def column(report, name):
    return [line[name] for line in read_log(report.curve) if name in line]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Spy:
    """A denoiser that keeps what it was called with."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x, t, cond):
        self.x, self.t, self.cond = x, t, cond
        return self.model(x, t, cond)


def test_the_loss_is_that_of_the_formula():
    model, given = AlignedModel(drawn_model(), [term(SRASettings(1, 2, weight=0.7))]), batch()
    average, spy = EMA(drawn_model(5), 0.9).model, Spy(model)
    generators = generators_for(range(4))
    result = AlignedObjective(FlowMatching(), model).loss(spy, given, TrainState(0, average), generators)
    # the same draws by hand: time and noise for the objective, then u
    fresh = generators_for(range(4))
    alone = FlowMatching().loss(lambda x, t, cond: model.denoiser(x, t, cond), given, TrainState(), fresh)
    u = torch.cat([torch.rand(1, generator=one) for one in fresh])
    s = (spy.t - 0.2 * u).clamp(0, 1)
    noise = (spy.x - (1 - spy.t).view(-1, 1, 1, 1) * given.x0) / spy.t.view(-1, 1, 1, 1)
    taps = Taps(average, [2])
    average(interpolate(given.x0, noise, s), s, given.cond)
    raw = taps.taken.tokens[2]
    taps.remove()
    own = model.terms[0].head(model._taps.taken.tokens[1])
    apart = 1 - torch.nn.functional.cosine_similarity(own, raw, dim=-1).mean()
    assert torch.allclose(result.loss, alone.loss + 0.7 * apart, atol=1e-4)
    assert torch.allclose(result.metrics[DEVIATION], raw.std(0, correction=0).mean(), atol=1e-4)


def test_the_students_sample_is_the_noisier_one_and_conditions_are_shared(monkeypatch):
    model, average, given = AlignedModel(drawn_model(), [term()]), EMA(drawn_model(5), 0.9).model, batch()
    seen, look = {}, SelfAlignment._look

    def spy(self, ema, x, t, cond):
        seen.update(x=x, t=t, cond=cond)
        return look(self, ema, x, t, cond)

    monkeypatch.setattr(SelfAlignment, "_look", spy)
    student = Spy(model)
    AlignedObjective(FlowMatching(), model).loss(student, given, TrainState(0, average), generators_for(range(4)))
    assert (seen["t"] <= student.t).all()
    assert seen["cond"] is student.cond  # dropped labels come with the batch, once for both


def test_gradients_reach_student_and_head_alone():
    model, average = AlignedModel(drawn_model(), [term()]), EMA(drawn_model(5), 0.9).model
    objective = AlignedObjective(FlowMatching(), model)
    objective.loss(model, batch(), TrainState(0, average), generators_for(range(4))).loss.backward()
    assert all(one.grad is None for one in average.parameters())
    assert all(one.grad is not None for one in model.terms[0].head.parameters())
    assert not average.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in average.modules())
    assert {name.split(".")[1] for name, _ in model.terms[0].named_parameters()} == {"0", "2"}  # no teacher among them


def test_the_teacher_follows_the_average_as_it_moves(tmp_path):
    done = trainer(tmp_path, [term()])
    report = done.fit()
    assert len(column(report, "self distance")) == 8
    teacher = done.state.model.terms[0]._teacher
    assert teacher.average is done.ema_model
    assert teacher.model.blocks[1].ffn is done.ema_model.blocks[1].ffn


def test_distances_by_their_formulas():
    one, other = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    apart = (one - other).abs()
    smooth = torch.where(apart < 0.05, apart.square() / (2 * 0.05), apart - 0.025).mean()
    assert torch.allclose(distance(one, other, "smooth-l1"), smooth)
    assert torch.allclose(distance(one, other, "l1"), apart.mean())
    assert torch.allclose(distance(one, other, "l2"), apart.square().mean())
    unit = (one / one.norm(dim=-1, keepdim=True) * other / other.norm(dim=-1, keepdim=True)).sum(-1)
    assert torch.allclose(distance(one, other, "cos"), 1 - unit.mean(), atol=1e-6)
    assert torch.allclose(distance(one, 9 * other, "cos"), distance(one, other, "cos"), atol=1e-6)
    assert not torch.allclose(distance(one, 9 * other, "l1"), distance(one, other, "l1"))


def test_the_weight_waits_and_falls_to_a_tenth():
    chosen = SRASettings(1, 2, weight=0.2, start=5, decay_from=149, decay_span=1000)
    assert [chosen.weight_at(step) for step in (0, 4, 5, 149)] == [0, 0, 0.2, 0.2]
    assert chosen.weight_at(1149) == pytest.approx(0.02)
    assert chosen.weight_at(649) == pytest.approx(2 * 0.1 ** ((649 - 149) / 1000 + 1))  # as the paper writes it


def test_before_its_start_it_is_the_plain_training_bit_for_bit(tmp_path):
    plain, waiting = trainer(tmp_path / "a"), trainer(tmp_path / "b", [term(SRASettings(1, 2, start=100))])
    plain.fit()
    waiting.fit()
    assert same(plain.ema_model, waiting.ema_model)
    acting = trainer(tmp_path / "c", [term()])
    acting.fit()
    assert not same(plain.ema_model, acting.ema_model)


@pytest.mark.parametrize("cut", [3, 5])
def test_it_is_resumed(tmp_path, cut):
    rules = [StopAt(("sra",), 6)]
    whole = trainer(tmp_path / "whole", [term()], rules)
    whole.fit()
    trainer(tmp_path / "parts", [term()], rules, steps=cut).fit()
    parts = trainer(tmp_path / "parts", [term()], rules)
    assert len(column(parts.fit(resume=True), "sra")) == 6
    assert same(whole.ema_model, parts.ema_model)
    assert parts.state.model.terms[0]._teacher is None


def test_what_is_exported_has_no_head(tmp_path):
    done = trainer(tmp_path / "run", [term()])
    done.fit()
    done.ema_model.save_pretrained(tmp_path / "model")
    assert set(done.ema_model.state_dict()) == set(DiT.tiny().state_dict())
    assert same(DiT.from_pretrained(tmp_path / "model"), done.ema_model)


def test_a_text_to_image_model_aligns_its_image_tokens():
    torch.manual_seed(0)
    model = AlignedModel(MMDiT.tiny(), [SelfAlignment(16, SRASettings(1, 3))])
    average, count = EMA(model.denoiser, 0.9).model, 2
    cond = Cond(text=torch.randn(count, 5, 12), pooled=torch.randn(count, 10), extra={"teacher": torch.zeros(2, DIM)})
    given = Batch(torch.randn(count, 4, 6, 8), cond, torch.arange(count))
    result = AlignedObjective(FlowMatching(), model).loss(model, given, TrainState(0, average), generators_for([0, 1]))
    assert torch.isfinite(result.loss)
    assert len(model.terms[0]._teacher.model.single_blocks) == 2


def test_collapse_is_seen_and_ends_the_term(tmp_path):
    alike = torch.randn(1, 5, 8).expand(4, -1, -1)
    assert deviation(alike).item() < 1e-6
    assert deviation(torch.randn(64, 5, 8)).item() == pytest.approx(1, abs=0.1)
    rule = StopOnCollapse(("sra",), DEVIATION, share=0.1, every=2)
    memory = {}
    assert [rule.judge(memory, step, value) for step, value in ((2, 1.0), (4, 0.2), (6, 0.09))] == [False, False, True]
    done = trainer(tmp_path, [term()], [StopOnCollapse(("sra",), DEVIATION, share=0.999, every=1)], learning_rate=3e-2)
    done.fit()
    assert "first" in done.stopping.memory[0]


def test_controls_can_be_built():
    swapped = SRASettings(student=2, teacher=1)
    other = SRASettings(1, 2, pairs=StraightPairs(has_own_noise=True))
    for settings in (swapped, other):
        model, average = AlignedModel(drawn_model(), [term(settings)]), EMA(drawn_model(), 0.9).model
        objective = AlignedObjective(FlowMatching(), model)
        assert torch.isfinite(objective.loss(model, batch(), TrainState(0, average), generators_for(range(4))).loss)
    assert term(other).settings["pairs"]["has_own_noise"] is True


def test_two_groups_are_kept_apart_while_the_average_sees_all(tmp_path):
    torch.manual_seed(0)
    config = TrainConfig(steps=6, batch=16, learning_rate=3e-3, log_every=1, ema=0.9)
    one = term(SRASettings(1, 2, pairs=LesserPairs(), has_groups=True))
    done = Trainer(DiT.tiny(), TwoGroupFlowMatching(), PlanesSource(), config, tmp_path, losses=[one])
    assert len(column(done.fit(), "self distance")) == 6
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in done.state.model.modules())
    model, groups = AlignedModel(drawn_model(), [one]), (torch.arange(16) % 4 < 2).expand(4, -1)
    model.state, model.generator = TrainState(0, EMA(drawn_model(), 0.9).model), generators_for(range(4))
    given = batch()
    given.cond.extra[GROUPS] = groups
    outputs = []
    for shift in (0, 1):
        x = given.x0.clone()
        x[..., 4:] += shift
        model.x0 = x
        outputs.append(model(x, torch.full((4, 16), 0.5), given.cond).velocity)
    assert torch.equal(outputs[0][..., :4], outputs[1][..., :4])


@pytest.mark.slow
def test_the_truncated_average_has_a_compiled_graph_of_its_own(tmp_path):
    torch.manual_seed(3)
    done = trainer(tmp_path / "a", [SelfAlignment(16, SETTINGS, is_compiled=True)], steps=4, compile=True)
    done.fit()
    eager = trainer(tmp_path / "b", [term()], steps=4)
    eager.fit()
    assert done.state.model.terms[0]._teacher.model._compiled_call_impl is not None
    assert done.ema_model._compiled_call_impl is None
    pairs = zip(done.ema_model.parameters(), eager.ema_model.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="set ema above 0"):
        trainer(tmp_path / "live", [term()], ema=0).fit()
    with pytest.raises(UserError, match="1 to 2"):
        trainer(tmp_path / "deep", [term(SRASettings(1, 9))]).fit()
    with pytest.raises(UserError, match="did you mean 'cos'"):
        SRASettings(distance="cosine")
    with pytest.raises(UserError, match="differ"):
        SRASettings(3, 3)
    average = EMA(drawn_model(), 0.9).model
    average.label_embedder.dropout_prob = 0.1  # as diffusers' own embedder of labels has it
    model = AlignedModel(drawn_model(), [term()])
    with pytest.raises(UserError, match="drops labels by itself"):
        AlignedObjective(FlowMatching(), model).loss(model, batch(), TrainState(0, average), generators_for(range(4)))
