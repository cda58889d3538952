"""Both tasks can be learned a little, and a held-out loss is the same at every call."""

import math

import pytest
import torch

from smalti.backbones.text_transformer import MaskedLanguageModel, TextShape, Translator
from smalti.data.words import VOCABULARY
from smalti.tasks.language import held_out_loss, masked_lines, names_from_keywords, train_language
from smalti.training.config import TrainConfig

CONFIG = TrainConfig(steps=40, batch=16, learning_rate=5e-3, warmup=5, ema=0.8, save_every=40)


@pytest.mark.parametrize("kind", ["masked", "pairs"])
def test_learns(kind):
    shape = TextShape(VOCABULARY, width=16, depth=1, heads=2, order="macaron")
    if kind == "masked":
        task, model = masked_lines(limit=24), MaskedLanguageModel(shape)
    else:
        task, model = names_from_keywords(), Translator(shape)
    before = held_out_loss(task, model.eval(), repeats=1)
    trained = train_language(task, model.train(), CONFIG)
    after = held_out_loss(task, trained, repeats=1)
    assert before < 1.25 * math.log(VOCABULARY)  # an untrained model guesses about as well as chance
    assert after < min(before - 0.5, math.log(VOCABULARY))
    assert held_out_loss(task, trained, repeats=1) == after
    assert not trained.training


def test_no_concept_is_on_both_sides():
    task = masked_lines()
    assert not {one.name for one in task.train.words} & {one.name for one in task.held_out.words}
    assert len(task.train) > 1500
    assert all(one.keywords for one in names_from_keywords().train.words)


def test_a_seed_repeats_a_training():
    shape = TextShape(VOCABULARY, width=16, depth=1, heads=2)
    task, found = masked_lines(limit=16), []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(held_out_loss(task, train_language(task, MaskedLanguageModel(shape), CONFIG), repeats=1))
    assert found[0] == found[1]
