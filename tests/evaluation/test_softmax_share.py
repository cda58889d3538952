"""The errors are those of rounding, and a wrong share is seen."""

from smalti.evaluation import softmax_share
from smalti.ops.local_mask import local_layout
from smalti.ops.lse_merge import Partial


def test_errors(monkeypatch):
    layout = local_layout((1, 8, 8), "band", 0.1, 3)
    errors = softmax_share.share_errors(layout)
    assert errors.output == 0
    assert errors.share < 1e-5
    monkeypatch.setattr(
        softmax_share, "block_attention_with_lse", lambda q, k, v, layout, backend: Partial(q, q[..., 0])
    )
    assert softmax_share.share_errors(layout).share > 0.1
