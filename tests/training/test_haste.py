"""HASTE: the term by its formula, trained on class and text conditions, ended for good with nothing left behind."""

import gc
import weakref

import pytest
import torch
from toy_training import PlanesSource

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.objectives.flow_matching import FlowMatching
from smalti.tokenizers.vision_backends import OwnTeacher
from smalti.tokenizers.vision_encoder import VisionTransformer
from smalti.training.alignment import AlignedModel
from smalti.training.config import TrainConfig
from smalti.training.haste import HASTESettings, HolisticAlignment, small_pairs
from smalti.training.progress import read_log
from smalti.training.stopping import StopAt, StopOnConflict
from smalti.training.trainer import Trainer

SETTINGS = HASTESettings(depth=1, pairs=((1, 2), (2, 3)), hidden=16)


class PictureSource(PlanesSource):
    """Latents of planes, and pictures of 24 px made of their first channels."""

    def batch(self, indices, generators):
        batch = super().batch(indices, generators)
        pixels = torch.nn.functional.interpolate(batch.x0[:, :3], size=(24, 24)).clamp(-1, 1)
        batch.cond.extra["pixels"] = pixels
        return batch


def teacher(heads=3):
    encoder = VisionTransformer.untrained(depth=3, heads=heads, head_dim=8, patch_size=6, base_size=4)
    for block in encoder.blocks:
        torch.nn.init.normal_(block.attn.to_qkv.weight, std=0.3)  # so that it looks somewhere
    return OwnTeacher(encoder)


def term(settings=SETTINGS, **changes):
    torch.manual_seed(3)
    return HolisticAlignment(16, teacher(), settings, **changes)


def trainer(out, losses=(), stops=(), model=None, **settings):
    torch.manual_seed(0)
    config = TrainConfig(**{"steps": 12, "batch": 16, "learning_rate": 3e-3, "log_every": 1, "ema": 0.9, **settings})
    return Trainer(model or DiT.tiny(), FlowMatching(), PictureSource(), config, out, losses=losses, stops=stops)


def column(report, name):
    return [line[name] for line in read_log(report.curve) if name in line]


def inputs(pixels, batch=2):
    cond = Cond(label=torch.tensor([0, 1]), pooled=torch.randn(batch, 10), extra={"pixels": pixels})
    return torch.randn(batch, 4, 8, 8), torch.tensor([0.2, 0.7]), cond


def test_the_loss_is_that_of_both_formulas():
    pixels = torch.rand(2, 3, 24, 24) * 2 - 1
    one = term(HASTESettings(1, ((1, 2), (2, 3)), feature_weight=0.3, attention_weight=0.7, hidden=16))
    model = AlignedModel(DiT.tiny(), [one])
    for parameter in model.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    output = model(*inputs(pixels))
    taken, view = model._taps.taken, one.teacher(pixels)
    h, y = one.project(taken.tokens[1]), view.tokens
    cosine = ((h / h.norm(dim=-1, keepdim=True)) * (y / y.norm(dim=-1, keepdim=True))).sum(-1).mean()
    entropies = []
    for student, block in ((1, 2), (2, 3)):
        p = view.attention[block].logits()[:, :2].softmax(-1)  # the student has two heads, the teacher three
        q = taken.attention[student].logits().softmax(-1)
        entropies.append(-(p * q.log()).sum(-1).mean())
    wanted = -0.3 * cosine + 0.7 * (entropies[0] + entropies[1]) / 2
    assert torch.allclose(output.losses["haste"], wanted, atol=1e-5)


def test_no_maps_wait_for_the_backward_pass():
    """Of 4 blocks at full size they would be gigabytes; they are computed again, block by block."""
    model, kept = AlignedModel(DiT.tiny(), [term()]), []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*inputs(torch.rand(2, 3, 24, 24))).losses["haste"]
    assert kept
    assert not any(shape[-2:] == (16, 16) and len(shape) == 4 for shape in kept)
    loss.backward()
    assert model.denoiser.blocks[1].attn.to_qkv.weight.grad.abs().sum() > 0


def test_the_students_attention_is_its_own():
    pixels = torch.rand(2, 3, 24, 24)
    model, given = DiT.tiny(), inputs(pixels)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    plain = model(*given)
    assert torch.equal(AlignedModel(model, [term()])(*given).velocity, plain)


def test_attention_nears_the_teachers_entropy_and_the_cosine_rises(tmp_path):
    report = trainer(tmp_path, [term()], steps=120, learning_rate=1e-2).fit()
    apart, floor = column(report, "attention cross-entropy"), column(report, "attention entropy of the teacher")
    assert apart[0] > apart[-1] > floor[-1]
    assert apart[-1] - floor[-1] < 0.7 * (apart[0] - floor[0])
    assert column(report, "alignment cosine")[-1] > column(report, "alignment cosine")[0] + 0.2


