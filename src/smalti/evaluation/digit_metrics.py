"""How well a model draws handwritten digits of asked classes: a small classifier reads them.

The classifier learns the training digits once, in less than a minute, and is kept in the cache. Its answers give the
share of drawn digits that are what was asked for; its last hidden layer gives features for a Fréchet distance, which
compares with nothing but others of the same name and count.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from smalti.core.files import atomic_file
from smalti.data.digits import CLASSES, load_digits
from smalti.data.packages import cache_folder
from smalti.evaluation.frechet import frechet_distance

METRIC = "FD-digits"
FEATURES, EPOCHS, BATCH, SEED = 64, 12, 64, 0


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
def digit_report(pixels: Tensor) -> DigitReport:
    """Figures of pictures (1000, 1, 32, 32) in [-1, 1] that were drawn for the classes of the held-out digits."""
    classifier, real = load_classifier(), load_digits("held-out")
    drawn = classifier.features(pixels.clamp(-1, 1))
    right = classifier.head(drawn).argmax(-1) == real.labels
    return DigitReport(frechet_distance(drawn, classifier.features(real.pixels())), right.float().mean().item())


@cache
def load_classifier() -> DigitClassifier:
    """The classifier, trained at the first call."""
    digits, model = load_digits("train"), DigitClassifier()
    path = cache_folder() / "prepared" / f"digit-classifier-{digits.hash[:12]}-{SEED}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        _train(model, digits.pixels(), digits.labels)
        _save(model, path)
    return model.eval().requires_grad_(False)


def _train(model: DigitClassifier, pixels: Tensor, labels: Tensor) -> None:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(SEED)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        steps = EPOCHS * len(labels) // BATCH
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(labels), (BATCH,))
            shift = torch.randint(-2, 3, (2,)).tolist()
            F.cross_entropy(model(pixels[rows].roll(shift, (2, 3))), labels[rows]).backward()
            optimizer.step()
            rates.step()
            optimizer.zero_grad()


def _save(model: DigitClassifier, path: Path) -> None:
    with atomic_file(path) as temporary:
        save_file(model.state_dict(), temporary)
