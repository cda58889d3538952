"""Moments of a stream of latents, in float64: what a tokenizer normalises with."""

from collections.abc import Iterable

from torch import Tensor


def channel_moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,), float64, of each channel over all latents (B, C, ...).

    Raises:
        ValueError: there are no latents.
    """
    return _moments(z.double().transpose(0, 1).flatten(1) for z in batches)  # (C, values)


def element_moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance (C, ...), float64, of each channel at each place over all latents (B, C, ...).

    Raises:
        ValueError: there are no latents.
    """
    return _moments(z.double().movedim(0, -1) for z in batches)  # (C, ..., B)


def _moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance along the last dim."""
    count, total, squares = 0, 0.0, 0.0
    for z in batches:
        count += z.shape[-1]
        total, squares = total + z.sum(-1), squares + z.square().sum(-1)
    if not isinstance(total, Tensor) or not isinstance(squares, Tensor):
        raise ValueError("no latents to measure")
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0)
