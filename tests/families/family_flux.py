"""Packed latents with position ids: Flux and its kin."""

import torch
from diffusers import ChromaTransformer2DModel, Flux2Transformer2DModel, FluxTransformer2DModel
from family import TEXT, Family, draw


def positions(grid, axes=3):
    rows, columns = grid
    ids = torch.zeros(rows * columns, axes)
    ids[:, 1], ids[:, 2] = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    return ids


def flux_inputs(seed, batch, grid):
    return {
        "hidden_states": draw(batch, grid[0] * grid[1], 4, seed=seed),
        "encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 1),
        "pooled_projections": draw(batch, 8, seed=seed + 2),
        "timestep": torch.ones(batch),
        "img_ids": positions(grid),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def flux2_inputs(seed, batch, grid):
    arguments = flux_inputs(seed, batch, grid)
    del arguments["pooled_projections"]
    ids, text = positions(grid, 4), torch.zeros(TEXT, 4)
    text[:, 3] = torch.arange(TEXT)
    return {**arguments, "img_ids": ids[None].expand(batch, -1, -1), "txt_ids": text[None].expand(batch, -1, -1),
            "guidance": torch.full((batch,), 4.0)}  # fmt: skip


def chroma_inputs(seed, batch, grid):
    arguments = flux_inputs(seed, batch, grid)
    del arguments["pooled_projections"]
    return arguments


SHARED = {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
          "num_attention_heads": 2, "joint_attention_dim": 16}  # fmt: skip
FAMILIES = {
    "flux": Family(
        lambda: FluxTransformer2DModel(**SHARED, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8)),
        flux_inputs,
        scale=1,
    ),
    "flux2": Family(
        lambda: Flux2Transformer2DModel(**SHARED, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4)),
        flux2_inputs,
        scale=1,
    ),
    "chroma": Family(
        lambda: ChromaTransformer2DModel(
            **SHARED, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        chroma_inputs,
        scale=1,
        is_kin=True,
    ),
}  # fmt: skip
