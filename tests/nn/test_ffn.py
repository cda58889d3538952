"""The feed-forward layer equals diffusers' with the same weights."""

import torch
from diffusers.models.attention import FeedForward as DiffusersFeedForward

from smalti.nn.ffn import FeedForward


def test_equals_diffusers():
    ours, theirs = FeedForward(6), DiffusersFeedForward(6, activation_fn="gelu-approximate")
    theirs.net[0].proj.load_state_dict(ours.proj_in.state_dict())
    theirs.net[2].load_state_dict(ours.proj_out.state_dict())
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    assert FeedForward(6, ratio=1.5, bias_out=False).proj_out.weight.shape == (6, 9)
