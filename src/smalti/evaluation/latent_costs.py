"""What one picture costs at the paper's sizes, counted on shapes alone: denoisers of latents, and decoders of them.

Source: RAE (arXiv 2510.11690), section 5 (a head in place of a wide transformer) and section 3.2 (decoders).
"""

from typing import Any

import torch
from diffusers import AutoencoderKL

from smalti.backbones.dit_dh import SHAPES, DiTDH
from smalti.backbones.lightning_dit import LightningDiT
from smalti.core.protocols import Cond
from smalti.evaluation.flops import count_flops
from smalti.nn.vit_decoder import SHAPES as DECODERS
from smalti.nn.vit_decoder import ViTDecoder

LATENTS = (768, 16, 16)
LABELS = 1000


def denoisers() -> dict[str, Any]:
    """DiT^DH-XL, the same deep part without a head, and one as wide as the head throughout; on the current device."""
    shared: Any = {"in_channels": LATENTS[0], "patch_size": 1, "num_labels": LABELS}
    return {
        "head": DiTDH(**shared, **SHAPES["xl"]),
        "DiT-XL": LightningDiT(**shared, depth=28, heads=16, head_dim=72, is_fourier=True),
        "wide": LightningDiT(**shared, depth=28, heads=16, head_dim=128, is_fourier=True),
    }


def denoiser_gflops() -> dict[str, float]:
    """GFLOPs of one evaluation on 256 tokens of 768 channels, by the names of `denoisers`."""
    with torch.device("meta"), torch.no_grad():
        x, t, cond = torch.empty(1, *LATENTS), torch.empty(1), Cond(label=torch.zeros(1, dtype=torch.long))
        return {
            name: count_flops(lambda model=model: model(x, t, cond)).total / 1e9 for name, model in denoisers().items()
        }


def decoder_gflops() -> dict[str, float]:
    """GFLOPs of one picture of 256 px: the ViT-XL decoder of such latents, and Stable Diffusion's convolutional one."""
    shape: Any = {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
    }  # fmt: skip
    with torch.device("meta"), torch.no_grad():
        vit, conv = ViTDecoder(LATENTS[0], 16, base_size=16, **DECODERS["xl"]), AutoencoderKL(**shape)
        latents: Any = torch.empty(1, 4, 32, 32)
        calls = {"ViT-XL": lambda: vit(torch.empty(1, *LATENTS)), "SD-VAE": lambda: conv.decode(latents)}
        return {name: count_flops(call).total / 1e9 for name, call in calls.items()}
