"""Tiny models and the loop around them, shared by the tests of this folder."""

import pytest
import torch

import smalti
from smalti.backbones.mmdit import MMDiT
from smalti.core.protocols import Cond

TEXT = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
POOLED = torch.randn(2, 10, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MMDiT.tiny().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def predict(model):
    """The velocity (2, 4, 8, 12) of two samples with texts of their own, under methods if any."""

    @torch.no_grad()
    def predict(*methods, rows=(0, 1), t=0.5):
        index = list(rows)
        x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(3))[index]
        arguments = x, torch.full((len(index),), t), Cond(text=TEXT[index], pooled=POOLED[index])
        if not methods:
            return model(*arguments)
        with smalti.apply(model, *methods):
            return model(*arguments)

    return predict
