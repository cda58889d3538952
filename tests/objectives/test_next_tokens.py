"""Teacher forcing: each place is asked for the next token, padding counts for nothing, labels are smoothed."""

import math

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.objectives.next_tokens import NextTokens

V = 10


def batch():
    target = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    source = torch.randint(3, V, (2, 5))
    extra = {"source": source, "source_mask": torch.ones_like(source, dtype=torch.bool)}
    return Batch(target, Cond(mask=target > 0, extra=extra), torch.arange(2))


def knows(one, wrong=False):
    def model(source, source_mask, target, mask):
        assert torch.equal(source, one.cond.extra["source"])
        assert torch.equal(target, one.x0[:, :-1])
        logits = torch.zeros(2, 3, V)
        logits.scatter_(2, one.x0[:, 1:, None], 40.0)
        if wrong:
            logits[1, 2] = 0  # where the shorter target has ended
        return logits

    return model


def loss(objective, model, one):
    return objective.loss(model, one, TrainState(), torch.Generator()).loss.item()


def test_the_next_token_counts_and_padding_does_not():
    one = batch()
    assert loss(NextTokens(0.0), knows(one), one) == pytest.approx(0, abs=1e-5)
    assert loss(NextTokens(0.0), knows(one, wrong=True), one) == pytest.approx(0, abs=1e-5)
    assert loss(NextTokens(0.0), lambda *_: torch.zeros(2, 3, V), one) == pytest.approx(math.log(V))


def test_smoothed_labels_punish_certainty():
    one = batch()
    assert loss(NextTokens(0.1), knows(one), one) == pytest.approx(0.1 * 40 * (V - 1) / V, rel=1e-3)
    with pytest.raises(UserError, match="label_smoothing is -1"):
        NextTokens(-1)
