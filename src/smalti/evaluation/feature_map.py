"""What hidden tokens show, block by block and noise by noise: pictures of their main directions, and probes.

The three main directions of the tokens of some samples, after one block at one time, are the colours of a picture; what
has the same colour is the same to the model. Signs are chosen so that the first sample's mean is not negative. Beside
the pictures a linear probe tells how much of the class can be read off.

Source: SRA (arXiv 2505.02831), figure 2 and section 3.1: features improve from early to late blocks and from much to
little noise, which is why one may teach the other.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate as resize

from smalti.core.errors import UserError
from smalti.core.protocols import Batch
from smalti.core.seeds import derive_seed, generators_for, randn
from smalti.core.time import interpolate
from smalti.evaluation.probe import hidden_states, linear_probe
from smalti.evaluation.sheet import sheet, to_images
from smalti.seams.taps import Taps

Place = tuple[int, float]
"""A block, from 1, and a time."""


def main_directions(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The first three principal components as colours.

    Args:
        tokens: of some samples (B, N, D), N = rows * columns.
        grid: rows and columns.

    Returns:
        (B, 3, rows, columns) in [-1, 1]; each colour spans its range over all samples.

    Raises:
        UserError: the tokens do not fill the grid, or have fewer than 3 channels.
    """
    if tokens.shape[1] != grid[0] * grid[1] or tokens.shape[-1] < 3:
        raise UserError(f"got tokens {tuple(tokens.shape)} on a grid {grid}; N is rows * columns, D at least 3")
    flat = tokens.double().flatten(0, 1)
    flat = flat - flat.mean(0)
    directions = torch.linalg.svd(flat, full_matrices=False).Vh[:3]  # (3, D)
    colours = flat @ directions.T  # (B * N, 3)
    sign = torch.where(colours[: tokens.shape[1]].mean(0) < 0, -1.0, 1.0)
    colours = colours * sign
    low, high = colours.aminmax(dim=0)
    colours = 2 * (colours - low) / (high - low).clamp_min(1e-12) - 1
    return colours.float().unflatten(0, tokens.shape[:2]).transpose(1, 2).unflatten(2, grid)


@torch.no_grad()
def feature_pictures(
    model: nn.Module, batch: Batch, depths: Sequence[int], times: Sequence[float], seed: int = 0, side: int = 64
) -> dict[Place, Tensor]:
    """Pictures (B, 3, side, side) of the tokens after each block at each time, the noise being the same.

    Args:
        model: a denoiser `(x, t, cond) -> velocity`, in evaluation mode.
        batch: samples with their conditions.
        depths: blocks, from 1.
        times: in [0, 1].
        seed: of the noise, one draw a sample.
        side: pixels along each side.
    """
    taps, found = Taps(model, depths), dict[Place, Tensor]()
    noise = randn(batch.x0.shape, generators_for([derive_seed(seed, int(one)) for one in batch.ids]), batch.x0.device)
    try:
        for t in times:
            at = torch.full((len(batch.x0),), t, device=batch.x0.device)
            model(interpolate(batch.x0, noise, at), at, batch.cond)
            grid = taps.taken.grid
            if grid is None or grid[0] != 1:
                raise UserError(f"image tokens lie on a grid {grid}; one frame of a known grid can be shown")
            for depth in depths:
                colours = main_directions(taps.taken.tokens[depth].cpu(), grid[1:])
                found[depth, t] = resize(colours, (side, side), mode="nearest")
    finally:
        taps.remove()
    return found


def feature_sheet(pictures: dict[Place, Tensor]) -> Image.Image:
    """One sheet of what `feature_pictures` gave: a row for each block and time, a column for each sample."""
    shown, labels = [], []
    for (depth, t), some in pictures.items():
        shown += to_images(some)
        labels += [f"block {depth}, t {t:g}"] * len(some)
    return sheet(shown, labels, columns=len(next(iter(pictures.values()))), scale=1)


def probe_map(
    model: nn.Module,
    seen: Callable[[], Iterable[Batch]],
    unseen: Callable[[], Iterable[Batch]],
    classes: tuple[Tensor, Tensor],
    groups: Tensor,
    depths: Sequence[int],
    times: Sequence[float],
) -> dict[Place, float]:
    """Share of unseen samples whose class a linear probe names, for each block and time.

    Args:
        model: a denoiser, in evaluation mode.
        seen, unseen: give batches of training and of other samples.
        classes: of both, (S,) and (U,) long.
        groups: what near duplicates among the training samples share (S,).
        depths: blocks, from 1.
        times: in [0, 1].
    """
    found: dict[Place, float] = {}
    for t in times:
        one, other = (hidden_states(model, give(), t, depths) for give in (seen, unseen))
        for depth in depths:
            found[depth, t] = linear_probe(one[depth], classes[0], groups, other[depth], classes[1])
    return found
