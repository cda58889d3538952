"""What sparse attention among image tokens asks of an attention: one run of image tokens on a grid, and a mask of keys.

Methods at the `core` seam call these: they act on attention of a sequence to itself, leave cross-attention to text
alone, and keep the model's mask of padded keys.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from smalti.core.errors import Refusal
from smalti.core.protocols import TokenLayout
from smalti.ops.token_order import Grid


def image_grid(queries: TokenLayout, keys: TokenLayout) -> Grid | None:
    """(F, H, W) of the image tokens if a sequence attends to itself and holds one run of them; else None."""
    images = [one for one in queries.segments if one.kind == "image"]
    return images[0].grid if queries.segments == keys.segments and len(images) == 1 else None


def check_image_grid(model: str, cores: Mapping[str, tuple[TokenLayout, TokenLayout]], method: str) -> None:
    """Raises `Refusal` if no attention of a model has image tokens on a known grid.

    Args:
        model: class name.
        cores: layouts of queries and keys, by stack and name.
        method: class name of the method, for the message.
    """
    if all(image_grid(queries, keys) is None for queries, keys in cores.values()):
        raise Refusal(
            f"{model} has no softmax attention among image tokens on a known grid, so {method} has nothing to thin out "
            "(linear attention has no score matrix; cross-attention to text is left alone)"
        )


def keys_alone(mask: Tensor | None, site: str) -> Tensor | None:
    """A mask as one of keys (B, 1, 1, L); models write it out for every query, too.

    Raises:
        Refusal: the mask differs between queries, so it is a pattern of the model's own.
    """
    if mask is None or (mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1):
        return mask
    mask = mask if mask.ndim == 4 else mask[(None,) * (4 - mask.ndim)]
    rows = mask[:, :1, -1:]
    # Rows of padded queries differ in some models; nobody reads what those queries give.
    is_same = (mask == rows).all(-1)
    dead = ~(mask.any(-1) if mask.dtype == torch.bool else (mask > torch.finfo(mask.dtype).min).any(-1))
    if not bool((is_same | dead).all()):
        raise Refusal(f"{site} has an attention mask of its own that differs between queries; it cannot be kept")
    return rows
