import pytest
import torch
from torch import nn
from toy_training import ToyDenoiser

from smalti.training.ema import EMA


def test_average_follows_the_ramp_and_then_the_decay():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema = EMA(model, decay=0.5)
    expected = 0.0
    for n in range(12):
        nn.init.constant_(model.weight, float(n))
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert ema.updates == 12


def test_average_stays_float32_in_evaluation_mode_without_gradients():
    model = ToyDenoiser().to(torch.bfloat16)
    ema = EMA(model, decay=0.9999)
    ema.update()
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training
    assert model.training


def test_buffers_are_copied_and_the_average_can_be_written_back():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, decay=0.9)
    model(torch.randn(8, 2) + 3)
    nn.init.constant_(model.weight, 5.0)
    ema.update()
    torch.testing.assert_close(ema.model.running_mean, model.running_mean)
    ema.copy_to(model)
    torch.testing.assert_close(model.weight, torch.full((2,), 0.1 * 1 + 0.9 * 5))  # first decay is 0.1


def test_the_average_is_no_view_of_the_model():
    model = nn.Linear(2, 2)
    before = EMA(model, 0.9).model.weight.clone()
    ema = EMA(model, 0.9)
    nn.init.zeros_(model.weight)
    assert torch.equal(ema.model.weight, before)
