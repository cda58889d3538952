import torch
from torch import nn
from torch.nn import functional as F

from smalti.backbones.mmdit import MMDiT
from smalti.core.protocols import Cond
from smalti.evaluation.flops import count_flops


def test_attention_is_counted_on_the_cpu():
    q, k = torch.randn(2, 3, 17, 8), torch.randn(2, 3, 29, 8)
    expected = 2 * 2 * 3 * 17 * 29 * (8 + 8)
    for mask in (None, torch.rand(17, 29) > 0.3):
        found = count_flops(lambda mask=mask: F.scaled_dot_product_attention(q, k, k, attn_mask=mask))
        assert (found.products, found.attention) == (0, expected)


def test_products_forward_and_backward():
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    assert count_flops(lambda: layer(x)).total == 2 * 3 * 5 * 7
    assert count_flops(lambda: layer(x).sum().backward()).total == 2 * 2 * 3 * 5 * 7


def test_our_transformer_under_no_grad():
    model = MMDiT.tiny()
    cond = Cond(text=torch.zeros(1, 3, 12), pooled=torch.zeros(1, 10))
    with torch.no_grad():
        found = count_flops(lambda: model(torch.zeros(1, 4, 8, 8), torch.tensor([0.5]), cond))
    tokens, blocks = 16 + 3, 3
    assert found.attention == blocks * 4 * tokens**2 * 16
    assert found.products > blocks * 24 * tokens * 16**2
