"""How well a model draws handwritten digits of asked classes: a small classifier reads them.

The classifier learns the training digits once, in less than a minute, and is kept in the cache. Its answers give the
share of drawn digits that are what was asked for; its last hidden layer gives features for a Fréchet distance, which
compares with nothing but others of the same name and count.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smalti.data.digits import CLASSES, load_digits
from smalti.data.packages import cache_folder
from smalti.evaluation.fit_once import SEED, fit_once
from smalti.evaluation.frechet import frechet_distance

METRIC = "FD-digits"
FEATURES, EPOCHS = 64, 12


class DigitClassifier(nn.Module):
    """Pixels (B, 1, 32, 32) in [-1, 1] -> logits (B, 10); `features` gives what they are read from (B, 64)."""

    def __init__(self):
        super().__init__()
        sides = [(1, 16), (16, 32), (32, 64)]
        layers = [part for one in sides for part in (nn.Conv2d(*one, 3, stride=2, padding=1), nn.ReLU())]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, pixels: Tensor) -> Tensor:
        """The last hidden layer (B, 64)."""
        return self.body(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))


class DigitReport(NamedTuple):
    """Of drawn digits.

    Args:
        distance: Fréchet distance to held-out digits of the same classes.
        accuracy: share that the classifier takes for what was asked.
    """

    distance: float
    accuracy: float


@torch.no_grad()
def digit_report(pixels: Tensor, rows: Tensor | None = None) -> DigitReport:
    """Figures of pictures (N, 1, 32, 32) in [-1, 1] that were drawn for the classes of the held-out digits.

    Args:
        pixels: one a digit.
        rows: which of the 1000 digits (N,); None = all. Distances of other counts do not compare.
    """
    classifier, real = load_classifier(), load_digits("held-out")
    wanted, labels = real.pixels(), real.labels
    if rows is not None:
        wanted, labels = wanted[rows], labels[rows]
    drawn = classifier.features(pixels.clamp(-1, 1))
    right = classifier.head(drawn).argmax(-1) == labels
    return DigitReport(frechet_distance(drawn, classifier.features(wanted)), right.float().mean().item())


@torch.no_grad()
def class_spread(pixels: Tensor, labels: Tensor) -> float:
    """How different digits of one class are: mean squared distance of their features to the class's mean.

    Args:
        pixels: (N, 1, 32, 32) in [-1, 1].
        labels: the classes (N,) they were drawn for.
    """
    features = load_classifier().features(pixels.clamp(-1, 1))
    parts = [features[labels == one] for one in labels.unique()]
    return float(torch.cat([(part - part.mean(0)).square().sum(1) for part in parts]).mean())


@cache
def load_classifier() -> DigitClassifier:
    """The classifier, trained at the first call."""
    digits, model = load_digits("train"), DigitClassifier()
    path = cache_folder() / "prepared" / f"digit-classifier-{digits.hash[:12]}-{SEED}.safetensors"
    fit_once(model, path, digits.pixels(), digits.labels, EPOCHS)
    return model
