"""Attention within a circle on several devices: each has some rows of the image and asks its neighbours for a halo.

A query reaches `ceil(radius) - 1` rows up and down, so that a device needs keys and values of so many rows beyond its
own, whatever the size of the picture. Cells of pooled keys are few: all devices get all. Text stands on every device;
its queries attend to the whole image, so each device attends to its own rows, and the parts become one: exactly, by
their log-sum-exp, or by their mean, as the paper does.

Here the devices are simulated one after the other in one process.

Source: CLEAR (arXiv 2412.16112), section 3.3, multi-GPU parallel inference. The exact merge is ours.
Letters: M text tokens, N image tokens, L = M + N.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.ops.attention import attention_with_lse
from smalti.ops.circle_mask import is_near, pool_tokens
from smalti.ops.lse_merge import merge


class Split(NamedTuple):
    """The result (B, h, L, d), and how many rows of keys and values each device got from others."""

    out: Tensor
    received: tuple[int, ...]


def split_circle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    radius: float,
    devices: int,
    before: int = 0,
    pool_weight: Tensor | None = None,
    text: Literal["merge", "mean"] = "merge",
) -> Split:
    """Attention of a picture whose rows lie on several devices.

    Args:
        q, k, v: (B, h, L, d), text first.
        grid: (H, W) of the image tokens.
        radius: of the circle.
        devices: among which the rows are dealt out, in equal runs.
        before: M.
        pool_weight: (s, s) of pooled cells; None = none.
        text: how the parts of text queries become one: merge (exact) or mean (the paper's).

    Raises:
        UserError: the rows cannot be dealt out, or a device's rows are no whole number of cells.
    """
    rows, columns = grid
    share, cell = rows // max(devices, 1), 1 if pool_weight is None else len(pool_weight)
    if devices < 1 or rows % devices or share % cell:
        raise UserError(f"got {rows} rows for {devices} devices and cells of {cell}; each takes as many whole cells")
    halo = math.ceil(radius) - 1
    words, image = (one.split([before, rows * columns], dim=2) for one in (q, k, v)), []
    (q_text, q_image), (k_text, k_image), (v_text, v_image) = words
    cells = [k_image[:, :, :0], v_image[:, :, :0]]
    if pool_weight is not None:
        cells = [_pooled_by_parts(one, grid, devices, pool_weight) for one in (k_image, v_image)]
    parts, received = [], []
    for device in range(devices):
        own = range(device * share, (device + 1) * share)
        near = range(max(0, own.start - halo), min(rows, own.stop + halo))
        received.append(len(near) - len(own))
        mask = _near_mask(own, near, columns, radius)
        mask = F.pad(mask, (before, cells[0].shape[2]), value=True)
        keys = torch.cat([k_text, _rows(k_image, near, columns), cells[0]], dim=2)
        values = torch.cat([v_text, _rows(v_image, near, columns), cells[1]], dim=2)
        image.append(F.scaled_dot_product_attention(_rows(q_image, own, columns), keys, values, attn_mask=mask))
        if before:
            seen = before if device == 0 or text == "mean" else 0  # of the text, which counts once
            keys = torch.cat([k_text[:, :, :seen], _rows(k_image, own, columns)], dim=2)
            values = torch.cat([v_text[:, :, :seen], _rows(v_image, own, columns)], dim=2)
            parts.append(attention_with_lse(q_text, keys, values))
    out = torch.cat(image, dim=2)
    if before:
        of_text = merge(parts).out if text == "merge" else torch.stack([part.out for part in parts]).mean(0)
        out = torch.cat([of_text, out], dim=2)
    return Split(out, tuple(received))


def _rows(x: Tensor, rows: range, columns: int) -> Tensor:
    return x[:, :, rows.start * columns : rows.stop * columns]


def _near_mask(own: range, near: range, columns: int, radius: float) -> Tensor:
    """Which keys of the rows `near` each query of the rows `own` sees."""
    down = torch.tensor(own)[:, None] - torch.tensor(near)  # (own, near)
    right = torch.arange(columns)[:, None] - torch.arange(columns)
    mask = is_near(down[:, None, :, None], right[None, :, None, :], radius)
    return mask.reshape(len(own) * columns, len(near) * columns)


def _pooled_by_parts(x: Tensor, grid: tuple[int, int], devices: int, weight: Tensor) -> Tensor:
    """Every device pools its own rows; the cells are then sent to all."""
    rows, columns = grid
    parts = x.chunk(devices, dim=2)
    return torch.cat([pool_tokens(one, (1, rows // devices, columns), weight) for one in parts], dim=2)
