"""Pictures and clips to tokens and back; in a token the order is (channel, row, column), as FLUX.1 packs it."""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

from smalti.core.errors import UserError


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cuts latents into tokens.

    Args:
        x: pictures (B, C, H, W) or clips (B, C, F, H, W).
        patch: side P of a patch; divides H and W.

    Returns:
        (B, F * H/P * W/P, C*P*P), frame by frame, rows first.

    Raises:
        UserError: H or W is no multiple of P.
    """
    height, width = x.shape[-2:]
    if height % patch or width % patch:
        raise UserError(f"size {height} x {width} does not fit patches of {patch}; use multiples of {patch}")
    if patch == 1:
        return x.flatten(2).transpose(1, 2)
    if x.ndim == 4:
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
    return rearrange(x, "b c f (h p) (w q) -> b (f h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: Tensor, size: Sequence[int], patch: int) -> Tensor:
    """Inverse of `patchify`: tokens (B, N, C*P*P) -> (B, C, *size), with size (H, W) or (F, H, W)."""
    if patch == 1:
        return tokens.transpose(1, 2).unflatten(2, size)
    rows = size[-2] // patch
    if len(size) == 2:
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=patch, q=patch)
    return rearrange(tokens, "b (f h w) (c p q) -> b c f (h p) (w q)", f=size[0], h=rows, p=patch, q=patch)
