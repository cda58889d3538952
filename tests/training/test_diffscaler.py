"""Which layers get which parts."""

import pytest
from task_toys import bank_of
from torch import nn

from smalti.core.errors import UserError
from smalti.training.diffscaler import DiffScaler


def test_forms():
    layer = nn.Linear(4, 4)
    assert DiffScaler(rank=4)("a.b", layer).rank == 4
    assert DiffScaler()("a.b", layer).strength == 1.0
    assert DiffScaler(is_strength_fixed=True)("a.b", layer).strength is None
    assert DiffScaler(layers=r"^blocks\.")("x_embedder", layer) is None


def test_layers_are_chosen_by_pattern():
    bank = bank_of("one", method=DiffScaler(rank=1, layers="modulation"))
    assert set(bank.base.layers) == {"blocks.0.modulation.linear", "blocks.1.modulation.linear"}


def test_parameters_are_counted():
    """a and b are 2 O, the branch r (I + O), s one."""
    bank = bank_of("one", method=DiffScaler(rank=3))
    layers = bank.base.layers.values()
    wanted = sum(2 * one.out_features + 3 * (one.in_features + one.out_features) + 1 for one in layers)
    assert bank.tasks.count("one") == wanted


@pytest.mark.parametrize(("settings", "match"), [({"rank": -1}, "rank is -1"), ({"layers": "("}, "no pattern")])
def test_settings_are_checked(settings, match):
    with pytest.raises(UserError, match=match):
        DiffScaler(**settings)
