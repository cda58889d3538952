"""The masked loss: the kept patches alone, their number below, and plain flow matching without a mask."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.core.time import expand_time
from smalti.nn.patchify import patchify, unpatchify
from smalti.objectives.flow_matching import FlowMatching
from smalti.objectives.masked_loss import MaskedFlowMatching
from smalti.objectives.time_sampling import Uniform
from smalti.ops.token_masks import BlockMask, RandomMask

COUNT, SIZE, PATCH = 6, (8, 8), 2


def make_batch():
    x0 = torch.randn(COUNT, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    return Batch(x0, Cond(extra={"other": torch.arange(COUNT)}), torch.arange(COUNT))


def loss(objective, denoiser, seeds=range(COUNT), batch=None):
    return objective.loss(denoiser, batch or make_batch(), TrainState(), generators_for(list(seeds))).loss


def truth(xt, t, cond):
    return (xt - make_batch().x0) / expand_time(t, xt)


def on_places(x, places, value):
    """x with whole patches at `places` replaced."""
    tokens = patchify(x, PATCH)
    index = places[..., None].expand(-1, -1, tokens.shape[-1])
    return unpatchify(tokens.scatter(1, index, value), SIZE, PATCH)


def test_a_ratio_of_zero_is_flow_matching_bit_for_bit():
    masked = MaskedFlowMatching(RandomMask(0.0), PATCH, Uniform(), shift=2.0)
    plain = FlowMatching(Uniform(), shift=2.0)
    denoiser = lambda xt, t, cond: 0.3 * xt + expand_time(t, xt)  # noqa: E731
    assert torch.equal(loss(masked, denoiser), loss(plain, denoiser))


@pytest.mark.parametrize("mask", [RandomMask(0.75), BlockMask(0.5, 2)], ids=str)
def test_dropped_patches_never_enter_whatever_stands_there(mask):
    def right_where_it_looks(garbage):
        def denoiser(xt, t, cond):
            keep = cond.extra["keep"]
            assert torch.equal(cond.extra["other"], torch.arange(COUNT))
            wrong = torch.full_like(patchify(xt, PATCH), garbage)
            kept = patchify(truth(xt, t, cond), PATCH).gather(1, keep[..., None].expand(-1, -1, wrong.shape[-1]))
            return on_places(unpatchify(wrong, SIZE, PATCH), keep, kept)

        return denoiser

    for garbage in (0.0, 1e3, float("nan")):
        assert loss(MaskedFlowMatching(mask, PATCH), right_where_it_looks(garbage)) < 1e-6


def test_the_denominator_is_the_number_kept():
    """An error of 1 everywhere costs 1, whatever the ratio; divided by N it would cost 1 - ratio."""
    off = lambda xt, t, cond: truth(xt, t, cond) + 1  # noqa: E731
    for ratio in (0.0, 0.5, 0.75):
        assert loss(MaskedFlowMatching(RandomMask(ratio), PATCH), off).item() == pytest.approx(1, rel=1e-3)


def test_a_loss_does_not_depend_on_how_the_batch_is_split():
    objective, zero = MaskedFlowMatching(RandomMask(0.75), PATCH), lambda xt, t, cond: torch.zeros_like(xt)
    spans = (slice(0, 2), slice(2, 4), slice(4, 6))
    parts = [loss(objective, zero, range(COUNT)[span], make_batch()[span]) for span in spans]
    torch.testing.assert_close(loss(objective, zero), torch.stack(parts).mean())


def test_time_and_noise_are_those_of_the_unmasked_loss():
    seen = []

    def denoiser(xt, t, cond):
        seen.append((xt, t))
        return xt

    loss(MaskedFlowMatching(RandomMask(0.75), PATCH), denoiser)
    loss(MaskedFlowMatching(RandomMask(0.0), PATCH), denoiser)
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_maskdit_paints_what_was_dropped():
    """The noisy sample itself in dropped places costs nothing more; zeros there do."""
    objective = MaskedFlowMatching(RandomMask(0.75), PATCH, reconstruction=0.1)

    def painter(factor):
        def denoiser(xt, t, cond):
            keep = cond.extra["keep"]
            tokens = patchify(truth(xt, t, cond), PATCH)
            kept = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
            return on_places(factor * xt, keep, kept)

        return denoiser

    assert loss(objective, painter(1.0)) < 1e-6
    assert loss(objective, painter(0.0)) > 0.02
    assert loss(MaskedFlowMatching(RandomMask(0.75), PATCH), painter(0.0)) < 1e-6
    with pytest.raises(UserError, match="reconstruction"):
        MaskedFlowMatching(reconstruction=-1.0)
