"""What hidden states know: a linear probe of them, and how alike their neighbourhoods are to those of other features.

Probe: the class is read off by ridge regression onto one-hot targets, in closed form, with features standardised on the
training samples; the penalty is chosen on a fifth of their groups, kept whole. CKNNA (arXiv 2405.07987, appendix A):
with centred kernels K and L of two sets of features and alpha(i, j) = 1 where j is among the k nearest neighbours of i
in both,

    Align(K, L) = sum_ij alpha(i, j) K_ij L_ij,   CKNNA = Align(K, L) / sqrt(Align(K, K) Align(L, L)).

Source: linear probes as in REPA (arXiv 2410.06940), section 3 and figure 2.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.protocols import Batch
from smalti.core.seeds import derive_seed, generators_for, randn
from smalti.core.time import interpolate
from smalti.seams.taps import Taps

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
CHOSEN_ON = 5
"""One group of training samples in so many chooses the penalty."""


@torch.no_grad()
def hidden_states(
    model: nn.Module, batches: Iterable[Batch], t: float, depths: Sequence[int], seed: int = 0
) -> dict[int, Tensor]:
    """Mean image token (S, D) after each block, of noisy samples at one time.

    Args:
        model: a denoiser `(x, t, cond) -> velocity`, in evaluation mode.
        batches: samples; the noise of each follows from its id.
        t: time in [0, 1].
        depths: blocks, counted from 1.
        seed: of the noise.
    """
    taps = Taps(model, depths)
    found: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    try:
        for batch in batches:
            noise = randn(batch.x0.shape, generators_for([derive_seed(seed, int(one)) for one in batch.ids]))
            times = torch.full((len(batch.x0),), t, device=batch.x0.device)
            model(interpolate(batch.x0, noise.to(batch.x0.device), times), times, batch.cond)
            for depth in depths:
                found[depth].append(taps.taken.tokens[depth].float().mean(1).cpu())
    finally:
        taps.remove()
    return {depth: torch.cat(parts) for depth, parts in found.items()}


def linear_probe(features: Tensor, classes: Tensor, groups: Tensor, unseen: Tensor, unseen_classes: Tensor) -> float:
    """Share of unseen samples whose class a linear probe names.

    Args:
        features: of the training samples (S, D).
        classes: theirs (S,), long, from 0.
        groups: what near duplicates share, such as their concept (S,); none stands on both sides of the choice.
        unseen: features of other samples (U, D).
        unseen_classes: theirs (U,).

    Raises:
        UserError: counts do not agree, or there are fewer than 2 classes or groups.
    """
    known_groups = groups.unique()
    is_whole = len(features) == len(classes) == len(groups) and len(unseen) == len(unseen_classes)
    if not is_whole or len(classes.unique()) < 2 or len(known_groups) < 2:
        raise UserError(
            f"got {len(features)} features with {len(classes)} labels of {len(classes.unique())} classes and "
            f"{len(groups)} of {len(known_groups)} groups; give one of each a sample, at least 2 classes and 2 groups"
        )
    mean, std = features.double().mean(0), features.double().std(0).clamp_min(1e-6)

    def standard(some: Tensor) -> Tensor:
        return torch.cat([(some.double() - mean) / std, torch.ones(len(some), 1, dtype=torch.float64)], dim=1)

    part = torch.isin(groups, known_groups[::CHOSEN_ON])
    rest = ~part
    known = standard(features)
    best = max(
        PENALTIES, key=lambda one: _accuracy(_ridge(known[rest], classes[rest], one), known[part], classes[part])
    )
    return _accuracy(_ridge(known, classes, best), standard(unseen), unseen_classes)


def cknna(one: Tensor, other: Tensor, neighbours: int = 10) -> float:
    """Alignment of two sets of features (S, D) and (S, E) of the same samples, at most 1.

    Args:
        one: features; rows are normalised.
        other: features of another kind.
        neighbours: k, below S.
    """
    if len(one) != len(other) or not 0 < neighbours < len(one):
        raise UserError(
            f"got {len(one)} and {len(other)} samples with k = {neighbours}; give as many of each, more than k"
        )
    first, second = _kernel(one), _kernel(other)
    near_first, near_second = _neighbours(first, neighbours), _neighbours(second, neighbours)
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    both = (first * second * (near_first & near_second)).sum()
    return float(both / ((first.square() * near_first).sum() * (second.square() * near_second).sum()).sqrt())


def _kernel(features: Tensor) -> Tensor:
    normed = nn.functional.normalize(features.double(), dim=1)
    return normed @ normed.T


def _neighbours(kernel: Tensor, count: int) -> Tensor:
    """Which samples are the nearest of each (S, S), itself left out."""
    nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(count, dim=1).indices
    return torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, nearest, True)


def _ridge(features: Tensor, classes: Tensor, penalty: float) -> Tensor:
    """Weights (D, classes) of ridge regression onto one-hot targets; the penalty is a share of the samples."""
    targets = nn.functional.one_hot(classes).double()
    gram = features.T @ features + penalty * len(features) * torch.eye(features.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, features.T @ targets)


def _accuracy(weights: Tensor, features: Tensor, classes: Tensor) -> float:
    return float(((features @ weights).argmax(1) == classes).double().mean())
