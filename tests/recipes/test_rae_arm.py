"""The arms of RAE's claim, each for a step or two."""

from smalti.backbones.lightning_dit import LightningDiT
from smalti.recipes.rae_arm import SHIFT, load_rae, noisy_psnr, overfit_loss, painted


def test_a_picture_can_be_learned_by_heart():
    model = LightningDiT(in_channels=192, depth=1, heads=1, head_dim=8, base_size=8)
    short, longer = (overfit_loss(model, 0, steps, batch=2) for steps in (1, 15))
    assert longer < short < 3


def test_the_shift_is_that_of_64_tokens_of_192_channels():
    assert abs(SHIFT - 3**0.5) < 1e-6


def test_noise_makes_pictures_worse():
    model = load_rae()
    assert noisy_psnr(model, 0.0, 16) > noisy_psnr(model, 1.0, 16) + 1


def test_a_decoder_is_trained_and_measured():
    found = painted(0.8, 0, 1, depth=1)
    assert 3 < found.noisy <= found.clean + 1
