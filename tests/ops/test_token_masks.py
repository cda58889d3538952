"""Masks keep equally many tokens of each sample, by the sample's own generator."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.seeds import generators_for
from smalti.ops.token_masks import BlockMask, RandomMask
from smalti.ops.token_subset import gather

MASKS = [RandomMask(0.75), RandomMask(0.4), BlockMask(0.75, 2), BlockMask(0.5, 4)]


def draw(mask, rows=8, columns=8, seeds=range(5)):
    return mask.draw(rows, columns, len(seeds), generators_for(list(seeds)))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_kept_and_dropped_are_all_places_once(mask):
    kept = draw(mask)
    assert kept.keep.shape[1] == round(64 * (1 - mask.ratio))
    assert torch.equal(torch.cat([kept.keep, kept.drop], 1).sort(1).values, torch.arange(64).expand(5, 64))
    assert (kept.keep.diff(dim=1) > 0).all()
    assert torch.equal(kept.mask.sum(1), torch.full((5,), kept.keep.shape[1]))
    assert kept.mask.gather(1, kept.keep).all()
    assert not torch.equal(kept.keep[0], kept.keep[1])


def test_restore_puts_tokens_back_in_order():
    kept, x = draw(RandomMask(0.75)), torch.randn(5, 64, 3)
    shuffled = torch.cat([gather(x, kept.keep), gather(x, kept.drop)], 1)
    assert torch.equal(gather(shuffled, kept.restore), x)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_mask_does_not_depend_on_the_batch(mask):
    assert torch.equal(draw(mask).keep[3:4], draw(mask, seeds=[3]).keep)
    assert torch.equal(draw(mask).keep, draw(mask).keep)


def test_all_places_are_kept_equally_often():
    share = draw(RandomMask(0.75), seeds=range(2000)).mask.float().mean(0)
    assert (share - 0.25).abs().max() < 0.05


def test_blocks_stay_or_go_together():
    mask = draw(BlockMask(0.75, 2), 4, 8).mask.unflatten(1, (2, 2, 4, 2))
    together = mask.movedim(2, 3).flatten(-2)  # (B, 2, 4, 2 * 2)
    assert torch.equal(together.all(-1), together.any(-1))
    assert torch.equal(together.all(-1).flatten(1).sum(1), torch.full((5,), 2))


def test_without_a_ratio_nothing_is_drawn():
    generators = generators_for([0, 1])
    before = [one.get_state() for one in generators]
    assert RandomMask(0.0).draw(8, 8, 2, generators) is None
    assert BlockMask(0.0).draw(8, 8, 2, generators) is None
    assert all(torch.equal(one.get_state(), state) for one, state in zip(generators, before))


def test_one_token_stays_at_least():
    assert draw(RandomMask(0.99), 2, 2).keep.shape == (5, 1)


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(UserError, match="ratio"):
        RandomMask(ratio)
    with pytest.raises(UserError, match="ratio"):
        BlockMask(ratio)


def test_blocks_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(UserError, match="3"):
        draw(BlockMask(0.5, 3))
