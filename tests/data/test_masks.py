import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.seeds import generators_for
from smalti.data.masks import KINDS, draw_masks, hide, shrink_mask


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_large_and_never_all(kind):
    masks = draw_masks((32, 24), generators_for(range(64)), 64, [kind])
    assert masks.shape == (64, 1, 32, 24)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    shares = masks.mean((1, 2, 3))
    assert shares.min() > 0
    assert shares.max() < 1
    assert shares.mean() > 0.15
    assert len({mask.numpy().tobytes() for mask in masks}) >= (4 if kind == "half" else 40)


def test_a_half_is_a_half_and_outpainting_gives_a_window():
    halves = draw_masks((16, 16), generators_for(range(40)), 40, ["half"])
    assert (halves.mean((1, 2, 3)) == 0.5).all()
    assert {tuple(mask[0, ::15, 0].tolist() + mask[0, 0, ::15].tolist()) for mask in halves} == {
        (1, 0, 1, 1), (0, 1, 0, 0), (1, 1, 1, 0), (0, 0, 0, 1)
    }  # fmt: skip
    given = 1 - draw_masks((20, 20), generators_for(range(40)), 40, ["outpaint"])[:, 0]
    for one in given:
        rows, columns = one.any(1), one.any(0)
        assert one.sum() == rows.sum() * columns.sum()  # one rectangle


def test_a_mask_depends_on_its_generator_alone():
    together = draw_masks((16, 16), generators_for(range(8)), 8)
    alone = [draw_masks((16, 16), generators_for([seed]), 1) for seed in range(8)]
    assert torch.equal(together, torch.cat(alone))
    kinds = {kind: draw_masks((16, 16), generators_for(range(8)), 8, [kind]) for kind in KINDS}
    assert any(torch.equal(together[3], masks[3]) for masks in kinds.values())


def test_on_a_coarser_grid_a_mask_stays_one():
    mask = draw_masks((32, 32), generators_for(range(16)), 16)
    small = shrink_mask(mask, (8, 8))
    assert small.shape == (16, 1, 8, 8)
    assert set(small.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(small, mask[:, :, 2::4, 2::4])


def test_hidden_pixels_are_grey():
    pixels, mask = torch.ones(2, 3, 8, 8), draw_masks((8, 8), generators_for([0, 1]), 2, ["half"])
    assert torch.equal(hide(pixels, mask), (1 - mask).expand(2, 3, 8, 8))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UserError, match="kind of mask"):
        draw_masks((8, 8), generators_for([0]), 1, ["circle"])
    with pytest.raises(UserError, match="at least 4"):
        draw_masks((3, 8), generators_for([0]), 1)
