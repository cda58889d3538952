"""Two times in a sample, by their formula, and a sample before both."""

import pytest
import torch

from smalti.backbones.dit import DiT
from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.objectives.two_groups import GROUPS, LesserPairs, TwoGroupFlowMatching, token_map


def call(objective=None, count=6):
    torch.manual_seed(0)
    seen = {}

    def denoiser(x, t, cond):
        seen.update(x=x, t=t, groups=cond.extra[GROUPS])
        return torch.zeros_like(x)

    batch = Batch(torch.randn(count, 4, 8, 8), Cond(), torch.arange(count))
    result = (objective or TwoGroupFlowMatching()).loss(denoiser, batch, TrainState(), generators_for(range(count)))
    return batch, seen, result


def test_each_token_is_at_the_time_of_its_group():
    batch, seen, result = call()
    assert seen["t"].shape == seen["groups"].shape == (6, 16)
    for row in range(6):
        assert len(seen["t"][row][seen["groups"][row]].unique()) == 1
        assert len(seen["t"][row].unique()) == 2
    at = token_map(seen["t"], batch.x0, 2)
    noise = (seen["x"] - (1 - at) * batch.x0) / at
    assert abs(noise.std() - 1) < 0.1
    assert torch.allclose(result.loss, (noise - batch.x0).square().mean(), rtol=1e-3)


def test_the_average_sees_the_same_noise_at_one_time_before_both():
    batch, seen, _ = call()
    pair = LesserPairs().draw(batch.x0, seen["x"], seen["t"], generators_for(range(6)))
    assert torch.equal(pair.t, seen["t"].amin(1))
    at = token_map(seen["t"], batch.x0, 2)
    noise = (seen["x"] - (1 - at) * batch.x0) / at
    s = pair.t.view(-1, 1, 1, 1)
    assert torch.allclose(pair.x, (1 - s) * batch.x0 + s * noise, atol=1e-4)
    earlier = LesserPairs(largest=0.2).draw(batch.x0, seen["x"], seen["t"], generators_for(range(6)))
    assert (earlier.t <= pair.t).all()


def test_times_of_tokens_lie_over_their_patches():
    model = DiT.tiny().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    spread = token_map(torch.arange(16.0)[None], torch.zeros(1, 4, 8, 8), 2)
    assert spread.shape == (1, 1, 8, 8)
    assert spread[0, 0, 2, 5] == 4 + 2
    cond = Cond(label=torch.tensor([0]), pooled=torch.zeros(1, 10))
    batch = Batch(torch.randn(1, 4, 8, 8), cond, torch.arange(1))
    result = TwoGroupFlowMatching().loss(model, batch, TrainState(), generators_for([0]))
    assert torch.isfinite(result.loss)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="share above 0"):
        TwoGroupFlowMatching(share=1.0)
