"""A method that is only asked changes nothing, and its answers are held against the truth."""

import torch

import smalti
from smalti.acceleration.confidence_gated_taylor import ConfidenceGatedTaylor
from smalti.backbones.mmdit import MMDiT
from smalti.core.protocols import Cond
from smalti.evaluation.foregone import Foregone


@torch.no_grad()
def test_errors_are_those_of_answers_that_were_not_used():
    model = MMDiT.tiny().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    cond = Cond(text=torch.ones(1, 5, 12), pooled=torch.ones(1, 10))
    method = ConfidenceGatedTaylor(order=0, forced=(3, 4))
    watch, last = Foregone(method), []
    model.single_blocks[-1].register_forward_hook(lambda module, inputs, output: last.append(output))

    def loop():
        x = torch.ones(1, 4, 4, 6)
        for t in torch.linspace(1, 0.2, 6).tolist():
            x = x - 0.16 * model(x, torch.tensor([t]), cond)
        return x

    plain = loop()
    last.clear()
    with smalti.apply(model, watch):
        assert torch.equal(loop(), plain)
    last = last[-6:]  # the first call is read for its layout
    assert [method.traces[0].full[index] for index in range(6)] == [True, True, True, False, False, True]
    expected = [(last[2] - last[k]).abs().mean() / last[k].abs().mean() for k in (3, 4)]
    assert torch.allclose(torch.tensor([watch.errors["0", k] for k in (3, 4)]), torch.stack(expected))
    assert all(watch.errors["0", k] == 0 for k in (0, 1, 2, 5))
