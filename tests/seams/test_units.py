import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "families"))
from family import build, contract_families, euler

from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.seams.units import KINDS, masked, read_units

FAMILIES = contract_families()


def hooks_of(model):
    return {name: (len(one._forward_hooks), len(one._forward_pre_hooks)) for name, one in model.named_modules()}


def units_or_reason(model, kind):
    try:
        return read_units(model, (kind,)), ""
    except Refusal as refusal:
        return (), str(refusal)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_act_on_every_family_and_leave_nothing(family):
    model, plain, kinds = build(FAMILIES[family]), None, []
    hooks = hooks_of(model)
    for kind in KINDS:
        groups, reason = units_or_reason(model, kind)
        if reason:
            assert "\n" not in reason
            assert type(model).__name__ in reason
            continue
        kinds.append(kind)
        plain = euler(model, FAMILIES[family], 2) if plain is None else plain
        results = []
        for value in (1.0, 0.0):
            with masked(model, groups, {group.name: torch.full((group.count,), value) for group in groups}):
                results.append(euler(model, FAMILIES[family], 2))
        assert torch.equal(results[0], plain)
        assert not torch.equal(results[1], plain)
    assert torch.equal(euler(model, FAMILIES[family], 2), plain)
    assert {
        name: (len(one._forward_hooks), len(one._forward_pre_hooks)) for name, one in model.named_modules()
    } == hooks
    assert "ffn" in kinds or family in ("sana",)
    assert "heads" in kinds


def test_a_masked_head_is_zero_before_the_projection_and_a_neuron_behind_its_gate():
    model, seen = build(FAMILIES["flux"]), {}
    groups = {group.name: group for group in read_units(model)}
    block = model.transformer_blocks[1]
    block.attn.to_out[0].register_forward_pre_hook(lambda module, args: seen.update(image=args[0]))
    block.attn.to_add_out.register_forward_pre_hook(lambda module, args: seen.update(text=args[0]))
    model.single_transformer_blocks[0].proj_out.register_forward_pre_hook(
        lambda module, args: seen.update(joint=args[0])
    )
    names = ("transformer_blocks.1.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.0.proj_mlp")
    masks = {name: torch.ones(groups[name].count) for name in names}
    masks[names[0]][1], masks[names[1]][0], masks[names[2]][5] = 0, 0, 0

    def columns():
        euler(model, FAMILIES["flux"], 1)
        return {name: one.abs().amax((0, 1)) for name, one in seen.items()}

    plain = columns()
    with masked(model, [groups[name] for name in names], masks):
        hooks = [  # behind those of the masks
            model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0]}))
            for path in ("transformer_blocks.1.attn.to_out.0", "single_transformer_blocks.0.proj_out")
        ]
        found = columns()
        for hook in hooks:
            hook.remove()
    assert (plain["joint"] > 0).all()
    assert (found["transformer_blocks.1.attn.to_out.0"][16:] == 0).all()
    assert (found["transformer_blocks.1.attn.to_out.0"][:16] > 0).all()
    joint = found["single_transformer_blocks.0.proj_out"]
    assert (joint[:16] == 0).all()
    assert joint[32 + 5] == 0
    assert (joint == 0).sum() == 17


def test_gradients_flow_to_masks():
    model = build(FAMILIES["mmdit"])
    groups = read_units(model)
    masks = {group.name: torch.ones(group.count, requires_grad=True) for group in groups}
    arguments = FAMILIES["mmdit"].inputs(0, 1, (4, 6))
    with masked(model, groups, masks):
        model(**arguments).square().mean().backward()
    assert all(mask.grad is not None and mask.grad.abs().max() > 0 for mask in masks.values())


def test_groups_are_chosen_by_a_regular_expression():
    model = build(FAMILIES["mmdit"])
    assert {group.name for group in read_units(model, ("ffn",), r"single_blocks\.\d")} == {
        "single_blocks.0.ffn", "single_blocks.1.ffn"
    }  # fmt: skip
    with pytest.raises(UserError, match="look like double_blocks"):
        read_units(model, ("ffn",), "triple")
    with pytest.raises(UserError, match="unknown kind"):
        read_units(model, ("head",))


@pytest.mark.parametrize(("family", "kind", "word"), [("sana", "ffn", "convolutions"), ("wan", "mod", "one for all")])
def test_kinds_that_a_model_does_not_have_are_refused_by_name(family, kind, word):
    with pytest.raises(Refusal, match=word):
        read_units(build(FAMILIES[family]), (kind,))


def test_flux2_single_blocks_keep_attention_and_feed_forward_apart():
    groups = read_units(build(FAMILIES["flux2"]), ("heads",))
    assert not any("single" in group.name for group in groups)


def test_a_layer_that_is_not_called_as_a_module_is_noticed():
    model = build(FAMILIES["our-dit"])
    groups = read_units(model, ("ffn",))
    ffn = model.blocks[0].ffn
    ffn.forward = lambda x: nn.functional.linear(ffn.proj_in(x), ffn.proj_out.weight)
    masks = {group.name: torch.ones(group.count) for group in groups}
    with pytest.raises(NeverEngaged, match=r"blocks\.0\.ffn"), masked(model, groups, masks):
        euler(model, FAMILIES["our-dit"], 1)
