"""Shapes of published models with random weights: for seconds and memory on a data-centre GPU, never for quality."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from smalti.backbones.dit import DiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.protocols import Cond

SUSTAINED = {"h200": 790.0, "h100": 790.0}
"""TFLOP/s that a card sustains on an 8192^3 bf16 product."""


def flux_dev(device: torch.device, pixels: int, steps: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model and an Euler loop of so many steps on (pixels / 16)^2 image and 512 text tokens.

    19 double and 38 single blocks, width 3072, 12 G parameters in bf16, blocks compiled.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = MMDiT(
                in_channels=64, num_double=19, num_single=38, heads=24, head_dim=128, text_dim=4096, pooled_dim=768,
                axes_dims_rope=(16, 56, 56),
            ).eval()  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    cond = Cond(text=torch.randn(1, 512, 4096, device=device), pooled=torch.randn(1, 768, device=device))
    noise = torch.randn(1, 64, pixels // 16, pixels // 16, device=device)
    model.compile_repeated_blocks()

    @torch.no_grad()
    def run() -> Tensor:
        x = noise
        for step in range(steps):
            t = torch.full((1,), 1 - step / steps, device=device)
            x = x - model(x, t, cond).float() / steps
        return x

    return model, run


def sit_xl(device: torch.device) -> DiT:
    """SiT-XL/2 for latents of 4 x 32 x 32: 28 blocks, width 1152, 0.7 G parameters in float32, blocks compiled."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DiT(in_channels=4, patch_size=2, depth=28, heads=16, head_dim=72, num_labels=1000, base_size=16)
    model.compile_repeated_blocks()
    return model
