import pytest

from smalti.core.errors import UserError
from smalti.training.config import TrainConfig


def rates(**settings):
    config = TrainConfig(**{"steps": 100, "batch": 4, **settings})
    return [config.rate(step) for step in range(100)]


def test_warm_up_is_linear_then_constant():
    assert rates(warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(warmup=4)[-1] == 1.0


def test_cosine_falls_to_a_tenth():
    factors = rates(decay="cosine", warmup=10)
    assert max(factors) == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)


def test_linear_cooldown_uses_the_last_fifth():
    factors = rates(decay="linear-cooldown")
    assert factors[:81] == [1.0] * 81
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)


def test_inverse_square_root_is_counted_in_warm_up_steps():
    factors = rates(decay="inverse-sqrt", warmup=4)
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[15] == pytest.approx(0.5)
    assert factors[63] == pytest.approx(0.25)
    with pytest.raises(UserError, match="warmup is 0"):
        TrainConfig(steps=10, batch=4, decay="inverse-sqrt")
    longer = TrainConfig(steps=200, batch=4, decay="inverse-sqrt", warmup=4).identity()
    assert longer == TrainConfig(steps=100, batch=4, decay="inverse-sqrt", warmup=4).identity()


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0}, {"steps": 1.5}, {"batch": 0}, {"batch": 3, "accumulate": 2}, {"learning_rate": 0.0},
        {"learning_rate": float("nan")}, {"warmup": 101}, {"warmup": -1}, {"decay": "cosinus"}, {"optimizer": "sgd"},
        {"precision": "fp16"}, {"ema": 1.0}, {"betas": (0.9, 1.0)}, {"clip": 0.0}, {"minutes": 0}, {"tracker": "wandb"},
        {"seed": -1}, {"seed": 2**63}, {"save_every": 0}, {"keep_last": 0}, {"muon_rate": -1.0}, {"weight_decay": -0.1},
        {"eval_every": -1}, {"betas": (0.9,)}, {"patience": 3}, {"patience": -1},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line_that_names_them(settings):
    with pytest.raises(UserError) as error:
        TrainConfig(**{"steps": 100, "batch": 4, **settings})
    assert next(iter(settings)) in str(error.value)
    assert "\n" not in str(error.value)


def test_identity_holds_what_decides_the_weights():
    base = TrainConfig(steps=100, batch=4)
    assert TrainConfig(steps=100, batch=4, accumulate=2, save_every=7, minutes=1.0).identity() == base.identity()
    assert TrainConfig(steps=100, batch=4, learning_rate=2e-3).identity() != base.identity()
    assert TrainConfig(steps=200, batch=4).identity() == base.identity()
    falling = [TrainConfig(steps=steps, batch=4, decay="cosine").identity() for steps in (100, 200)]
    assert falling[0] != falling[1]
