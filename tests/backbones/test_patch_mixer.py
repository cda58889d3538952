"""The patch-mixer: all tokens speak before any is dropped, and the way back to D comes after the gather."""

import pytest
import torch

from smalti.backbones.patch_mixer import PatchMixer
from smalti.core.errors import UserError
from smalti.evaluation.flops import count_flops
from smalti.nn.block_attention import BlockContext
from smalti.ops.token_subset import gather

B, N, D = 2, 12, 16
KEEP = torch.tensor([[0, 5, 7], [1, 2, 11]])


def random_mixer(**settings):
    mixer = PatchMixer(D, **{"mixer_width": 8, "depth": 2, "head_dim": 4, "ffn_multiple": 4, **settings})
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def context():
    return BlockContext(torch.randn(B, D), memory=torch.randn(B, 5, D))


def test_kept_tokens_are_those_of_the_whole_run():
    mixer, x, given = random_mixer(), torch.randn(B, N, D), context()
    torch.testing.assert_close(mixer(x, given, KEEP), gather(mixer(x, given), KEEP))


def test_dropped_tokens_have_reached_the_kept_ones():
    """A mixer that saw kept tokens alone, or none of the others, would be naive masking."""
    mixer, x, given = random_mixer(), torch.randn(B, N, D), context()
    changed = x.clone()
    changed[:, 6] += torch.randn(D)  # kept in neither sample
    assert (mixer(x, given, KEEP) - mixer(changed, given, KEEP)).abs().max() > 1e-3


def test_the_last_layer_runs_after_the_gather():
    mixer, x, given = random_mixer(), torch.randn(B, N, D), context()
    whole, kept = (count_flops(lambda keep=keep: mixer(x, given, keep)).total for keep in (None, KEEP))
    assert whole - kept == 2 * B * (N - 3) * 8 * D


@pytest.mark.parametrize("part", ["activated", "memory"])
def test_it_is_conditioned_itself(part):
    mixer, x, given = random_mixer(), torch.randn(B, N, D), context()
    other = given._replace(**{part: torch.randn_like(getattr(given, part))})
    assert (mixer(x, given) - mixer(x, other)).abs().max() > 1e-3


def test_fresh_blocks_are_the_identity():
    mixer, x = PatchMixer(D, 8, 2, 4), torch.randn(B, N, D)
    torch.testing.assert_close(mixer(x, context()), mixer.leave(mixer.enter(x)))
    same = PatchMixer(D, D, 2, 4)
    assert torch.equal(same(x, context(), KEEP), gather(x, KEEP))


@pytest.mark.parametrize("settings", [{"depth": 0}, {"mixer_width": 10}])
def test_shapes_that_do_not_fit_are_refused(settings):
    with pytest.raises(UserError, match="mixer"):
        random_mixer(**settings)
