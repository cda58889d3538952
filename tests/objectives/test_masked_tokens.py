"""What is hidden, how, and what the loss counts."""

import math

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.objectives.masked_tokens import MaskedTokens

V, MASK, ORDINARY = 30, 1, (5, 30)


def batch(rows=64, length=40, real=32):
    tokens = torch.randint(*ORDINARY, (rows, length))
    mask = torch.arange(length).expand(rows, -1) < real
    return Batch(tokens, Cond(mask=mask), torch.arange(rows))


def test_the_share_of_real_tokens_is_chosen():
    objective, one = MaskedTokens(MASK, ORDINARY, 0.25), batch()
    hidden, chosen = objective.hide(one.x0, one.cond.mask, generators_for(range(64)))
    assert (chosen.sum(1) == 8).all()
    assert not chosen[:, 32:].any()
    assert torch.equal(hidden[~chosen], one.x0[~chosen])


def test_of_the_chosen_most_are_masked_some_changed_some_kept():
    objective, one = MaskedTokens(MASK, ORDINARY, 0.5), batch(256)
    hidden, chosen = objective.hide(one.x0, one.cond.mask, generators_for(range(256)))
    masked, kept = hidden[chosen] == MASK, hidden[chosen] == one.x0[chosen]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert kept.float().mean().item() == pytest.approx(0.1 + 0.1 / 25, abs=0.02)
    assert hidden[chosen][~masked].min() >= ORDINARY[0]


def test_even_the_shortest_text_has_something_to_guess():
    one = batch(4, 6, real=1)
    _, chosen = MaskedTokens(MASK, ORDINARY).hide(one.x0, one.cond.mask, generators_for(range(4)))
    assert (chosen.sum(1) == 1).all()


def test_a_text_does_not_depend_on_its_batch():
    objective, one = MaskedTokens(MASK, ORDINARY), batch(8)
    hidden, _ = objective.hide(one.x0, one.cond.mask, generators_for(range(8)))
    alone, _ = objective.hide(one.x0[3:4], one.cond.mask[3:4], generators_for([3]))
    assert torch.equal(hidden[3:4], alone)


def test_the_loss_counts_chosen_places_alone():
    objective, one = MaskedTokens(MASK, ORDINARY), batch()
    _, chosen = objective.hide(one.x0, one.cond.mask, generators_for(range(64)))

    def knows(where):
        logits = torch.zeros(*one.x0.shape, V)
        logits.scatter_(2, one.x0[..., None], 50.0 * where[..., None])
        return lambda tokens, mask: logits

    losses = [
        objective.loss(knows(where.float()), one, TrainState(), generators_for(range(64))).loss.item()
        for where in (chosen, ~chosen)
    ]
    assert losses == pytest.approx([0.0, math.log(V)], abs=1e-4)
    smooth = MaskedTokens(MASK, ORDINARY, label_smoothing=0.1)
    sure = smooth.loss(knows(chosen.float()), one, TrainState(), generators_for(range(64))).loss.item()
    assert sure == pytest.approx(0.1 * 50 * (V - 1) / V, rel=1e-3)


def test_refuses_by_name():
    with pytest.raises(UserError, match="share is 0"):
        MaskedTokens(MASK, ORDINARY, 0)
    with pytest.raises(UserError, match="label_smoothing is 1"):
        MaskedTokens(MASK, ORDINARY, label_smoothing=1)
