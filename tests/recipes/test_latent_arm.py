import dataclasses

import pytest
import torch

from smalti.core.seeds import generators_for
from smalti.data.digits import load_digits
from smalti.evaluation import digit_metrics, digit_segmenter
from smalti.objectives.beta_process import BetaProcess
from smalti.objectives.ddpm import DDPM
from smalti.recipes import digit_latents as recipe
from smalti.recipes.digit_latents import decode_digits, digit_autoencoder, digit_latents, encoded_digits
from smalti.recipes.latent_arm import FLOW, train_latent_arm
from smalti.recipes.latent_figures import flow_figures
from smalti.sampling.dopri5 import Dopri5
from smalti.systems import lfm
from smalti.training.config import TrainConfig

CACHED = (digit_latents, digit_autoencoder, digit_metrics.load_classifier, digit_segmenter.load_segmenter)


@pytest.fixture
def small(digits, monkeypatch):
    """Everything learns for a moment, on digits that a font wrote."""
    monkeypatch.setattr(recipe, "TRAINING", dataclasses.replace(recipe.TRAINING, steps=40, warmup=0, batch=32))
    monkeypatch.setattr(digit_metrics, "EPOCHS", 5)
    monkeypatch.setattr(digit_segmenter, "EPOCHS", 5)
    for module in (digit_metrics, digit_segmenter):
        monkeypatch.setattr(module, "SEED", 5)  # other files of the same cache
    for one in CACHED:
        one.cache_clear()
    yield
    for one in CACHED:
        one.cache_clear()
    for path in (digits / "prepared").glob("digit-*-5.safetensors"):
        path.unlink()


def config(steps=4):
    return TrainConfig(steps=steps, batch=8, learning_rate=4e-3, ema=0.5, eval_every=steps, eval_samples=16)


def test_latents_are_made_once_and_drawn_anew(small, digits):
    train, rows = digit_latents("train"), torch.arange(6)
    batches = [train.batch(rows, generators_for(range(start, start + 6))) for start in (0, 6)]
    assert batches[0].x0.shape == (6, 4, 8, 8)
    assert not torch.equal(batches[0].x0, batches[1].x0)
    held_out = digit_latents("held-out").batch(rows, generators_for(range(6)))
    live = encoded_digits("held-out").batch(rows, generators_for(range(6)))
    torch.testing.assert_close(held_out.x0, live.x0, atol=2e-3, rtol=2e-3)  # float16 on disk
    real = load_digits("held-out").pixels()[:6]
    assert (decode_digits(live.x0) - real).square().mean() < 0.1
    maps = digit_latents("train", True).batch(rows, generators_for(range(6))).cond
    assert maps.extra["segments"].shape == (6, 32, 32)
    assert (maps.label == 10).all()
    (folder,) = (digits / "prepared").glob("digit-autoencoder*")
    before = folder.stat().st_mtime_ns
    digit_autoencoder.cache_clear()
    digit_autoencoder()
    assert folder.stat().st_mtime_ns == before


@pytest.mark.parametrize("objective", [FLOW, DDPM(BetaProcess("cosine"))])
def test_an_arm_learns_and_draws(small, objective):
    trained = train_latent_arm(objective, config())
    drawn = trained.draw(3)
    assert drawn.latents.shape == (30, 4, 8, 8)
    assert drawn.latents.isfinite().all()
    assert drawn.calls == 3
    assert torch.equal(drawn.latents, trained.draw(3).latents)
    assert not torch.equal(drawn.latents, trained.draw(3, guidance=3.0).latents)
    if trained.process is None:
        assert trained.draw(solver=Dopri5(1e-2, 1e-2), count=4).calls >= 8


def test_all_figures_of_the_claim_are_measured(small, monkeypatch):
    monkeypatch.setattr("smalti.recipes.latent_figures.FINE", 4)
    monkeypatch.setattr("smalti.recipes.latent_figures.COMPARED", 12)
    monkeypatch.setattr("smalti.recipes.latent_figures.GUIDED", 20)
    monkeypatch.setattr("smalti.recipes.latent_figures.TOLERANCES", ("1e-1", "1e-2"))
    monkeypatch.setattr("smalti.recipes.latent_figures.VGG16.pretrained", lambda: None)
    monkeypatch.setattr("smalti.recipes.latent_tasks.inpainting.__defaults__", (8, None))
    monkeypatch.setattr("smalti.recipes.latent_tasks.drawing_maps.__defaults__", (8,))
    figures = flow_figures(train_latent_arm(FLOW, config()), config(2), (1.0, 2.0))
    assert figures["outside"] == figures["outside, pasted"] == 0
    assert figures["inside"] > 0
    assert 0 <= figures["mIoU"] <= 1
    assert figures["calls, dopri5 1e-2"] >= figures["calls, dopri5 1e-1"]
    assert figures["reconstruction"] > 0
    assert figures["matching"] > 0


def test_the_page_measures_an_arm(small):
    figures = lfm.arm("ddpm", seed=0, steps=2, whole=0)
    assert {f"FD at {calls}" for calls in lfm.CALLS} <= set(figures)
