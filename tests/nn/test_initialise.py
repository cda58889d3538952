"""Fresh weights: identity blocks, zero output, Xavier and normal where they belong."""

import math

import torch

from smalti.backbones.mmdit import MMDiT
from smalti.core.protocols import Cond


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity():
    model = MMDiT.tiny()
    cond = Cond(text=torch.randn(2, 3, 12), pooled=torch.randn(2, 10))
    assert model(torch.randn(2, 4, 4, 4), torch.rand(2), cond).abs().max() == 0
    seen = []
    block = model.single_blocks[0]
    block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model(torch.randn(2, 4, 4, 4), torch.rand(2), cond)
    assert torch.equal(*seen[0])


def test_distributions():
    model = MMDiT(num_double=1, num_single=1, num_labels=50)
    weight = model.single_blocks[0].attn.to_qkv.weight
    bound = math.sqrt(6 / sum(weight.shape))
    assert 0.95 * bound < weight.abs().max() <= bound
    for embedder in (model.time_embedder.mlp.linear_1, model.pooled_embedder.linear_2, model.label_embedder.table):
        assert abs(embedder.weight.std() - 0.02) < 0.001
    assert all(parameter.abs().max() == 0 for name, parameter in model.named_parameters() if name.endswith("bias"))
