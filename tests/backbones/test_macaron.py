"""Conversion keeps what it says it keeps; splittings have their orders with exact sub-flows, and 1 as Euler steps."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from smalti.backbones.block import JointBlock, TransformerBlock
from smalti.backbones.block_order import count_parameters, read_order
from smalti.backbones.dit import DiT
from smalti.backbones.macaron import (
    SHAPES,
    ReluFeedForward,
    ToySystem,
    reference_parts,
    refine,
    split_ffn,
    splitting_errors,
    to_macaron,
    toy_system,
)
from smalti.backbones.text_transformer import MaskedLanguageModel, TextShape, Translator
from smalti.core.errors import Refusal, UserError
from smalti.core.protocols import Cond
from smalti.nn.block_attention import BlockContext
from smalti.nn.ffn import FeedForward
from smalti.nn.rope import grid_rope
from smalti.seams.anatomy import read_anatomy

D, STEPS = 16, (16, 32, 64, 128)


def awake(module, std=0.3):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def ratios(order, exact, **more):
    errors = splitting_errors(order, STEPS, exact, **more)
    return [one / other for one, other in pairwise(errors)]


@pytest.mark.parametrize("order", ["lie-trotter", "reversed"])
def test_lie_trotter_is_of_order_one(order):
    assert ratios(order, exact=True) == pytest.approx([2.0] * 3, rel=0.1)


def test_strang_is_of_order_two():
    assert ratios("macaron", exact=True) == pytest.approx([4.0] * 3, rel=0.1)
    assert ratios([("attn", 0.5), ("ffn", 1), ("attn", 0.5)], exact=True) == pytest.approx([4.0] * 3, rel=0.1)


def test_without_its_halves_macaron_does_not_converge():
    """Two whole feed-forward layers are another system."""
    errors = splitting_errors([("ffn", 1), ("attn", 1), ("ffn", 1)], STEPS, exact=True)
    assert min(errors) > 0.5


@pytest.mark.parametrize("order", ["lie-trotter", "macaron"])
def test_with_euler_steps_both_are_of_order_one(order):
    assert ratios(order, exact=False) == pytest.approx([2.0] * 3, rel=0.1)


def test_parts_that_commute_have_no_splitting_error():
    toy = toy_system()
    same = ToySystem(toy.interaction, 2 * toy.interaction, toy.start)
    assert max(splitting_errors("lie-trotter", STEPS, True, same)) < 1e-10
    assert max(splitting_errors("lie-trotter", STEPS, True)) > 1e-4


def test_the_toy_system_refuses_what_it_has_not():
    with pytest.raises(UserError, match=r"attn\+ffn"):
        splitting_errors("parallel", STEPS, True)


@pytest.mark.parametrize("order", ["standard", "macaron"])
def test_a_network_is_of_order_one_in_depth(order):
    """Euler steps in the sublayers: halving the step halves the distance to the limit, Macaron or not."""
    blocks = [awake(TransformerBlock(D, 2, order=order, modulation="none").double(), 0.15) for _ in range(2)]
    start = torch.randn(1, 5, D, dtype=torch.float64)

    def run(times):
        x = start
        for block in refine(blocks, times):
            x = block(x, BlockContext())
        return x

    with torch.no_grad():
        assert torch.equal(run(1), blocks[1](blocks[0](start, BlockContext()), BlockContext()))
        limit = run(512)
        errors = [(run(times) - limit).norm() for times in (8, 16, 32)]
    assert [one / other for one, other in pairwise(errors)] == pytest.approx([2.0, 2.0], rel=0.1)


def test_two_halves_are_the_old_layer():
    ffn, x = awake(FeedForward(D, 3.0)), torch.randn(2, 5, D)
    a, b = split_ffn(ffn)
    torch.testing.assert_close(0.5 * a(x) + 0.5 * b(x), ffn(x))
    assert count_parameters(a) + count_parameters(b) == count_parameters(ffn) + D  # one bias more
    with pytest.raises(Refusal, match="no halves"):
        split_ffn(FeedForward(D, 15 / D))


def converted(**settings):
    old = awake(TransformerBlock(D, 2, **settings))
    return old, to_macaron(old)


@pytest.mark.parametrize("settings", [{}, {"modulation": "none"}], ids=str)
def test_left_in_place_the_halves_sum_exactly(settings):
    """Behind attention, side by side, both halves are the old layer; what is not exact is the move of the first."""
    old, new = converted(**settings)
    still = TransformerBlock(D, 2, order=[("attn", 1), ("ffn+ffn", 0.5)], **settings)
    state = {name: tensor for name, tensor in old.state_dict().items() if not name.startswith("ffn.")}
    still.load_state_dict(state | {name: one for name, one in new.state_dict().items() if name.startswith("ffn_")})
    x, context = torch.randn(2, 5, D), BlockContext(activated=torch.randn(2, D))
    torch.testing.assert_close(still(x, context), old(x, context), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(new(x, context), old(x, context), rtol=1e-2, atol=1e-2)


def test_a_converted_block_is_near_and_only_near():
    """By a part of what the block adds: the smaller its updates, the nearer, because the halves then see the same."""
    changes = []
    for std in (0.2, 0.1, 0.05):
        torch.manual_seed(3)
        old = awake(TransformerBlock(D, 2, modulation="none"), std)
        x, context = torch.randn(4, 7, D), BlockContext()
        with torch.no_grad():
            kept, got = old(x, context), to_macaron(old)(x, context)
        changes.append(((got - kept).norm() / (kept - x).norm()).item())
    assert 0.02 < changes[0] < 0.8  # not exact: the first half no longer sees what attention brought
    assert changes[2] < changes[1] < changes[0]


def test_a_converted_block_has_the_order_and_the_names_of_a_fresh_one():
    for settings in ({}, {"modulation": "shared"}, {"modulation": "none"}):
        old, new = converted(**settings)
        fresh = TransformerBlock(D, 2, order="macaron", **settings)
        shapes = [(name, tensor.shape) for name, tensor in new.state_dict().items()]
        assert shapes == [(name, tensor.shape) for name, tensor in fresh.state_dict().items()]
        assert new.order == read_order("macaron")
        assert old.order == read_order("standard")


def test_a_decoder_block_keeps_both_attentions_between_its_halves():
    old = awake(TransformerBlock(D, 2, order=[("attn", 1), ("cross", 1), ("ffn", 1)], modulation="none"))
    new = to_macaron(old)
    assert [name for name, _ in new.order] == ["ffn", "attn", "cross", "ffn"]
    assert torch.equal(new.norms[0].weight, old.norms[2].weight)
    assert torch.equal(new.norms[2].weight, old.norms[1].weight)


def test_both_streams_of_a_joint_block():
    old = awake(JointBlock(D, 2))
    new = to_macaron(old)
    fresh = JointBlock(D, 2, order="macaron")
    assert [*new.state_dict()] == [*fresh.state_dict()]
    fresh.load_state_dict(new.state_dict())
    given = torch.randn(2, 3, D), torch.randn(2, 6, D)
    context = BlockContext(torch.randn(2, D), grid_rope(3, 2, 3, (2, 2, 4), torch.device("cpu")))
    for one, other in zip(new(*given, context), fresh(*given, context)):
        assert torch.equal(one, other)
    a, b = split_ffn(old.ffn_text)
    assert torch.equal(new.ffn_a_text.proj_out.weight, a.proj_out.weight)
    assert torch.equal(new.ffn_b_text.proj_in.weight, b.proj_in.weight)
    rows = old.modulation_text.linear.weight.chunk(2)
    assert torch.equal(new.modulation_text.linear.weight, torch.cat([rows[1], rows[0], rows[1]]))


@pytest.mark.parametrize(
    "changes", [{"modulation": "own"}, {"modulation": "shared"}, {"modulation": "shared", "text_dim": 12}], ids=str
)
def test_a_whole_model(changes, tmp_path):
    config = {name: value for name, value in DiT.tiny().config.items() if not name.startswith("_")}
    old = awake(DiT(**config | changes))
    new = to_macaron(old)
    text = torch.randn(2, 3, 12) if "text_dim" in changes else None
    x, t, cond = torch.randn(2, 4, 6, 8), torch.rand(2), Cond(text=text, pooled=torch.randn(2, 10))
    out = new(x, t, cond)
    assert out.isfinite().all()
    assert not torch.equal(out, old(x, t, cond))
    assert old.config["block_order"] == "standard"
    assert new.config["block_order"] == "macaron"
    new.save_pretrained(tmp_path)
    assert torch.equal(DiT.from_pretrained(tmp_path)(x, t, cond), out)


def test_models_of_text():
    shape = TextShape(20, width=D, depth=2, heads=2)
    for model in (MaskedLanguageModel(shape), Translator(shape)):
        new = to_macaron(model)
        blocks = [one for one in new.modules() if isinstance(one, TransformerBlock)]
        assert blocks
        assert all(block.order[0] == ("ffn", 0.5) == block.order[-1] for block in blocks)


def test_refuses_what_has_no_macaron_form():
    with pytest.raises(Refusal, match="Linear has no TransformerBlock"):
        to_macaron(nn.Linear(2, 2))
    with pytest.raises(Refusal, match="one FeedForward"):
        to_macaron(TransformerBlock(D, 2, order="macaron"))
    for norm in ("post", "sandwich"):
        with pytest.raises(Refusal, match=f"norms in {norm}"):
            to_macaron(TransformerBlock(D, 2, norm=norm, modulation="none"))
    with pytest.raises(Refusal, match="before"):
        refine([TransformerBlock(D, 2, norm="post", modulation="none")], 2)


def test_the_reference_bert_has_two_activations():
    block = TransformerBlock(D, 2, order="macaron", modulation="none", parts=reference_parts(D))
    assert isinstance(block.ffn_a, ReluFeedForward)
    assert isinstance(block.ffn_b, FeedForward)
    plain = TransformerBlock(D, 2, order="macaron", modulation="none")
    assert type(plain.ffn_a) is type(plain.ffn_b) is FeedForward
    assert count_parameters(block) == count_parameters(plain)


def test_the_shapes_of_the_paper():
    halves = {"iwslt": 512, "wmt-base": 1024, "wmt-big": 2048, "bert-base": 1536, "small": 256}
    for name, half in halves.items():
        shape = TextShape(10, order="macaron", **SHAPES[name])
        with torch.device("meta"):
            block = TransformerBlock(shape.width, shape.heads, shape.ffn_ratio, shape.order, modulation="none")
        assert block.ffn_a.proj_in.out_features == block.ffn_b.proj_in.out_features == half


@pytest.mark.parametrize(
    "order", ["macaron", "reversed", "parallel", [["attn", 1.0], ["ffn", 0.5], ["ffn", 0.5]]], ids=str
)
@pytest.mark.parametrize("modulation", ["own", "shared"])
def test_a_dit_of_any_order(order, modulation, tmp_path):
    config = {name: value for name, value in DiT.tiny().config.items() if not name.startswith("_")}
    model = DiT(**config | {"block_order": order, "modulation": modulation})
    x, t, cond = torch.randn(2, 4, 6, 8), torch.rand(2), Cond(pooled=torch.randn(2, 10))
    assert torch.equal(model(x, t, cond), torch.zeros_like(x))  # as every fresh DiT
    awake(model)(x, t, cond).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    model.save_pretrained(tmp_path)
    assert torch.equal(DiT.from_pretrained(tmp_path)(x, t, cond), model(x, t, cond))


def test_methods_find_the_sublayers_of_a_macaron_dit():
    model = DiT(depth=2, heads=2, head_dim=8, block_order="macaron")
    sites = read_anatomy(model).reading.of_kind("attention", "ffn")
    assert [(site.index, site.name) for site in sites] == [
        (index, name) for index in range(2) for name in ("ffn_a", "attn", "ffn_b")
    ]
    with pytest.raises(UserError, match="modulation of a DiT 'none'"):
        DiT(modulation="none")
