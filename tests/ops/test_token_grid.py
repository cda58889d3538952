import pytest
import torch
from torch.nn.functional import interpolate

from smalti.core.errors import UserError
from smalti.ops.token_grid import resize_tokens


def plane(rows, columns):
    """Tokens (1, N, 2) that hold the middle of their own cell in [0, 1] x [0, 1]."""
    row, column = torch.meshgrid(
        (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij"
    )
    return torch.stack([row, column], dim=-1).flatten(0, 1)[None]


def test_equal_grids_give_the_very_tokens():
    tokens = torch.randn(2, 15, 4)
    assert resize_tokens(tokens, (3, 5), (3, 5)) is tokens


@pytest.mark.parametrize("new", [(3, 5), (7, 11), (9, 5), (14, 22)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_linear_field_stays_linear_away_from_the_border(new, mode):
    found = resize_tokens(plane(7, 11), (7, 11), new, mode).unflatten(1, new)
    wanted = plane(*new).unflatten(1, new)
    inner = (wanted > 0.3) & (wanted < 0.7)
    assert inner.any()
    assert torch.allclose(found[inner], wanted[inner], atol=1e-3)


def test_rows_are_not_taken_for_columns():
    found = resize_tokens(plane(3, 5), (3, 5), (6, 15)).unflatten(1, (6, 15))
    assert (found[0, 1:, 7, 0] - found[0, :-1, 7, 0]).max() > 0.1
    assert torch.allclose(found[0, :, 7, 1], torch.full((6,), 0.5))


def test_it_is_the_interpolation_of_the_map_and_has_a_gradient():
    tokens = torch.randn(2, 15, 4, requires_grad=True)
    field = tokens.detach().transpose(1, 2).reshape(2, 4, 3, 5)
    wanted = interpolate(field, size=(4, 9), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    found = resize_tokens(tokens, (3, 5), (4, 9))
    assert torch.allclose(found, wanted, atol=1e-5)
    found.sum().backward()
    assert torch.allclose(tokens.grad.sum(1), torch.full((2, 4), 36.0))


def test_a_smaller_grid_averages_all_cells():
    tokens = torch.zeros(1, 64, 1)
    tokens[0, ::2] = 1.0  # columns alternate: one that skips cells would see only one of the two values
    assert torch.allclose(resize_tokens(tokens, (8, 8), (2, 2)), torch.full((1, 4, 1), 0.5), atol=0.1)


def test_half_precision_stays():
    assert resize_tokens(torch.zeros(1, 4, 2, dtype=torch.bfloat16), (2, 2), (3, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize(("grid", "new"), [((4, 4), (2, 2)), ((3, 5), (0, 2))])
def test_what_fits_no_grid_is_refused(grid, new):
    with pytest.raises(UserError, match="tokens are"):
        resize_tokens(torch.zeros(1, 15, 2), grid, new)
