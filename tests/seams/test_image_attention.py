"""Which attention is one of image tokens on a grid, and which masks are masks of keys."""

import pytest
import torch

from smalti.core.errors import Refusal
from smalti.core.protocols import Segment, TokenLayout
from smalti.seams.image_attention import check_image_grid, image_grid, keys_alone

TEXT, IMAGE, LIST = Segment("text", 3), Segment("image", 6, grid=(1, 2, 3)), Segment("image", 6)


@pytest.mark.parametrize(
    ("queries", "keys", "grid"),
    [
        ((TEXT, IMAGE), (TEXT, IMAGE), (1, 2, 3)),
        ((IMAGE,), (TEXT,), None),  # cross-attention
        ((IMAGE, TEXT, IMAGE), (IMAGE, TEXT, IMAGE), None),
        ((LIST,), (LIST,), None),
    ],
)
def test_the_grid_of_image_tokens_that_attend_to_themselves(queries, keys, grid):
    cores = {"blocks.attn": (TokenLayout(queries), TokenLayout(keys))}
    assert image_grid(*cores["blocks.attn"]) == grid
    if grid is None:
        with pytest.raises(Refusal, match=r"Some has no softmax attention among image tokens .* so Sparse has nothing"):
            check_image_grid("Some", cores, "Sparse")
    else:
        check_image_grid("Some", cores, "Sparse")


def test_a_mask_that_differs_between_queries_is_refused():
    causal = torch.ones(1, 1, 6, 6).tril().bool()
    with pytest.raises(Refusal, match=r"blocks.0.attn .* differs between queries"):
        keys_alone(causal, "blocks.0.attn")
    written_out = torch.tensor([True, True, False]).expand(1, 1, 3, 3)
    assert torch.equal(keys_alone(written_out, "blocks.0.attn"), written_out[:, :, :1])
    assert keys_alone(None, "blocks.0.attn") is None
