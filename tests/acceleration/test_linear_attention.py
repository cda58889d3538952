import pytest
import torch

import smalti
from smalti.acceleration.linear_attention import LinearAttention
from smalti.backbones.mmdit import MMDiT
from smalti.core.errors import UserError
from smalti.core.protocols import Cond


def test_every_second_attention_is_linear():
    torch.manual_seed(0)
    model = MMDiT.tiny().eval()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([0.5]), Cond(text=torch.randn(1, 5, 12), pooled=torch.randn(1, 10)))
    for every, count in ((1, 3), (2, 2)):
        with smalti.apply(model, LinearAttention(every)) as handle, torch.no_grad():
            model(*inputs)
        assert handle.report().methods[0].events == {"linear": count}


def test_a_number_below_zero_is_refused():
    with pytest.raises(UserError, match="every=-1"):
        LinearAttention(-1)
