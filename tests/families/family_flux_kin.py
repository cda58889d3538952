"""Relatives of Flux: packed latents, position ids, double and single blocks."""

import torch
from diffusers import (
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    HunyuanImageTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
    PRXTransformer2DModel,
)
from family import TEXT, Family, draw
from family_flux import SHARED, flux_inputs  # fmt: skip


def without_pooled(seed, batch, grid):
    arguments = flux_inputs(seed, batch, grid)
    del arguments["pooled_projections"]
    return arguments


def bria_fibo(seed, batch, grid):
    layers = [draw(batch, TEXT, 16, seed=seed + 10 + i) for i in range(4)]
    return {**without_pooled(seed, batch, grid), "text_encoder_layers": layers}


def masked(seed, batch, grid, size=2):
    keep = torch.ones(batch, TEXT)
    keep[:, 3:] = 0
    return {
        "hidden_states": draw(batch, 4, grid[0] * size, grid[1] * size, seed=seed),
        "encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 1), "timestep": torch.ones(batch),
        "encoder_attention_mask": keep,
    }  # fmt: skip


def prx(seed, batch, grid):
    arguments = masked(seed, batch, grid)
    keep = arguments.pop("encoder_attention_mask").bool()
    return {**arguments, "attention_mask": keep}


FAMILIES = {
    "bria": Family(lambda: BriaTransformer2DModel(**SHARED, axes_dims_rope=[4, 4, 8]), without_pooled, is_kin=True),
    "bria-fibo": Family(
        lambda: BriaFiboTransformer2DModel(**SHARED, axes_dims_rope=[4, 4, 8], text_encoder_dim=16), bria_fibo,
        is_kin=True,
    ),
    "longcat-image": Family(
        lambda: LongCatImageTransformer2DModel(**SHARED, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8]),
        without_pooled,
        scale=1,
        is_kin=True,
    ),
    "ovis-image": Family(
        lambda: OvisImageTransformer2DModel(**SHARED, out_channels=4, axes_dims_rope=(4, 4, 8)),
        without_pooled,
        scale=1,
        is_kin=True,
    ),
    "hunyuan-image": Family(
        lambda: HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=16, rope_axes_dim=(4, 4),
        ),
        lambda seed, batch, grid: masked(seed, batch, grid, 1),
        is_kin=True,
    ),
    "prx": Family(
        lambda: PRXTransformer2DModel(
            in_channels=4, patch_size=2, context_in_dim=16, hidden_size=16, num_heads=2, depth=2, axes_dim=[4, 4],
        ),
        prx,
        scale=1,
    ),
}  # fmt: skip
