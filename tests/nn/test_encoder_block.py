import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from smalti.nn.encoder_block import EncoderBlock, draw_linear_weights


def test_it_is_the_formula():
    torch.manual_seed(0)
    block, x = EncoderBlock(12, 3, ffn_ratio=2), torch.randn(2, 5, 12)
    q, k, v = (part.view(2, 5, 3, 4).transpose(1, 2) for part in block.attn.to_qkv(layer_norm(x, (12,))).chunk(3, -1))
    y = x + block.attn.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12))
    wanted = y + block.ffn.proj_out(gelu(block.ffn.proj_in(layer_norm(y, (12,))), approximate="tanh"))
    assert torch.allclose(block(x), wanted, atol=1e-5)


def test_weights_are_drawn_without_biases():
    block = EncoderBlock(12, 3)
    draw_linear_weights(block)
    assert block.attn.to_out.bias.abs().max() == 0
    assert 0.3 < block.attn.to_out.weight.abs().max() < (6 / 24) ** 0.5 + 1e-6
