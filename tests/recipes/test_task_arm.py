"""Target sets are new to `emoji` and split by concept; an arm adapts to one; the bank's checks would see a fault."""

import pytest
import torch
from torch import nn

from smalti.core.errors import UserError
from smalti.data.emoji import TOPICS
from smalti.recipes.task_arm import DRAWN, FEW, GROUPS, drift, mixed_error, target
from smalti.systems.diffscaler import METHODS, RATES, SETS
from smalti.training.diffscaler import DiffScaler
from smalti.training.task_bank import TaskBank
from smalti.zoo.loader import load_model


@pytest.mark.parametrize("name", GROUPS)
def test_targets(name):
    one = target(name)
    sides = [one.train.items, one.held_out.items]
    assert {item.group for items in sides for item in items} == {GROUPS[name]}
    assert not any(seen(item) for items in sides for item in items for seen in TOPICS.values())
    assert not {item.concept for item in sides[0]} & {item.concept for item in sides[1]}
    assert 32 <= len(sides[1]) <= DRAWN
    assert len(sides[0]) <= FEW or name != "few"
    assert len(sides[0]) > 80


def test_an_unknown_target():
    with pytest.raises(UserError, match="unknown target set 'flag'"):
        target("flag")


def test_methods_of_the_claim():
    """All have a rate; ours stays below 3 %, and LoRA has about as many parameters."""
    assert METHODS.keys() == RATES.keys()
    assert "places" not in SETS  # where the rates were chosen
    shares = {}
    for name, method in METHODS.items():
        if method is not None:
            bank = TaskBank.wrap(load_model("emoji").transformer, method)
            bank.add("one")
            shares[name] = bank.share("one")
    assert shares["scale-shift"] < shares["lora"] < shares["diffscaler"] < 0.03
    assert shares["lora"] > 0.94 * shares["diffscaler"]


def test_checks_of_a_bank():
    bank = TaskBank.wrap(load_model("emoji").transformer, DiffScaler(rank=1))
    assert drift(bank, count=2) == 0.0
    assert mixed_error(bank, count=2, steps=2) < 1e-5


def test_checks_see_a_fault():
    """A weight of the model that changes, and tasks that go to the wrong samples."""
    bank = TaskBank.wrap(load_model("emoji").transformer, DiffScaler(rank=1))
    add = bank.add

    def spoil(name):
        with torch.no_grad():
            bank.model.proj_out.bias.add_(0.01)
        return add(name)

    vars(bank)["add"] = spoil
    assert drift(bank, count=2) > 0.0
    for value in bank.tasks.task_state("one").values():
        nn.init.normal_(value, std=0.1)
    index = bank.tasks.index
    vars(bank.tasks)["index"] = lambda task: index(task).flip(0) if isinstance(task, list) else index(task)
    assert mixed_error(bank, count=2, steps=2) > 1e-3
