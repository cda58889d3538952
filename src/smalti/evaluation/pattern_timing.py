"""Seconds of heads in each mode on random numbers, beside plain attention.

Shapes: B = 1, h heads, L tokens, d head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from smalti.core.seeds import generators_for, randn
from smalti.evaluation.timing import Ratio, median_seconds, paired_ratio
from smalti.ops.head_patterns import MODES, Mode, Patterns, allowed_keys, mode_attention
from smalti.ops.token_order import Grid


@torch.no_grad()
def mode_times(
    patterns: Patterns,
    grid: Grid,
    text: int,
    device: torch.device,
    heads: int = 6,
    head_dim: int = 32,
    repeats: int = 10,
) -> dict[Mode, float]:
    """Seconds of every mode over those of full attention: `costs` of a search that knows the hardware.

    Args:
        patterns: widths.
        grid: (F, H, W) of the image tokens.
        text: tokens of text before the image.
        device: where it is timed; bfloat16 on a GPU.
        heads: that share a call.
        head_dim: of each.
        repeats: timed calls, after two that are not.
    """
    q, k, v = _qkv(grid, text, heads, head_dim, device)
    seconds: dict[Mode, float] = {
        mode: median_seconds(lambda mode=mode: mode_attention(q, k, v, mode, patterns, grid, text), repeats)
        for mode in MODES
    }
    return {mode: one / seconds["full"] for mode, one in seconds.items()}


@torch.no_grad()
def mix_ratio(
    mix: Sequence[Mode], patterns: Patterns, grid: Grid, text: int, device: torch.device, head_dim: int = 128,
    repeats: int = 10,
) -> Ratio:  # fmt: skip
    """Seconds of plain attention over those of heads with mixed modes, gathered and scattered as the method does."""
    q, k, v = _qkv(grid, text, len(mix), head_dim, device)
    groups: dict[Mode, list[int]] = {}
    for head, mode in enumerate(mix):
        groups.setdefault(mode, []).append(head)

    def sparse() -> Tensor:
        out = torch.empty_like(q)
        for mode, heads in groups.items():
            out[:, heads] = mode_attention(q[:, heads], k[:, heads], v[:, heads], mode, patterns, grid, text)
        return out

    return paired_ratio(lambda: scaled_dot_product_attention(q, k, v), sparse, repeats, warmup=2)


@torch.no_grad()
def largest_error(patterns: Patterns, grid: Grid, text: int, device: torch.device) -> float:
    """Largest difference of all modes to attention under their token mask, 2 heads of 64 in float32."""
    q, k, v = (x.float() for x in _qkv(grid, text, 2, 64, device))
    tokens, errors = torch.arange(grid[0] * grid[1] * grid[2], device=device), []
    for mode in MODES:
        if mode == "skip":
            continue
        allowed = torch.ones(1, q.shape[2], q.shape[2], dtype=torch.bool, device=device)
        allowed[:, text:] = allowed_keys(tokens, mode, patterns, grid, text)
        expected = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        errors.append((mode_attention(q, k, v, mode, patterns, grid, text) - expected).abs().max().item())
    return max(errors)


def _qkv(grid: Grid, text: int, heads: int, head_dim: int, device: torch.device) -> list[Tensor]:
    """q, k and v (1, h, L, d)."""
    shape = (1, heads, text + grid[0] * grid[1] * grid[2], head_dim)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [randn(shape, generators_for([seed]), device).to(dtype) for seed in range(3)]
