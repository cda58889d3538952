"""Pipelines of diffusers around tiny random transformers; texts are given as embeddings, latents come out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from small_models import fill
from torch import Tensor, nn

SIZE = {"height": 64, "width": 96}  # 4 x 6 tokens for either


@dataclass
class SmallPipeline:
    """A pipeline and how to draw with it; `draw(steps, **further)` gives latents."""

    pipe: Any
    draw: Callable[..., Tensor]

    @property
    def model(self) -> nn.Module:
        return self.pipe.transformer


def flux_transformer(**further) -> FluxTransformer2DModel:
    return fill(
        FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
            **further,
        )
    )  # fmt: skip


def wan_transformer(kind: type = WanTransformer3DModel, **further) -> WanTransformer3DModel:
    shape = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
        "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "cross_attn_norm": True,
    }  # fmt: skip
    return fill(kind(**{**shape, **further}))


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=1, norm_num_groups=1, shift_factor=0.0,
        scaling_factor=1.0,
    ).eval()  # fmt: skip


def wan_autoencoder() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def flux_pipeline(kind: type = FluxPipeline, transformer: nn.Module | None = None, **parts) -> SmallPipeline:
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer or flux_transformer(), **parts,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def draw(steps: int = 9, **further) -> Tensor:
        texts = {"prompt_embeds": numbers(1, 5, 32), "pooled_prompt_embeds": numbers(1, 32)}
        generator = torch.Generator().manual_seed(0)
        arguments = {**texts, **SIZE, "num_inference_steps": steps, "generator": generator, "output_type": "latent"}
        return pipe(**{**arguments, **further}).images

    return SmallPipeline(pipe, draw)


def wan_pipeline(kind: type = WanPipeline, transformer: nn.Module | None = None, **parts) -> SmallPipeline:
    pipe = kind(
        tokenizer=None, text_encoder=None, vae=wan_autoencoder(), scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer or wan_transformer(), **parts,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def draw(steps: int = 9, **further) -> Tensor:
        texts = {"prompt_embeds": numbers(1, 5, 32), "negative_prompt_embeds": numbers(1, 5, 32, seed=1)}
        generator = torch.Generator().manual_seed(0)
        arguments = {**texts, **SIZE, "num_inference_steps": steps, "generator": generator, "output_type": "latent",
                     "guidance_scale": 3.0}  # fmt: skip
        if "video" not in further:
            arguments["num_frames"] = 5
        return pipe(**{**arguments, **further}).frames

    return SmallPipeline(pipe, draw)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Fixed normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100))


PIPELINES = {"flux": flux_pipeline, "wan": wan_pipeline}
