"""Shapes of published models with random weights: for seconds and memory on a data-centre GPU, never for quality."""

from collections.abc import Callable

import torch
from diffusers import SD3Transformer2DModel
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


def sd3_medium(device: torch.device, pixels: int, steps: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Stable Diffusion 3 medium's shape and an Euler loop with guidance, both branches in one batch.

    24 joint blocks, width 1536, 2 G parameters in bf16, blocks compiled; (pixels / 16)^2 image and 333 text tokens.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = SD3Transformer2DModel(
                sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
                num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
                pooled_projection_dim=2048, pos_embed_max_size=192,
            ).eval()  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    given = {"device": device, "dtype": torch.bfloat16}
    text, pooled = torch.randn(2, 333, 4096, **given), torch.randn(2, 2048, **given)
    noise = torch.randn(1, 16, pixels // 8, pixels // 8, device=device)
    for block in model.transformer_blocks:
        block.compile()

    @torch.no_grad()
    def run() -> Tensor:
        x = noise
        for step in range(steps):
            t = torch.full((2,), 1000 * (1 - step / steps), device=device)
            both = torch.cat([x, x]).to(torch.bfloat16)
            without, given = model(both, text, pooled, t, return_dict=False)[0].float().chunk(2)
            x = x - (without + 7 * (given - without)) / steps
        return x

    return model, run
