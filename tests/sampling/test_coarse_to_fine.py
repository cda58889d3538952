"""Larger pictures from the model's own: what the second stage starts from, what it runs with, what it leaves."""

import numpy as np
import pytest
import torch

import smalti
from smalti.acceleration.clear import CLEAR
from smalti.core.errors import NeverEngaged, Refusal, UserError
from smalti.sampling import coarse_to_fine as stages
from smalti.sampling.coarse_to_fine import FineSettings, coarse_to_fine, scaled_rope
from smalti.sampling.pictures import draw_pictures
from smalti.sampling.shift import uniform_schedule
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.zoo.loader import load_model

PROMPTS, LOOK = ["a red apple", "cat face"], ["noto", "twemoji"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    pipe = load_model("emoji")
    pipe.set_progress_bar_config(disable=True)
    length = pipe.config["text_length"]
    pipe.use_text_encoder(EmbeddingCache(MiniLMEncoder(length=length), tmp_path_factory.mktemp("text")))
    return pipe


def draw(pipe, stage=None, size=128, **settings):
    chosen = FineSettings(**{"steps": 3, **settings})
    return coarse_to_fine(pipe, PROMPTS, LOOK, [0, 1], size, chosen, stage, num_inference_steps=4)


def pixels(pictures):
    return np.stack([np.asarray(one, dtype=np.float64) for one in pictures]) / 255


def test_at_next_to_no_strength_it_is_the_enlarged_base_picture(pipe):
    base = draw_pictures(pipe, PROMPTS, LOOK, [0, 1], num_inference_steps=4)
    fine = draw(pipe, strength=0.01, shift=1.0, guidance=1.0)
    assert fine[0].size == (128, 128)
    expected = pixels([one.resize((128, 128), 3) for one in base])
    assert np.abs(pixels(fine) - expected).mean() < 0.03
    assert np.abs(pixels(draw(pipe, strength=0.95)) - expected).mean() > 0.06


def test_the_second_stage_starts_from_the_shifted_strength_with_slow_angles_and_scaled_scores(pipe, monkeypatch):
    seen = {}
    plain = stages.sample

    def watched(transformer, x, schedule, *args, **kwargs):
        seen.update(schedule=schedule, theta=transformer.rope_theta, x=x, guidance=kwargs["guidance"].scale)
        return plain(transformer, x, schedule, *args, **kwargs)

    monkeypatch.setattr(stages, "sample", watched)
    report = []

    def stage(*methods):
        handle = smalti.apply(pipe, CLEAR(radius=3), *methods)
        report.append(handle)
        return handle

    draw(pipe, stage)
    assert seen["schedule"] == uniform_schedule(3, 10.0, start=0.7)
    assert seen["schedule"][0] == pytest.approx(0.959, abs=1e-3)
    assert seen["theta"] == 100_000
    assert seen["guidance"] == 7.5
    assert seen["x"].shape == (2, 16, 16, 16)
    names = {str(one.method).split("(")[0]: one.events for one in report[0].report().methods}
    assert names["ProportionalAttention"]["scaled"] == sum(names["CLEAR"].values()) >= 5 * 3
    assert pipe.transformer.rope_theta == 10_000


def test_every_part_of_it_acts(pipe):
    plain = {"ntk": 1.0, "is_proportional": False}
    base = pixels(draw(pipe, **plain))
    assert np.array_equal(pixels(draw(pipe, **plain)), base)
    for change in ({"ntk": 10.0}, {"is_proportional": True}, {"shift": 1.0}, {"guidance": 1.0}, {"strength": 0.4}):
        assert np.abs(pixels(draw(pipe, **{**plain, **change})) - base).max() > 0.02, change
    local = pixels(draw(pipe, lambda *methods: smalti.apply(pipe, CLEAR(2), *methods), **plain))
    assert np.abs(local - base).max() > 0.02


def test_the_pipeline_is_left_as_it_was(pipe):
    before = draw_pictures(pipe, PROMPTS, LOOK, [0, 1], num_inference_steps=2)
    with pytest.raises(NeverEngaged):
        draw(pipe, lambda *methods: smalti.apply(pipe, CLEAR(radius=100), *methods))
    after = draw_pictures(pipe, PROMPTS, LOOK, [0, 1], num_inference_steps=2)
    assert np.array_equal(pixels(before), pixels(after))
    assert pipe.transformer.rope_theta == 10_000


def test_what_cannot_be_is_refused(pipe):
    with pytest.raises(UserError, match="multiple"):
        draw(pipe, size=130)
    for settings in ({"strength": 0.0}, {"strength": 1.0}, {"ntk": 0.0}):
        with pytest.raises(UserError, match="strength="):
            FineSettings(**settings)
    with pytest.raises(Refusal, match="no rotary angles"), scaled_rope(torch.nn.Linear(1, 1), 10):
        pass
