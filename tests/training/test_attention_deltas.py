"""Deltas: which weights they hold, files, adding and taking off, use on siblings."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import smalti
from smalti.acceleration.clear import CLEAR
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.training.attention_deltas import (
    CARD,
    FILE,
    attention_parameters,
    check_transfer,
    deltas_of,
    load_deltas,
    merged,
    save_deltas,
)


def model(seed=0):
    torch.manual_seed(seed)
    made = MMDiT.tiny().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.15)
    return made


def learned(teacher):
    """A student that differs in attention by what bfloat16 holds exactly."""
    student = model()
    with torch.no_grad():
        for one in attention_parameters(student).values():
            one.add_(torch.randint(-3, 4, one.shape) / 16)
    return deltas_of(student, teacher, {"a.b": torch.rand(2, 2)}, {"method": {"radius": 3}})


def test_projections_of_the_text_stream_are_never_among_them():
    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    names = set(attention_parameters(flux))
    expected = {f"transformer_blocks.0.attn.{one}.weight" for one in ("to_q", "to_k", "to_v", "to_out.0")}
    expected |= {f"single_transformer_blocks.0.attn.{one}.weight" for one in ("to_q", "to_k", "to_v")}
    assert {name for name in names if name.endswith("weight")} == expected
    assert not any("add" in name or "norm" in name for name in names)
    assert not any("attn_text" in name for name in attention_parameters(model()))


def test_a_file_gives_back_what_was_saved(tmp_path):
    deltas = learned(model())
    found = load_deltas(save_deltas(deltas, tmp_path / "student"))
    assert all(torch.allclose(found.weights[name], one, atol=1e-6) for name, one in deltas.weights.items())
    assert torch.equal(found.extra["a.b"], deltas.extra["a.b"])
    assert found.card["method"] == {"radius": 3}
    assert {one.name for one in (tmp_path / "student").iterdir()} == {FILE, CARD}


def test_a_torn_or_foreign_file_is_refused(tmp_path):
    folder = save_deltas(learned(model()), tmp_path / "student")
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"sha256": "0" * 64}))
    with pytest.raises(UserError, match="not the file that"):
        load_deltas(folder)
    (folder / FILE).write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read"):
        load_deltas(folder)
    with pytest.raises(UserError, match="no student 'nobody'"):
        load_deltas("nobody")


def test_deltas_are_added_and_taken_off_bit_for_bit():
    teacher = model()
    before = {name: one.clone() for name, one in teacher.state_dict().items()}
    deltas = learned(teacher)
    with pytest.raises(RuntimeError, match="on the way"), merged(teacher, deltas):
        for name, one in attention_parameters(teacher).items():
            assert torch.allclose(one, before[name] + deltas.weights[name])
        raise RuntimeError("on the way")
    assert all(torch.equal(one, before[name]) for name, one in teacher.state_dict().items())


def test_deltas_of_another_model_are_refused():
    other = MMDiT(
        in_channels=4, num_single=3, heads=2, head_dim=8, text_dim=12, pooled_dim=10, axes_dims_rope=(2, 2, 4)
    )
    with pytest.raises(UserError, match="do not fit this MMDiT"), merged(other, learned(model())):
        pass


def test_transfer_is_measured_on_a_sibling():
    """A sibling whose other weights were tuned: deltas that undo the circle's harm help it, random ones do not."""
    teacher, sibling = model(), model()
    with torch.no_grad():
        for name, one in sibling.named_parameters():
            if "ffn" in name:
                one.add_(0.02 * torch.randn_like(one))
    x, t = torch.randn(2, 4, 12, 12), torch.tensor([0.3, 0.7])
    cond = Cond(text=torch.randn(2, 5, 12), pooled=torch.randn(2, 10))

    def velocity(is_local):
        if not is_local:
            return sibling(x, t, cond)
        with smalti.apply(sibling, CLEAR(1)):
            return sibling(x, t, cond)

    found = check_transfer(sibling, learned(teacher), velocity)
    assert found.alone > 0
    assert not found.helps  # these were learned from nothing
    none = deltas_of(teacher, teacher, {}, {})
    assert check_transfer(sibling, none, velocity).with_deltas == found.alone
