"""Whether a model copies its training pictures: nearest neighbours in feature space.

A sample counts as a copy when it is nearer to some training picture than all but one percent of the training pictures
are to their own nearest neighbour among the others. If concepts are given, "the others" are pictures of other concepts:
sets may hold one drawing twice, and without this its distance of zero would be the threshold. Distances are Euclidean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.core.errors import UserError

QUANTILE = 0.01
CHUNK = 512


@dataclass(frozen=True)
class CopyReport:
    """Nearest-neighbour statistics of samples against a training set.

    Args:
        share: share of samples below the threshold, in [0, 1].
        threshold: 1st percentile of the distances from training pictures to their nearest other one.
        median_to_train: median distance of samples to their nearest training picture.
        median_between_train: median distance of training pictures to their nearest other training picture.
        median_train_pair: median distance of two training pictures.
        nearest: index of the nearest training picture of each sample.
    """

    share: float
    threshold: float
    median_to_train: float
    median_between_train: float
    median_train_pair: float
    nearest: tuple[int, ...]

    @property
    def is_memorised(self) -> bool:
        """Whether samples lie nearer to training pictures than these lie to each other, by median of the nearest."""
        return self.median_to_train < self.median_between_train


def copy_report(samples: Tensor, train: Tensor, concepts: Tensor | None = None) -> CopyReport:
    """Statistics of samples against training pictures.

    Args:
        samples: features (N, D), N >= 1.
        train: features (M, D), M >= 2.
        concepts: concept of each training picture (M,) long; pictures of one concept are no neighbours of each other.

    Raises:
        UserError: a set is too small, or the shapes do not fit.
    """
    concepts = torch.arange(len(train)) if concepts is None else concepts
    fits = samples.shape[1:] == train.shape[1:] and len(concepts) == len(train)
    if len(samples) < 1 or len(concepts.unique()) < 2 or not fits:
        raise UserError(
            f"got features of shapes {tuple(samples.shape)} and {tuple(train.shape)} and {len(concepts)} concepts; "
            "give at least 1 sample and 2 training pictures of equal width and of different concepts"
        )
    distance, index = nearest(samples, train)
    between, _ = nearest(train, train, (concepts, concepts))
    threshold = torch.quantile(between, QUANTILE)
    return CopyReport(
        share=float((distance < threshold).float().mean()),
        threshold=float(threshold),
        median_to_train=float(distance.median()),
        median_between_train=float(between.median()),
        median_train_pair=float(_pair_median(train)),
        nearest=tuple(index.tolist()),
    )


def nearest(features: Tensor, reference: Tensor, groups: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Distance (N,) and index (N,) of the nearest reference (M, D) of each feature (N, D).

    Args:
        features: what is asked about.
        reference: where neighbours are looked for.
        groups: group of each feature (N,) and of each reference (M,); neighbours of the same group do not count.
    """
    reference = reference.double()  # products of float32 would blur distances between near duplicates
    distances, indices = [], []
    for start in range(0, len(features), CHUNK):
        rows = torch.cdist(features[start : start + CHUNK].double(), reference)
        if groups is not None:
            rows[groups[0][start : start + CHUNK, None] == groups[1]] = torch.inf
        least = rows.min(1)
        distances.append(least.values)
        indices.append(least.indices)
    return torch.cat(distances), torch.cat(indices)


def _pair_median(train: Tensor, most: int = 1000) -> Tensor:
    """Median distance over pairs of the first 1000 of an evenly spaced subset."""
    step = max(1, len(train) // most)
    return torch.pdist(train[::step][:most].float()).median()
