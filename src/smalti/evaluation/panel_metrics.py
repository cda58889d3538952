"""How well the panels of drawn sets belong together, and how well each shows what its caption says.

Agreement: a classifier of what a set shares, fitted on real pictures, reads it off every panel; the figure is the share
of pairs of panels of one set in which it reads the same. Spread: the variance of features between panels of a set, over
that between panels of different sets; 1 = a set means nothing. Match: a judge must prefer a panel's own caption to
those of the other panels of its set, which a model that draws both captions everywhere fails. Set distance: the Fréchet
distance of the features of all panels of a set side by side.

Source: the evaluation that In-Context LoRA (arXiv 2410.23775) leaves to the eye, in numbers.
Letters: S sets, P panels, D feature width.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from smalti.core.errors import UserError
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.judges import RetrievalJudge

HIDDEN = 128


class SharedReader(nn.Module):
    """Reads the class of a picture off its features, by one hidden layer; `SharedReader.fit` makes it.

    Args:
        width: D of the features.
        classes: names by index.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, classes: Sequence[str]):
        super().__init__()
        self.classes, self.accuracy = tuple(classes), float("nan")
        self.layers = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(width, HIDDEN), nn.GELU(), nn.Dropout(0.4), nn.Linear(HIDDEN, len(classes))
        )
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    @classmethod
    def fit(cls, features: Tensor, classes: Sequence[str], groups: Tensor, steps: int = 500, seed: int = 0) -> Self:
        """Fits on real pictures; `accuracy` is that of a first fit on all groups but a fifth of them.

        Args:
            features: (N, D).
            classes: of each picture.
            groups: what near duplicates share (N,), such as their concept.
            steps: of AdamW on 256 pictures each.
            seed: of weights and order.
        """
        names = sorted(set(classes))
        if len(names) < 2 or not len(features) == len(classes) == len(groups):
            raise UserError(
                f"got {len(features)} features, {len(classes)} classes of {len(names)} names and {len(groups)} groups; "
                "give one of each a picture, of at least 2 names"
            )
        target = torch.tensor([names.index(one) for one in classes])
        part = torch.isin(groups, groups.unique()[::5])
        first = cls(features.shape[1], names)._optimise(features[~part], target[~part], steps, seed)
        reader = cls(features.shape[1], names)._optimise(features, target, steps, seed)
        reader.accuracy = float((first(features[part]) == target[part]).double().mean())
        return reader

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Class indices (...,) of features (..., D)."""
        return self.layers((features - self.mean) / self.std).argmax(-1)

    def _optimise(self, features: Tensor, target: Tensor, steps: int, seed: int) -> Self:
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0).clamp_min(1e-4))
        features = (features - self.mean) / self.std
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
            optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.1)
            for _ in range(steps):
                rows = torch.randint(len(features), (256,))
                noisy = features[rows] + 0.1 * torch.randn(256, features.shape[1])
                loss = functional.cross_entropy(self.layers(noisy), target[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return self.eval().requires_grad_(False)


def agreement(read: Tensor) -> Tensor:
    """For each set the share of its pairs of panels with one class, (S,) in [0, 1].

    Args:
        read: class of every panel (S, P), P >= 2.
    """
    pairs = [read[:, one] == read[:, other] for one, other in combinations(range(_panels(read)), 2)]
    return torch.stack(pairs, 1).double().mean(1)


def spread_within(features: Tensor) -> float:
    """Mean squared distance of panels of one set over that of panels of different sets; features (S, P, D), S >= 2."""
    sets, panels = len(features), _panels(features)
    if sets < 2:
        raise UserError("got one set; the spread within sets is measured against that between at least 2")
    flat = features.double().flatten(0, 1)
    squared = torch.cdist(flat, flat).square()
    same = torch.arange(sets).repeat_interleave(panels)
    same = (same[:, None] == same) & ~torch.eye(len(flat), dtype=torch.bool)
    other = ~same & ~torch.eye(len(flat), dtype=torch.bool)
    return float(squared[same].mean() / squared[other].mean())


def panel_match(judge: RetrievalJudge, features: Tensor, text: Tensor) -> Tensor:
    """For each panel whether its own caption fits best among those of its set: bool (S, P).

    Args:
        judge: of pictures and captions.
        features: of the panels (S, P, D).
        text: the judge's vectors of their captions (S, P, T).
    """
    panels, found = _panels(features), []
    for panel in range(panels):
        order = [panel, *(other for other in range(panels) if other != panel)]
        found.append(judge.rank(features[:, panel], text[:, order]) == 0)
    return torch.stack(found, 1)


def set_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of sets: features (S, P, D) side by side, beside as many real sets."""
    return frechet_distance(features.flatten(1), reference.flatten(1))


def _panels(some: Tensor) -> int:
    if some.ndim < 2 or some.shape[1] < 2:
        raise UserError(f"got sets of shape {tuple(some.shape)}; give (sets, panels, ...) with at least 2 panels")
    return some.shape[1]
