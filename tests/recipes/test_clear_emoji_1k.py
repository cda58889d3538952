"""The student of emoji-1k: a training end to end, and what it leaves to be drawn with."""

from dataclasses import replace

import torch

from smalti.acceleration.clear import distilled
from smalti.recipes import clear_emoji_1k as recipe
from smalti.training.attention_deltas import load_deltas
from smalti.training.config import TrainConfig
from smalti.zoo.loader import load_model


def test_a_training_gives_deltas_that_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "HELD_OUT", 2)
    config = TrainConfig(steps=2, batch=2, learning_rate=1e-3, eval_every=2, eval_samples=2)
    chosen = replace(recipe.PRESETS["cpu"], training=config, samples=3, draw_steps=1)
    deltas = load_deltas(recipe.train(chosen, tmp_path))
    assert deltas.card["method"] == {"radius": 3, "pool": 4}
    assert set(deltas.card["metrics"]) == {"velocity error before", "velocity error after"}
    assert len(deltas.weights) == 5 * 4
    assert len(deltas.extra) == 5
    assert all(one.abs().max() > 0 for one in deltas.weights.values())
    pipe = load_model("emoji-1k")
    settings = {"num_inference_steps": 1, "output_type": "latent"}

    def draw():
        return pipe("sun", generator=torch.Generator().manual_seed(0), **settings).images

    plain = draw()
    with distilled(pipe, deltas) as handle:
        assert not torch.equal(draw(), plain)
        assert sum(handle.report().methods[0].events.values()) == 5
    assert torch.equal(draw(), plain)
