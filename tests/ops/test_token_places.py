import pytest
import torch

from smalti.ops.token_places import find_places

CASES = {
    "packed": (6, (1, 2, 3), (2, 6, 5), (1, 5)),
    "sound": (6, None, (2, 5, 12), (2, 5)),
    "picture": (6, (1, 2, 3), (2, 5, 4, 6), (4, 5)),
    "clip": (12, (2, 2, 3), (2, 5, 2, 4, 6), (4, 5)),
    "clip with frames first": (18, (3, 2, 3), (2, 3, 4, 4, 6), (4, 4)),
    "patches over frames": (12, (2, 2, 3), (2, 3, 4, 2, 3), (2, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_back(name):
    count, grid, shape, (p, channels) = CASES[name]
    x = torch.randn(shape)
    places = find_places(count, grid, x)
    tokens = places.to_tokens(x)
    assert tokens.shape == (2, count, p, channels)
    assert torch.equal(places.from_tokens(tokens, x), x)


def test_a_token_is_its_patch():
    x = torch.arange(4 * 6.0).reshape(1, 1, 4, 6)
    tokens = find_places(6, (1, 2, 3), x).to_tokens(x)[0, :, :, 0]
    assert tokens[4].tolist() == [14, 15, 20, 21]  # second row, second column


@pytest.mark.parametrize(
    ("count", "grid", "shape"),
    [(6, None, (2, 3, 4, 6)), (6, (1, 2, 3), (2, 3, 5, 6)), (7, None, (2, 6, 5)), (6, None, (2, 6, 6)),
     (4, None, (2, 8)), (16, (4, 2, 2), (1, 4, 4, 4, 4))],
)  # fmt: skip
def test_what_does_not_fit_or_fits_twice_is_told(count, grid, shape):
    with pytest.raises(ValueError, match=r"do not fit|two ways"):
        find_places(count, grid, torch.zeros(shape))
