"""Random models of a few thousand weights on which peers are tried."""

from smalti.evaluation.peer_hosts import Shape

TINY = {
    "flux": Shape(
        {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "joint_attention_dim": 12, "pooled_projection_dim": 6, "axes_dims_rope": (2, 2, 4)},
        (1, 3, 4), 5,
    ),
    "wan": Shape(
        {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 12, "freq_dim": 16, "ffn_dim": 24,
         "num_layers": 3},
        (2, 3, 4), 5,
    ),
    "dit": Shape({"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3}, (1, 4, 4)),
}  # fmt: skip
