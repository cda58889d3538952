"""Blocks compute what their order says: written out by hand, for every norm, modulation and stream."""

import pytest
import torch
from torch.nn import functional as F

from smalti.backbones.block import JointBlock, TransformerBlock
from smalti.backbones.block_order import ORDERS
from smalti.core.errors import UserError
from smalti.nn.block_attention import BlockContext
from smalti.nn.ffn import FeedForward
from smalti.nn.modulation import Modulation, modulated_norm
from smalti.nn.rope import grid_rope

D = 16


def awake(module):
    """Random weights everywhere: fresh gates are zero."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def inputs():
    return torch.randn(2, 5, D), BlockContext(activated=torch.randn(2, D))


def test_macaron_by_hand():
    block = awake(TransformerBlock(D, 2, order="macaron"))
    x, context = inputs()
    a, attn, b = block.modulation(context.activated)
    y = x + 0.5 * a.gate * block.ffn_a(modulated_norm(x, a.shift, a.scale))
    y = y + attn.gate * block.attn(modulated_norm(y, attn.shift, attn.scale), context)
    y = y + 0.5 * b.gate * block.ffn_b(modulated_norm(y, b.shift, b.scale))
    torch.testing.assert_close(block(x, context), y)
    assert block.ffn_a.proj_in.out_features == block.ffn_b.proj_in.out_features == 2 * D
    assert block.modulation.linear.out_features == 9 * D


def test_standard_by_hand():
    block = awake(TransformerBlock(D, 2, ffn_norm_eps=0.5))
    x, context = inputs()
    attn, ffn = block.modulation(context.activated)
    y = x + attn.gate * block.attn(modulated_norm(x, attn.shift, attn.scale), context)
    y = y + ffn.gate * block.ffn(modulated_norm(y, ffn.shift, ffn.scale, 0.5))
    torch.testing.assert_close(block(x, context), y)


def test_side_by_side_has_one_norm_and_one_gate():
    block = awake(TransformerBlock(D, 2, order="parallel"))
    x, context = inputs()
    (triple,) = block.modulation(context.activated)
    normed = modulated_norm(x, triple.shift, triple.scale)
    torch.testing.assert_close(block(x, context), x + triple.gate * (block.attn(normed, context) + block.ffn(normed)))


@pytest.mark.parametrize("norm", ["pre", "post", "sandwich"])
def test_norms_by_hand(norm):
    block = awake(TransformerBlock(D, 2, order="macaron", norm=norm, modulation="none"))
    x, context = torch.randn(2, 5, D), BlockContext()
    y = x
    for index, (part, factor) in enumerate(
        ((block.ffn_a, 0.5), (lambda z: block.attn(z, context), 1), (block.ffn_b, 0.5))
    ):
        before, after = block.norms[index], block.out_norms[index] if norm == "sandwich" else None
        update = part(y if norm == "post" else before(y))
        y = y + factor * (after(update) if after else update)
        y = before(y) if norm == "post" else y
    torch.testing.assert_close(block(x, context), y)


def test_fresh_blocks_are_the_identity():
    """Gates start at zero, own or shared."""
    x, context = inputs()
    for name in ("standard", "macaron", "reversed", "parallel"):
        shared = Modulation(D, len(ORDERS[name]))
        block = TransformerBlock(D, 2, order=name)
        for modulation in (shared, block.modulation):
            torch.nn.init.zeros_(modulation.linear.weight)
            torch.nn.init.zeros_(modulation.linear.bias)
        assert torch.equal(block(x, context), x)
        given = BlockContext(activated=shared.linear(context.activated))
        assert torch.equal(TransformerBlock(D, 2, order=name, modulation="shared")(x, given), x)


def test_a_shared_modulation_with_its_table_is_an_own_one():
    own = awake(TransformerBlock(D, 2, order="macaron"))
    shared = TransformerBlock(D, 2, order="macaron", modulation="shared")
    state = {name: tensor for name, tensor in own.state_dict().items() if "modulation" not in name}
    shared.load_state_dict({**state, "modulation.table": own.modulation.linear.bias})
    x, context = inputs()
    given = F.linear(context.activated, own.modulation.linear.weight)
    torch.testing.assert_close(shared(x, BlockContext(activated=given)), own(x, context))


def test_cross_attention_looks_at_the_memory_alone():
    block = awake(TransformerBlock(D, 2, order=[("attn", 1), ("cross", 1), ("ffn", 1)], modulation="none"))
    x, memory = torch.randn(2, 5, D), torch.randn(2, 4, D)
    mask = torch.tensor([[True, True, True, False]] * 2)
    out = block(x, BlockContext(memory=memory, memory_mask=mask))
    torch.testing.assert_close(out, block(x, BlockContext(memory=memory[:, :3])))
    assert not torch.allclose(out, block(x, BlockContext(memory=memory + 1, memory_mask=mask)))
    with pytest.raises(UserError, match="memory"):
        block(x, BlockContext())


def test_masked_tokens_are_as_if_they_were_not_there():
    block = awake(TransformerBlock(D, 2, order="macaron", modulation="none"))
    x = torch.randn(2, 5, D)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    torch.testing.assert_close(block(x, BlockContext(mask=mask))[:, :3], block(x[:, :3], BlockContext()))


def test_other_parts():
    block = TransformerBlock(D, 2, order="macaron", parts={"ffn_a": lambda: FeedForward(D, 1.0), "attn": Negative})
    assert [block.ffn_a.proj_in.out_features, block.ffn_b.proj_in.out_features] == [D, 2 * D]
    assert isinstance(block.attn, Negative)


class Negative(torch.nn.Module):
    def forward(self, x, context):
        return -x


def test_dropout_only_in_training():
    block = awake(TransformerBlock(D, 2, modulation="none", dropout=0.5))
    x = torch.randn(2, 5, D)
    assert not torch.equal(block(x, BlockContext()), block(x, BlockContext()))
    block.eval()
    assert torch.equal(block(x, BlockContext()), block(x, BlockContext()))


def joint_inputs():
    text, image = torch.randn(2, 3, D), torch.randn(2, 6, D)
    rope = grid_rope(3, 2, 3, (2, 2, 4), torch.device("cpu"))
    return text, image, BlockContext(torch.randn(2, D), rope)


def test_a_standard_joint_block_by_hand():
    block = awake(JointBlock(D, 2))
    text, image, context = joint_inputs()
    (ta, tf), (ia, jf) = block.modulation_text(context.activated), block.modulation(context.activated)
    normed = modulated_norm(image, ia.shift, ia.scale), modulated_norm(text, ta.shift, ta.scale)
    i_out, t_out = block.attn(normed[0], 2, context, text=normed[1], of_text=block.attn_text)
    t, i = text + ta.gate * t_out, image + ia.gate * i_out
    t = t + tf.gate * block.ffn_text(modulated_norm(t, tf.shift, tf.scale))
    i = i + jf.gate * block.ffn(modulated_norm(i, jf.shift, jf.scale))
    got = block(text, image, context)
    torch.testing.assert_close(got.text, t)
    torch.testing.assert_close(got.image, i)


def test_a_macaron_joint_block_by_hand():
    block = awake(JointBlock(D, 2, order="macaron"))
    text, image, context = joint_inputs()
    (ta, tm, tb), (ia, im, ib) = block.modulation_text(context.activated), block.modulation(context.activated)
    t = text + 0.5 * ta.gate * block.ffn_a_text(modulated_norm(text, ta.shift, ta.scale))
    i = image + 0.5 * ia.gate * block.ffn_a(modulated_norm(image, ia.shift, ia.scale))
    normed = modulated_norm(i, im.shift, im.scale), modulated_norm(t, tm.shift, tm.scale)
    i_out, t_out = block.attn(normed[0], 2, context, text=normed[1], of_text=block.attn_text)
    t, i = t + tm.gate * t_out, i + im.gate * i_out
    t = t + 0.5 * tb.gate * block.ffn_b_text(modulated_norm(t, tb.shift, tb.scale))
    i = i + 0.5 * ib.gate * block.ffn_b(modulated_norm(i, ib.shift, ib.scale))
    got = block(text, image, context)
    torch.testing.assert_close(got.text, t)
    torch.testing.assert_close(got.image, i)


def test_refuses_by_name():
    with pytest.raises(UserError, match="norm placement"):
        TransformerBlock(D, 2, norm="before")
    with pytest.raises(UserError, match="modulation"):
        TransformerBlock(D, 2, modulation="some")
    with pytest.raises(UserError, match="after the sum"):
        TransformerBlock(D, 2, norm="post")
    with pytest.raises(UserError, match="leave cross out"):
        JointBlock(D, 2, order=[("attn", 1), ("cross", 1), ("ffn", 1)])
