"""EDM in our time: the scales of table 1, the loss of equation 8, and its mask."""

import math

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for, randn
from smalti.core.time import denoised_from_velocity, expand_time
from smalti.objectives.edm import EDM, Preconditioning, spread_of
from smalti.ops.token_masks import RandomMask

S = 0.9


def make_batch(count=64):
    return Batch(S * torch.randn(count, 2, 4, 4), Cond(), torch.arange(count))


def test_preconditioning_is_that_of_the_paper():
    t, x0, noise, output = torch.tensor([0.01, 0.3, 0.6, 0.95]), *torch.randn(3, 4, 2, 4, 4).double()
    sigma = expand_time((t / (1 - t)).double(), x0)
    z = x0 + sigma * noise
    xt, own = z / (1 + sigma), Preconditioning(S)
    scaled = own.scale(xt, t)
    torch.testing.assert_close(scaled.x, z / (sigma**2 + S**2).sqrt(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.time, (t / (1 - t)).log() / 4)
    denoised = S**2 / (sigma**2 + S**2) * z + sigma * S / (sigma**2 + S**2).sqrt() * output
    velocity = own.velocity(xt, output, t)
    torch.testing.assert_close(denoised_from_velocity(xt, velocity, t.double()), denoised, rtol=1e-5, atol=1e-5)


def test_the_time_of_the_network_is_not_ours():
    assert Preconditioning(S).scale(torch.zeros(1, 1, 1, 1), torch.tensor([0.5])).time.item() == pytest.approx(0)
    last = Preconditioning(S).scale(torch.zeros(1, 1, 1, 1), torch.tensor([1.0])).time.item()
    assert last == pytest.approx(math.log(80) / 4, rel=1e-3)


def test_input_and_target_have_unit_variance_at_every_level():
    x0, noise = S * torch.randn(2000, 1, 2, 2), torch.randn(2000, 1, 2, 2)
    for level in (0.01, 0.3, 0.5, 0.9, 0.98):
        t = torch.full((2000,), level)
        xt = (1 - level) * x0 + level * noise
        own = Preconditioning(S)
        assert own.scale(xt, t).x.std().item() == pytest.approx(1, abs=0.05)
        at_zero, at_one = (own.velocity(xt, torch.full_like(xt, value), t) for value in (0.0, 1.0))
        target = (noise - x0 - at_zero) / (at_one - at_zero)
        assert target.std().item() == pytest.approx(1, abs=0.05)


def test_the_weighted_loss_is_the_network_s_own_error():
    """With a network that gives 0, the loss is the variance of its target, 1, at every noise level."""
    own = Preconditioning(S)
    denoiser = lambda xt, t, cond: own.velocity(xt, torch.zeros_like(xt), t)  # noqa: E731
    for mean in (-2.0, -0.6, 1.0):
        objective = EDM(mean, 0.1, S)
        value = objective.loss(denoiser, make_batch(512), TrainState(), generators_for(list(range(512)))).loss
        assert value.item() == pytest.approx(1, abs=0.08)


def test_noise_levels_are_log_normal():
    seen = []
    EDM(-0.6, 1.2, S).loss(
        lambda xt, t, cond: seen.append(t) or xt, make_batch(4000), TrainState(), torch.Generator().manual_seed(0)
    )
    levels = (seen[0] / (1 - seen[0])).log()
    assert levels.mean().item() == pytest.approx(-0.6, abs=0.06)
    assert levels.std().item() == pytest.approx(1.2, abs=0.06)


def test_a_mask_leaves_the_kept_patches():
    batch = make_batch(8)

    def denoiser(xt, t, cond):
        right = (xt - batch.x0) / expand_time(t, xt)
        keep = cond.extra["keep"]
        mask = torch.zeros(8, 4, dtype=torch.bool).scatter(1, keep, True).unflatten(1, (1, 2, 2))
        mask = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return torch.where(mask, right, torch.nan)

    objective = EDM(-0.6, 1.2, S, RandomMask(0.75), patch_size=2)
    assert objective.loss(denoiser, batch, TrainState(), generators_for(list(range(8)))).loss < 1e-4


def test_spread_of_latents():
    assert spread_of(3 * randn((500, 4, 2, 2), torch.Generator().manual_seed(0))) == pytest.approx(3, rel=0.05)
    with pytest.raises(UserError, match="deviation"):
        EDM(sigma_data=0.0)
