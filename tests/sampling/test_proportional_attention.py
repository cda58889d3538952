import math

import pytest
import torch
from torch.nn import functional as F

import smalti
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond
from smalti.sampling.proportional_attention import ProportionalAttention


def model_and_inputs():
    torch.manual_seed(0)
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, (torch.randn(1, 4, 8, 8), torch.tensor([0.5]), Cond(torch.randn(1, 5, 12), torch.randn(1, 10)))


@torch.no_grad()
def test_scores_are_scaled_by_the_length_of_the_sequence(monkeypatch):
    model, inputs = model_and_inputs()  # 16 + 5 tokens
    plain = F.scaled_dot_product_attention

    def scaled(q, k, v, *args, **kwargs):
        return plain(q, k, v, *args, **{**kwargs, "scale": math.sqrt(math.log(21, 6) / 8)})

    with smalti.apply(model, ProportionalAttention(trained=6)) as handle:
        found = model(*inputs)
        assert handle.report().methods[0].events == {"scaled": 3}
    before = model(*inputs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled)
    assert torch.allclose(found, model(*inputs), atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-4)


@torch.no_grad()
def test_at_the_trained_length_nothing_changes():
    model, inputs = model_and_inputs()
    before = model(*inputs)
    for method in (ProportionalAttention.neutral(), ProportionalAttention(trained=21)):
        with smalti.apply(model, method) as handle:
            assert torch.equal(model(*inputs), before)
            handle.remove(check=False)


@pytest.mark.parametrize("trained", [1, -4])
def test_a_length_without_a_logarithm_is_refused(trained):
    with pytest.raises(UserError, match=f"trained={trained}"):
        ProportionalAttention(trained)
