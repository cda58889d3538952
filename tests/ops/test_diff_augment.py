import torch

from smalti.ops.diff_augment import DRAWS, diff_augment

NEUTRAL = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0]])


def test_draws_in_the_middle_change_nothing():
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(diff_augment(x, NEUTRAL), x)


def test_each_draw_does_its_own():
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    brighter = diff_augment(x, NEUTRAL + torch.eye(DRAWS)[0] * 0.25)
    torch.testing.assert_close(brighter, x + 0.25)
    grey = diff_augment(x, NEUTRAL - torch.eye(DRAWS)[1] * 0.5)
    torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand_as(x))
    flat = diff_augment(x, NEUTRAL - torch.eye(DRAWS)[2] * 0.5)
    assert flat.std() < 0.6 * x.std()
    down = diff_augment(x, NEUTRAL - torch.eye(DRAWS)[3] * 0.5)  # by 2 of 16 pixels
    assert not down[..., :2, :].any()
    torch.testing.assert_close(down[..., 2:, :], x[..., :-2, :])


def test_a_hole_is_square_and_zero():
    x = torch.ones(1, 3, 16, 16)
    middle = NEUTRAL.clone()
    middle[:, 5:] = 0.5
    out = diff_augment(x, middle, hole=0.5)
    assert (out == 0).sum() == 3 * 9 * 9
    assert not out[..., 8, 8].any()


def test_gradients_pass_and_pictures_are_apart():
    x, draws = torch.rand(3, 3, 16, 16, requires_grad=True), torch.rand(3, DRAWS)
    out = diff_augment(x, draws)
    torch.testing.assert_close(out[1:2], diff_augment(x[1:2], draws[1:2]))
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.abs().sum() > 0
