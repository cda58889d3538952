"""A prompt drawn by itself is the one of the batch; prompts to choose by share no concept with those of a claim."""

import torch

from smalti.evaluation.held_out_prompts import draw_latents, held_out_prompts
from smalti.evaluation.single_draws import other_concepts, picture_draws, pictures, single_draws
from smalti.zoo.loader import load_model


def test_single_draws():
    pipe, prompts = load_model("emoji"), held_out_prompts("emoji", 3)
    pipe.set_progress_bar_config(disable=True)
    batch, draws = draw_latents(pipe, prompts, 2), single_draws(pipe, prompts, 2)
    assert torch.allclose(torch.cat([draw() for draw in draws]), batch, atol=1e-4)
    drawn = picture_draws(pipe, draws[:1])[0]()
    assert torch.equal(drawn, pictures(pipe, draws[0]()))
    assert drawn.shape == (1, 3, 64, 64)
    assert 0 <= drawn.min() < drawn.max() <= 1


def test_other_concepts():
    prompts = held_out_prompts("emoji", 64)
    others = other_concepts("emoji", prompts, 16)
    assert len(others) == len(set(others.texts)) == 16
    assert not set(others.texts) & set(prompts.texts)
    assert not set(others.seeds) & set(prompts.seeds)
    assert len(set(others.styles)) == 4
