"""Less noise of the same draw, in a discrete process, and SRA beside DDPM with learned variances."""

import pytest
import torch

from smalti.backbones.dit import DiT
from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.objectives.beta_pairs import BetaPairs
from smalti.objectives.beta_process import BetaProcess, take
from smalti.objectives.ddpm import DDPM
from smalti.training.alignment import AlignedModel, AlignedObjective
from smalti.training.ema import EMA
from smalti.training.sra import SelfAlignment, SRASettings


def test_data_and_noise_are_the_same_at_whole_earlier_timesteps():
    torch.manual_seed(0)
    process, index = BetaProcess(), torch.tensor([0, 1, 2, 150, 500, 999] * 4)
    x0, noise = torch.randn(2, len(index), 3, 4, 4).unbind(0)
    z = take(process.alphas, index, x0) * x0 + take(process.sigmas, index, x0) * noise
    pair = BetaPairs(process).draw(x0, z, index / 1000, generators_for(range(len(index))))
    earlier = (pair.t * 1000).round().long()
    assert torch.allclose(pair.t * 1000, earlier.float(), atol=1e-3)
    assert (earlier <= index).all()
    assert (index - earlier < 200).all()
    assert (earlier[index > 0] >= 1).all()
    assert (index - earlier).max() > 100
    wanted = take(process.alphas, earlier, x0) * x0 + take(process.sigmas, earlier, x0) * noise
    assert torch.allclose(pair.x, wanted, atol=1e-3)


def test_the_term_stands_beside_the_loss_of_noise_and_the_bound():
    torch.manual_seed(0)
    network = DiT(in_channels=4, depth=2, heads=2, head_dim=8, num_labels=3, base_size=4, learn_sigma=True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    process = BetaProcess()
    model = AlignedModel(network, [SelfAlignment(16, SRASettings(1, 2, pairs=BetaPairs(process)))])
    objective = AlignedObjective(DDPM(process, learned_variance=True), model)
    batch = Batch(torch.randn(4, 4, 8, 8), Cond(label=torch.tensor([0, 1, 2, 3])), torch.arange(4))
    state = TrainState(0, EMA(network, 0.9).model)
    result = objective.loss(model, batch, state, generators_for(range(4)))
    alone = DDPM(process, learned_variance=True).loss(network, batch, TrainState(), generators_for(range(4)))
    assert {"noise", "bound", "self distance"} <= result.metrics.keys()
    assert torch.allclose(result.loss, alone.loss + 0.5 * result.metrics["self distance"], atol=1e-5)
    result.loss.backward()
    assert model.terms[0].head[0].weight.grad.abs().sum() > 0


def test_mistakes_are_named():
    with pytest.raises(UserError, match="above 0"):
        BetaPairs(largest=0)
