"""Canvases: what is assembled is split again, and no panel shares a token with another."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.ops.canvas import PanelLayout


@pytest.mark.parametrize("name", ["1x2", "2x1", "3x1", "2x2", "2x3"])
def test_split_inverts_assemble_in_reading_order(name):
    layout = PanelLayout.named(name)
    assert str(layout) == name
    panels = [torch.full((2, 3, 4, 6), float(i)) + torch.rand(2, 3, 4, 6) / 2 for i in range(layout.count)]
    canvas = layout.assemble(panels)
    assert tuple(canvas.shape[-2:]) == layout.size(4, 6)
    assert all(torch.equal(one, other) for one, other in zip(layout.split(canvas), panels, strict=True))
    corners = canvas[0, 0, ::4, ::6].floor().flatten().tolist()
    assert corners == list(range(layout.count))


def test_clips_are_assembled_frame_by_frame():
    layout = PanelLayout(1, 2)
    canvas = layout.assemble([torch.zeros(1, 3, 5, 4, 4), torch.ones(1, 3, 5, 4, 4)])
    assert canvas.shape == (1, 3, 5, 4, 8)
    assert canvas[0, 0, 3, 0].tolist() == [0] * 4 + [1] * 4


def test_borders_lie_on_borders_of_tokens():
    layout = PanelLayout(1, 2)
    assert layout.boxes(64, 128, 16)[1].left == 64
    with pytest.raises(UserError, match="multiple of 32, such as 128"):
        layout.boxes(64, 120, 16)  # the border at 60 would cut a token of 16 pixels
    with pytest.raises(UserError, match="height of 72"):
        PanelLayout(2, 1).boxes(72, 64, 16)
    panels = [torch.zeros(1, 3, 20, 20)] * 2
    assert layout.assemble(panels).shape == (1, 3, 20, 40)
    with pytest.raises(UserError, match="borders of tokens of 8"):
        layout.assemble(panels, multiple=8)
    with pytest.raises(UserError, match="borders of tokens of 3"):
        layout.split(torch.zeros(8, 16), multiple=3)


def test_the_mask_covers_whole_panels():
    mask = PanelLayout(2, 2).mask([1, 2], 4, 4)
    assert mask.tolist() == [[False, False, True, True]] * 2 + [[True, True, False, False]] * 2
    with pytest.raises(UserError, match="no panel 4"):
        PanelLayout(2, 2).mask([4], 4, 4)


def test_what_is_no_layout_is_refused():
    for name in ("2", "1x", "ax2", "1x1", "5x5"):
        with pytest.raises(UserError, match="layout"):
            PanelLayout.named(name)
    with pytest.raises(UserError, match="give 2 of one shape"):
        PanelLayout(1, 2).assemble([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)])
