"""FLUX.1-dev's shape with random weights: for seconds and memory on a data-centre GPU, never for quality."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
