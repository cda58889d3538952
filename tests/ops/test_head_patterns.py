import pytest
import torch
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.ops.head_patterns import (
    MODES,
    Band,
    Patterns,
    allowed_keys,
    band,
    band_layout,
    best_cells,
    cell_grid,
    mode_attention,
    mode_density,
    stripe_columns,
)

GRID = (4, 6, 5)
WIDE = Patterns(0.5, 0.5, 0.3)


def qkv(length, batch=2, heads=3, width=8, **settings):
    torch.manual_seed(0)
    return [torch.randn(batch, heads, length, width, **settings) for _ in range(3)]


def key_mask(length, kind):
    keep = torch.ones(2, 1, 1, length, dtype=torch.bool)
    keep[1, ..., -2:] = False
    keep[0, ..., 0] = False
    return keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)


def by_coordinates(mode, patterns, query, key):
    """The paper's sentences, one pair of tokens at a time."""
    place = [divmod(token, GRID[1] * GRID[2]) for token in (query, key)]  # (frame, place in the frame)
    if mode == "diagonal":
        one, other, parts = place[0][0], place[1][0], GRID[0]
    else:
        one, other, parts = place[0][1] // GRID[2], place[1][1] // GRID[2], GRID[1]
    count = round(0.5 * parts)
    first = min(max(one - count // 2, 0), parts - count)
    return first <= other < first + count


@pytest.mark.parametrize("mode", ["diagonal", "multi-diagonal"])
def test_bands_are_frames_around_or_places_around_in_all_frames(mode):
    queries = torch.arange(120)
    allowed = allowed_keys(queries, mode, WIDE, GRID, before=2, after=1)[0]
    expected = [[by_coordinates(mode, WIDE, query, key) for key in range(120)] for query in range(120)]
    assert torch.equal(allowed[:, 2:-1], torch.tensor(expected))
    assert allowed[:, [0, 1, -1]].all()
    if mode == "multi-diagonal":  # the same place of every other frame, an exact stripe pattern of the flattened map
        assert all(allowed[query, 2 + (query + 30) % 120] for query in range(120))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize("mode", ["diagonal", "multi-diagonal", "stripes"])
@pytest.mark.parametrize("masked", [None, "bool", "bias"])
def test_every_mode_is_masked_attention_in_values_and_gradients(mode, before, after, masked):
    """Text first as in CogVideoX, last as in HunyuanVideo, none as in Wan: always seen, and seeing everything."""
    q, k, v = qkv(120 + before + after, requires_grad=True)
    mask = key_mask(120 + before + after, masked) if masked else None
    columns = torch.stack([torch.randperm(120)[:36] for _ in range(3)]) if mode == "stripes" else None
    allowed = torch.ones(3, 120 + before + after, 120 + before + after, dtype=torch.bool)
    allowed[:, before : before + 120] = allowed_keys(torch.arange(120), mode, WIDE, GRID, before, after, columns)
    if masked == "bias":
        allowed = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf) + mask
    elif masked:
        allowed = allowed & mask
    results = [
        mode_attention(q, k, v, mode, WIDE, GRID, before, mask, 0.4, columns),
        F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.4),
    ]
    assert torch.allclose(*results, atol=1e-5)
    grads = [torch.autograd.grad(one.square().sum(), (q, k, v)) for one in results]
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(*grads, strict=True))
    assert not torch.allclose(results[0], F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.4), atol=1e-3)


def test_full_is_plain_attention_and_skip_is_zero():
    q, k, v = qkv(123)
    assert torch.equal(mode_attention(q, k, v, "full", WIDE, GRID, 3), F.scaled_dot_product_attention(q, k, v))
    assert not mode_attention(q, k, v, "skip", WIDE, GRID, 3).any()


def test_the_density_is_what_the_reference_allows():
    for mode in MODES:
        share = allowed_keys(torch.arange(120), mode, WIDE, GRID).float().mean().item()
        assert mode_density(mode, WIDE, GRID) == pytest.approx(share)
    assert mode_density("diagonal", Patterns(), (33, 45, 80)) == pytest.approx(4 / 33)
    assert mode_density("multi-diagonal", Patterns(), (21, 45, 80)) == pytest.approx(6 / 45)


def test_multi_diagonal_is_a_band_of_blocks_once_tokens_stand_place_by_place():
    """As a mask of the given order it is block-unfriendly; its groups hold all frames of a row of places."""
    layout = band_layout(GRID, band(GRID, "multi-diagonal", WIDE))
    assert layout.order.group == (4, 1, 5)
    assert layout.order.index[:20].tolist() == [30 * frame + place for frame in range(4) for place in range(5)]
    assert layout.table.sum(1).tolist() == [3] * 6
    assert not layout.order.is_padded


def test_a_picture_has_bands_of_rows_and_a_line_bands_of_tokens():
    assert band((1, 8, 4), "diagonal", WIDE) == band((1, 8, 4), "multi-diagonal", WIDE) == Band(1, 8, 4)
    assert band((1, 1, 40), "diagonal", WIDE) == Band(2, 40, 20)
    assert band((3, 1, 40), "multi-diagonal", Patterns()) == Band(2, 40, 5)
    assert band((2, 2, 2), "diagonal", Patterns()).count == 1  # never none


def test_the_lattice_lies_evenly_whatever_the_length_of_rows():
    """Every 8th token of rows of 8 would be one column of places."""
    for grid in ((8, 8, 8), (16, 16, 16)):
        (columns,) = stripe_columns(grid, 0.125)
        assert len(columns.unique()) == grid[0] * grid[1] * grid[2] / 8
        for side, axis in zip(grid, torch.unravel_index(columns, grid), strict=True):
            share = axis.bincount(minlength=side) / (len(columns) / side)
            assert 0.5 < share.min() <= share.max() < 1.6
    (line,) = stripe_columns((1, 1, 64), 0.125)
    assert line.diff().tolist() == [5, 8, 13, 8, 5, 8, 13]  # of the golden section


def test_measured_columns_are_found_and_kept_on_another_grid():
    received = torch.zeros(2, 120)
    received[0, 30:60], received[1, 7] = 1.0, 5.0
    cells = best_cells(received, GRID, 0.25)
    assert cell_grid(GRID) == GRID
    assert cells[0] == tuple(range(30, 60))
    assert 7 in cells[1]
    assert stripe_columns(GRID, 0.25, cells)[0].tolist() == list(range(30, 60))
    large = stripe_columns((8, 12, 10), 0.25, cells, GRID)
    assert large.shape == (2, 240)
    assert (large[0] // 120).unique().tolist() == [2, 3]  # the second of four frames
    assert cell_grid((33, 45, 80)) == (8, 8, 8)


@pytest.mark.parametrize("share", [0, 1.1, -1])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match="every share"):
        Patterns(stripes=share)
