"""Units that are cut out leave what a mask of zeros leaves, on every family; where they cannot be cut, it says why."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import build, contract_families, euler

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import Refusal
from smalti.core.protocols import Cond
from smalti.nn.pruned import ScatteredLinear, reshape
from smalti.seams.slicing import slice_units
from smalti.seams.units import KINDS, masked, read_units

FAMILIES = contract_families()
ALL = {"flux": "heads ffn mod", "sd3": "heads ffn mod", "mmdit": "heads ffn mod", "our-dit": "heads ffn mod"}
ALL |= {"dit": "heads ffn mod", "pixart": "heads ffn", "hunyuan-video": "heads ffn mod", "wan": "ffn"}
"""What the named families must be able to lose; the others may refuse."""


def half(groups, seed=0):
    """Half of the units of each group, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.randperm(group.count, generator=generator) >= group.count // 2 for group in groups}


def parameters(model):
    return sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_masked(family, kind):
    model = build(FAMILIES[family])
    try:
        groups = read_units(model, (kind,))
        keep = half(groups)
        with masked(model, groups, {name: one.float() for name, one in keep.items()}):
            expected = euler(model, FAMILIES[family], 3)
        plain, before = euler(model, FAMILIES[family], 3), parameters(model)
        lost = sum(int((~keep[group.name]).sum()) * group.parameters(model) for group in groups)
        slice_units(model, groups, keep)
    except Refusal as refusal:
        reason = str(refusal)
    else:
        reason = ""
    if reason:
        assert kind not in ALL.get(family, "").split()
        assert len(reason) > 40
        assert "\n" not in reason
        pytest.skip(f"refused: {reason}")
    found = euler(model, FAMILIES[family], 3)
    assert (found - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
    assert not torch.allclose(found, plain, atol=1e-3)
    assert parameters(model) == before - lost
    assert lost > 0


def test_all_kinds_at_once_and_both_parts_of_a_fused_projection():
    """FLUX.1's single blocks: one projection reads [attention, feed-forward], and loses columns of both."""
    model = build(FAMILIES["flux"])
    groups = read_units(model)
    keep = half(groups, seed=3)
    with masked(model, groups, {name: one.float() for name, one in keep.items()}):
        expected = euler(model, FAMILIES["flux"], 3)
    name = "single_transformer_blocks.0"
    heads, neurons = (int(keep[f"{name}.{part}"].sum()) for part in ("attn", "proj_mlp"))
    slice_units(model, groups, keep)
    assert torch.allclose(euler(model, FAMILIES["flux"], 3), expected, atol=1e-5)
    block = model.get_submodule(name)
    assert block.proj_out.in_features == 16 * heads + neurons
    assert block.attn.heads == heads
    assert block.attn.inner_dim == 16 * heads == block.attn.to_v.out_features


@pytest.mark.parametrize("kind", [MMDiT, DiT])
def test_a_cut_model_of_ours_is_saved_and_loaded(kind, tmp_path):
    torch.manual_seed(0)
    model = kind.tiny().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.2]))
    inputs += (Cond(text=torch.randn(2, 3, 12), pooled=torch.randn(2, 10), label=torch.tensor([0, 1])),)
    for seed, kinds in enumerate((KINDS, ("ffn", "mod"))):  # a second cut acts on the cut model
        groups = read_units(model, kinds)
        slice_units(model, groups, half(groups, seed))
        model.save_pretrained(tmp_path)
        loaded = kind.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(*inputs), model(*inputs))
        assert type(loaded) is kind
        assert [group.count for group in read_units(loaded)] == [group.count for group in read_units(model)]


def test_joint_attention_loses_a_head_in_both_streams():
    model = build(FAMILIES["mmdit"])
    group = read_units(model, ("heads",), r"double_blocks\.0")[0]
    assert [place.path for place in group.readers] == [
        "double_blocks.0.attn.to_out",
        "double_blocks.0.attn_text.to_out",
    ]
    slice_units(model, [group], {group.name: torch.tensor([False, True])})
    block = model.double_blocks[0]
    assert block.heads == 1
    assert block.attn_text.to_qkv.out_features == 3 * 8
    assert block.attn_text.to_out.in_features == 8
    assert block.attn.norm_q.weight.shape == (8,)


def test_what_cannot_be_cut_is_refused_by_name_and_left_whole():
    model = build(FAMILIES["wan"])
    groups = read_units(model, ("heads",))
    with pytest.raises(Refusal, match="norm over all heads"):
        slice_units(model, groups, half(groups))
    model = build(FAMILIES["lumina2"])
    with pytest.raises(Refusal, match="to_v"):
        slice_units(model, read_units(model, ("heads",)), half(read_units(model, ("heads",))))
    model = build(FAMILIES["mmdit"])
    groups, before = read_units(model, ("ffn",)), parameters(model)
    with pytest.raises(Refusal, match="keep at least one of its 64"):
        slice_units(model, groups, {groups[0].name: torch.zeros(64, dtype=torch.bool)})
    assert parameters(model) == before
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["proj_out"]))
    with pytest.raises(Refusal, match="plain linear layers"):
        slice_units(model, groups, half(groups))


def test_a_modulation_layer_may_lose_all_its_channels():
    model = build(FAMILIES["mmdit"])
    groups = read_units(model, ("mod",))
    slice_units(model, groups, {group.name: torch.zeros(group.count, dtype=torch.bool) for group in groups})
    assert all(isinstance(model.get_submodule(group.name), ScatteredLinear) for group in groups)
    assert torch.isfinite(euler(model, FAMILIES["mmdit"], 2)).all()


def test_an_entry_that_names_no_layer_is_refused():
    for shapes in ({"blocks.9.attn": {"in": 3}}, {"final_norm": {"in": 3}}):
        with pytest.raises(ValueError, match="pruned"):
            reshape(MMDiT.tiny(), shapes)
