import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.seeds import SEED_LIMIT, check_seed, derive_seed, generators_for, rand, randn


def test_a_sample_does_not_depend_on_its_batch():
    alone = randn((1, 3, 4), generators_for([7]))
    among = randn((4, 3, 4), generators_for([1, 2, 7, 3]))
    assert torch.equal(alone[0], among[2])
    assert not torch.equal(among[0], among[1])


def test_one_generator_for_all():
    a, b = (rand((2, 3), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a[0], a[1])


def test_wrong_number_of_generators():
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn((3, 4), generators_for([1, 2]))


def test_derived_seeds():
    assert derive_seed("a", 1) == derive_seed("a", 1) != derive_seed(1, "a")
    assert derive_seed("ab", "c") != derive_seed("a", "bc")
    assert len({derive_seed(0, step) for step in range(1000)}) == 1000


@pytest.mark.parametrize("seed", [-1, SEED_LIMIT, 10**30])
def test_seeds_out_of_range(seed):
    with pytest.raises(UserError, match="out of range"):
        check_seed(seed)
