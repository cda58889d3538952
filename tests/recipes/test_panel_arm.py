"""One arm of the claim on sets, small: its parts fit together, and what must not be told is not told."""

import math

import pytest
import torch

from smalti.data.emoji import load_emoji
from smalti.recipes import panel_arm
from smalti.recipes.panel_arm import (
    LAYOUT,
    PanelArm,
    captioner,
    draw_apart,
    draw_sets,
    given_agreement,
    measure,
    pipeline,
    prompt_sets,
    reader,
    train_panel_arm,
    training_sets,
)


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Fewer pictures, fewer steps, a cache of its own."""
    monkeypatch.setenv("SMALTI_CACHE", str(tmp_path))
    monkeypatch.setattr(panel_arm, "STEPS", 2)
    monkeypatch.setattr(panel_arm, "TOPICS_CPU", ("hearts", "weather"))
    for one in (panel_arm.encoder, panel_arm.reader):
        one.cache_clear()
    yield
    for one in (panel_arm.encoder, panel_arm.reader):
        one.cache_clear()


def test_prompts_are_of_held_out_concepts_and_name_no_style():
    trained = {caption for one in training_sets(60, 0) for caption in one.captions}
    held_out = {item.label for item in load_emoji("held-out").items}
    for one in prompt_sets(20, 0):
        assert set(one.captions) <= held_out
        assert not set(one.captions) & trained
        text = captioner()(one.captions)
        assert text.startswith("[PAIR] [LEFT] ")
        assert "[RIGHT]" in text
        assert not any(style in text for style in ("noto", "twemoji", "fluent"))


def test_mixed_up_pairs_share_no_style_and_are_otherwise_the_same():
    plain, mixed = training_sets(60, 0), training_sets(60, 0, mixed=True)
    assert all(len(set(one.shared)) == 1 for one in plain)
    assert sum(len(set(one.shared)) > 1 for one in mixed) > 30
    assert sorted(one.captions[1] for one in plain) == sorted(one.captions[1] for one in mixed)


def test_an_arm_learns_draws_and_is_measured(few):
    pytest.importorskip("efficientnet_lite_pytorch")
    pipe, sets = pipeline(), prompt_sets(4, 0)
    speed = train_panel_arm(pipe, PanelArm(sets=4, rank=2), 2, seed=0)
    assert speed > 0
    assert reader().accuracy > 0.5
    drawn = draw_sets(pipe, sets, 0)
    assert drawn.shape == (4, LAYOUT.count, 3, 64, 64)
    figures = measure(drawn, sets)
    assert all(math.isfinite(one) for one in figures.values())
    known = draw_sets(pipe, sets, 0, known=True)
    first = torch.stack([one.panels[0] for one in sets])
    assert (known[:, 0] - first).abs().mean() < 0.1  # as the autoencoder gives it back
    assert 0 <= given_agreement(known, sets) <= 1
    assert draw_apart(pipeline(), sets, 0).shape == drawn.shape
