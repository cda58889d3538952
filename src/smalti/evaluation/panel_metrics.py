"""How well the panels of drawn sets belong together, and how well each shows what its caption says.

Agreement: a classifier of what a set shares, fitted on real pictures, reads it off every panel; the figure is the share
of pairs of panels of one set in which it reads the same. Spread: the variance of features between panels of a set, over
that between panels of different sets; 1 = a set means nothing. Match: a judge must prefer a panel's own caption to
those of the other panels of its set, which a model that draws both captions everywhere fails. Set distance: the Fréchet
distance of the features of all panels of a set side by side.

Source: the evaluation that In-Context LoRA (arXiv 2410.23775) leaves to the eye, in numbers.
Letters: S sets, P panels, D feature width.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Self

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.judges import RetrievalJudge
from smalti.evaluation.probe import PENALTIES, ridge


@dataclass(frozen=True, eq=False)
class SharedReader:
    """Reads the class of a picture off its features, by ridge regression onto one-hot targets.

    Args:
        weights: (D + 1, classes).
        mean, std: of the features it was fitted on (D,).
        classes: names by index.
        accuracy: on pictures of groups that it was not fitted on.
    """

    weights: Tensor
    mean: Tensor
    std: Tensor
    classes: tuple[str, ...]
    accuracy: float = float("nan")

    @classmethod
    def fit(cls, features: Tensor, classes: list[str], groups: Tensor) -> Self:
        """Fits on real pictures; the penalty is chosen on a fifth of the groups, which is then fitted on too.

        Args:
            features: (N, D).
            classes: of each picture.
            groups: what near duplicates share (N,), such as their concept.
        """
        names = tuple(sorted(set(classes)))
        if len(names) < 2 or not len(features) == len(classes) == len(groups):
            raise UserError(
                f"got {len(features)} features, {len(classes)} classes of {len(names)} names and {len(groups)} groups; "
                "give one of each a picture, of at least 2 names"
            )
        target = torch.tensor([names.index(one) for one in classes])
        mean, std = features.double().mean(0), features.double().std(0).clamp_min(1e-6)
        known = _standard(features, mean, std)
        part = torch.isin(groups, groups.unique()[::5])

        def accuracy(penalty: float) -> float:
            weights = ridge(known[~part], target[~part], penalty)
            return float(((known[part] @ weights).argmax(1) == target[part]).double().mean())

        best = max(PENALTIES, key=accuracy)
        return cls(ridge(known, target, best), mean, std, names, accuracy(best))

    def __call__(self, features: Tensor) -> Tensor:
        """Class indices (...,) of features (..., D)."""
        flat = _standard(features.flatten(0, -2), self.mean, self.std) @ self.weights
        return flat.argmax(1).unflatten(0, features.shape[:-1])


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


def _standard(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    scaled = (features.double() - mean) / std
    return torch.cat([scaled, torch.ones(len(scaled), 1, dtype=torch.float64)], dim=1)
