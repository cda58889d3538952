import torch

from smalti.backbones.dit import DiT
from smalti.recipes.digits_arm import SHAPE, digits_source, train_digits_arm
from smalti.training.config import TrainConfig


def test_an_arm_learns_and_draws_for_the_classes(digits):
    torch.manual_seed(0)
    model = DiT(depth=1, heads=2, head_dim=8, **SHAPE)
    config = TrainConfig(steps=6, batch=8, learning_rate=5e-3, warmup=0, ema=0.5, eval_every=6, eval_samples=16)
    trained = train_digits_arm(model, config)
    assert 0 < trained.held_out_loss < 1.6
    drawn = trained.draw(steps=2)
    assert drawn.shape == (30, 1, 32, 32)
    assert torch.equal(drawn, trained.draw(steps=2))
    assert not torch.equal(drawn, trained.draw(steps=2, guidance=3.0))


def test_a_source_gives_pixels_and_classes(digits):
    source = digits_source("held-out")
    batch = source.batch(torch.arange(4), [torch.Generator().manual_seed(one) for one in range(4)])
    assert batch.x0.shape == (4, 1, 32, 32)
    assert batch.x0.min() == -1
    assert batch.cond.label.shape == (4,)
