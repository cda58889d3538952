"""The critic scores patches: a change reaches the scores that see it, and no other picture's."""

import torch

from smalti.nn.patch_critic import PatchCritic


def test_a_score_sees_its_patch_and_no_other_picture():
    torch.manual_seed(0)
    critic = PatchCritic(8, 3).eval()
    pixels = torch.rand(2, 3, 128, 128, requires_grad=True)
    scores = critic(pixels)
    assert scores.shape == (2, 1, 14, 14)
    alone = critic(pixels[:1])
    torch.testing.assert_close(alone, scores[:1])
    layers = PatchCritic(8, 3).layers  # without norms, whose means run over the whole picture
    convolutions = torch.nn.Sequential(*(one for one in layers if not isinstance(one, torch.nn.GroupNorm)))
    (gradient,) = torch.autograd.grad(convolutions(pixels)[0, 0, 7, 7], pixels)
    seen = gradient[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]
    assert not gradient[1].any()