def test_image_attention_alone_is_aligned_in_a_text_to_image_model():
    model = AlignedModel(MMDiT.tiny(), [term(HASTESettings(1, ((1, 3), (2, 3)), hidden=16))])
    cond = Cond(text=torch.randn(2, 5, 12), pooled=torch.randn(2, 10), extra={"pixels": torch.rand(2, 3, 24, 24)})
    output = model(torch.randn(2, 4, 6, 8), torch.tensor([0.2, 0.7]), cond)  # 3 x 4 tokens, the teacher's 4 x 4
    output.losses["haste"].backward()
    assert model._taps.taken.attention[1].logits().shape == (2, 2, 12, 12)
    assert model._taps.taken.attention[2].logits().shape == (2, 2, 12, 12)
    assert model.denoiser.double_blocks[0].attn.to_qkv.weight.grad.abs().sum() > 0


def test_after_its_end_the_teacher_is_gone_the_taps_are_off_and_the_optimizer_goes_on(tmp_path):
    seen = teacher()
    one = HolisticAlignment(16, seen, SETTINGS)
    gone = weakref.ref(seen)
    del seen
    done = trainer(tmp_path, [one], [StopAt(("haste",), 4)], steps=8)
    report = done.fit()
    assert ["haste" in line for line in read_log(report.curve)] == [True] * 4 + [False] * 4
    gc.collect()
    assert gone() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in done.state.model.modules())
    moments = done.state.optimizers.parts[0].state[done.state.model.denoiser.proj_out.weight]
    assert moments["step"].item() == 8


def test_the_second_phase_is_plain_training_on_the_same_moments(tmp_path):
    """A step right after the end equals the step of a bare model that got the same weights and moments."""
    done = trainer(tmp_path / "one", [term()], [StopAt(("haste",), 4)], steps=4)
    done.fit()
    plain = trainer(tmp_path / "two", steps=5)
    tensors, rest = done.state.optimizers.flat_state()
    plain.state.model.load_state_dict(done.state.model.denoiser.state_dict())
    own = {key.removeprefix("denoiser."): value for key, value in tensors.items() if key.startswith("denoiser.")}
    plain.state.optimizers.load_flat_state(own, rest)
    plain.state.step = 4
    longer = trainer(tmp_path / "one", [term()], [StopAt(("haste",), 4)], steps=5)
    longer.fit(resume=True)
    plain.train_step(4, plain.state.averaged, type("Stop", (), {"signal": None, "is_late": False})())
    plain.state.optimizers.step(4)
    pairs = zip(plain.state.model.parameters(), longer.state.model.denoiser.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("cut", [2, 6])
def test_a_resumed_run_does_not_begin_the_first_phase_again(tmp_path, cut):
    rules = [StopAt(("haste",), 4)]
    whole = trainer(tmp_path / "whole", [term()], rules, steps=8)
    whole.fit()
    trainer(tmp_path / "parts", [term()], rules, steps=cut).fit()
    parts = trainer(tmp_path / "parts", [term()], rules, steps=8)
    report = parts.fit(resume=True)
    assert len(column(report, "haste")) == 4
    assert parts.state.model.terms[0].teacher is None
    assert not parts.state.model.running
    assert all(torch.equal(a, b) for a, b in zip(whole.ema_model.parameters(), parts.ema_model.parameters()))


def test_gradients_that_turn_against_each_other_end_it_and_the_curve_is_logged(tmp_path):
    rule = StopOnConflict(("haste",), threshold=1.1, checks=2, every=2)  # every cosine is below it
    done = trainer(tmp_path / "one", [term()], [rule])
    report = done.fit()
    assert [line["step"] for line in read_log(report.curve) if "gradient cosine" in line] == [2, 4]
    assert done.stopping.memory[0]["stopped"] == 4
    watching = trainer(tmp_path / "two", [term()], [StopOnConflict(("haste",), threshold=-1.0, every=3)])
    curve = column(watching.fit(), "gradient cosine")
    assert len(curve) == 4
    assert all(-1 <= one <= 1 for one in curve)
    assert watching.state.model.running


@pytest.mark.slow
def test_a_compiled_training_walks_the_same_curve(tmp_path):
    rules = [StopAt(("haste",), 3)]
    eager = trainer(tmp_path / "eager", [term()], rules, steps=5)
    compiled = trainer(tmp_path / "compiled", [term()], rules, steps=5, compile=True)
    one, other = column(eager.fit(), "loss"), column(compiled.fit(), "loss")
    assert one == pytest.approx(other, abs=1e-3)


def test_blocks_for_small_models():
    assert small_pairs(12, 12) == ((4, 10), (5, 11), (6, 12))
    assert small_pairs(8, 6) == ((3, 5), (4, 6))
    assert small_pairs(6, 6) == ((2, 5), (3, 6))
    assert small_pairs(2, 2) == ((1, 2),)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        HASTESettings(depth=0)
    with pytest.raises(UserError, match="one pair"):
        HASTESettings(pairs=((1, 2), (1, 3)))
    with pytest.raises(UserError, match="blocks 1 to 3"):
        HolisticAlignment(16, teacher(), HASTESettings(1, ((1, 9),)))
    x, t, cond = inputs(torch.zeros(2, 3, 24, 24))
    cond.extra.clear()
    with pytest.raises(UserError, match="no pixels"):
        AlignedModel(DiT.tiny(), [term()])(x, t, cond)
