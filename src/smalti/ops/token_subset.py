"""Some tokens of a sequence: gather them, put them back, write their rows into what is kept of all.

A set of tokens is the places of n of them in ascending order, one set for all samples (n,) or one for each (B, n), all
of one size. `gather` takes them out of a sequence, of positions or of a mask; `scatter` puts them into a copy of a
whole sequence; `write_rows` overwrites rows of keys and values in place.

Source: Region-Adaptive Sampling (arXiv 2502.10389), section 3. Shapes: N tokens of the whole sequence.
"""

import torch
from torch import Tensor


def gather(x: Tensor, index: Tensor, axis: int = 1) -> Tensor:
    """The tokens at `index` along an axis.

    Args:
        x: (B, ..., N, ...); with a set for each sample a first axis of 1 is repeated.
        index: (n,) or (B, n).
        axis: of the tokens.

    Returns:
        x with n in place of N.
    """
    if index.ndim == 1:
        return x.index_select(axis, index)
    x = x.expand(len(index), *x.shape[1:])
    return x.gather(axis, _spread(index, x, axis))


def scatter(rows: Tensor, index: Tensor, base: Tensor, axis: int = 1) -> Tensor:
    """A copy of `base` (B, ..., N, ...) with `rows` (B, ..., n, ...) at the places of `index`, (n,) or (B, n)."""
    if index.ndim == 1:
        return base.index_copy(axis, index, rows)
    return base.scatter(axis, _spread(index, rows, axis), rows)


def write_rows(kept: Tensor, rows: Tensor, index: Tensor, axis: int = -2, samples: Tensor | None = None) -> None:
    """Overwrites rows in place.

    Args:
        kept: (B, ..., N, ...), such as the keys of all tokens (B, h, N, d).
        rows: (b, ..., n, ...).
        index: places of the rows, (n,) or (b, n).
        axis: of the tokens.
        samples: the b samples of `kept` that the rows belong to; None = all.
    """
    part = kept if samples is None else kept.index_select(0, samples)
    if index.ndim == 1:
        part.index_copy_(axis, index, rows)
    else:
        part.scatter_(axis, _spread(index, rows, axis), rows)
    if samples is not None:
        kept.index_copy_(0, samples, part)


def whole_index(active: Tensor, start: int, count: int, length: int) -> Tensor:
    """A set of image tokens as a set of the sequence that they stand in, of which all else is kept.

    Args:
        active: places among the image tokens, (n,) or (B, n).
        start: place of the first image token.
        count: number of image tokens.
        length: of the sequence.

    Returns:
        Places in the sequence, (n + length - count,) or (B, n + length - count).
    """
    places = torch.arange(length, device=active.device).expand(*active.shape[:-1], length)
    return torch.cat([places[..., :start], active + start, places[..., start + count :]], -1)


def is_in(index: Tensor, count: int) -> Tensor:
    """Which of `count` tokens a set holds, (1, count) or (B, count), bool."""
    rows = index if index.ndim == 2 else index[None]
    return torch.zeros(len(rows), count, dtype=torch.bool, device=index.device).scatter_(1, rows, True)


def _spread(index: Tensor, like: Tensor, axis: int) -> Tensor:
    """(B, n) as the index of a gather along an axis of `like`."""
    axis = axis % like.ndim
    shape = [1] * like.ndim
    shape[0], shape[axis] = index.shape
    sizes = list(like.shape)
    sizes[axis] = index.shape[1]
    return index.reshape(shape).expand(sizes)
