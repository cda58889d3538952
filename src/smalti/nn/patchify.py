"""Pictures to token sequences and back; inside a token the order is (channel, row, column), as FLUX.1 packs it."""

from einops import rearrange
from torch import Tensor

from smalti.core.errors import UserError


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cuts latents into tokens.

    Args:
        x: (B, C, H, W).
        patch: side P of a patch; divides H and W.

    Returns:
        (B, H/P * W/P, C*P*P), rows first.

    Raises:
        UserError: H or W is no multiple of P.
    """
    height, width = x.shape[-2:]
    if height % patch or width % patch:
        raise UserError(f"size {height} x {width} does not fit patches of {patch}; use multiples of {patch}")
    if patch == 1:
        return x.flatten(2).transpose(1, 2)
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Inverse of `patchify`: tokens (B, N, C*P*P) -> (B, C, H, W) with H and W = `height` and `width`."""
    if patch == 1:
        return tokens.transpose(1, 2).unflatten(2, (height, width))
    rows = height // patch
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=patch, q=patch)
