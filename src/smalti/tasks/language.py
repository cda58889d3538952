"""Small language models on the names and keywords of emoji: set up, trained, and measured on held-out concepts.

Masked tokens (`MaskedLanguageModel` on `Lines`) or translation of keywords into a name (`Translator` on `Pairs`).
What differs between two models is up to the caller; order, hidden places and the held-out texts follow from the seed.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from smalti.core.protocols import Objective, TrainState
from smalti.data.words import MASK, ORDINARY, Lines, Pairs, load_words
from smalti.objectives.masked_tokens import MaskedTokens
from smalti.objectives.next_tokens import NextTokens
from smalti.training.config import TrainConfig
from smalti.training.data_order import SampleSource
from smalti.training.held_out import HeldOut
from smalti.training.trainer import Trainer


@dataclass(frozen=True)
class LanguageTask:
    """What is learned, and from which texts.

    Args:
        objective: of the model.
        train: texts of the training concepts.
        held_out: texts of the others.
    """

    objective: Objective
    train: SampleSource
    held_out: SampleSource


def masked_lines(limit: int = 64, share: float = 0.15) -> LanguageTask:
    """Hidden characters of lines `name: keyword, keyword, ...`.

    Args:
        limit: most characters of a line.
        share: of the characters that are guessed.
    """
    lines = partial(Lines, limit=limit)
    return LanguageTask(MaskedTokens(MASK, ORDINARY, share), lines(load_words("train")), lines(load_words("held-out")))


def names_from_keywords(label_smoothing: float = 0.1) -> LanguageTask:
    """The name of an emoji from its keywords."""
    train, held_out = ([one for one in load_words(split) if one.keywords] for split in ("train", "held-out"))
    return LanguageTask(NextTokens(label_smoothing), Pairs(train), Pairs(held_out))


def train_language(task: LanguageTask, model: nn.Module, config: TrainConfig) -> nn.Module:
    """Trains a model in place and returns its averaged weights, in evaluation mode."""
    with tempfile.TemporaryDirectory(prefix="smalti-language-") as folder:
        trainer = Trainer(model, task.objective, task.train, config, Path(folder))
        trainer.fit()
    return trainer.ema_model.eval()


def held_out_loss(task: LanguageTask, model: Callable, repeats: int = 4, batch: int = 64) -> float:
    """Mean loss on held-out concepts, in nats a token.

    Args:
        task: its objective and its held-out texts.
        model: in evaluation mode.
        repeats: how often every text is drawn, with other hidden places and another order of its keywords.
        batch: texts in one forward.
    """
    total = torch.zeros(2)
    for seed in range(repeats):
        held_out = HeldOut(task.held_out, len(task.held_out), batch, seed)
        total += held_out.loss(task.objective, model, TrainState(), torch.device("cpu"))
    return (total[0] / total[1]).item()
