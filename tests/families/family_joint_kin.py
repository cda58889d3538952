"""Pictures and text together, in later models: Flux3, Krea 2, Qwen-Image 2.1, Ideogram 4, GLM, ERNIE, Nucleus."""

import torch
from diffusers import (
    ErnieImageTransformer2DModel,
    Flux3Transformer2DModel,
    GlmImageTransformer2DModel,
    Ideogram4Transformer2DModel,
    Krea2Transformer2DModel,
    NucleusMoEImageTransformer2DModel,
    QwenImage21Transformer2DModel,
)
from family import TEXT, Family, draw
from family_flux import positions
from family_pictures import pictures  # fmt: skip

IMAGE, LANGUAGE = 2, 3
"""Marks of Ideogram 4 for image and text tokens."""


def packed(seed, batch, grid, channels=4):
    return {
        "hidden_states": draw(batch, grid[0] * grid[1], channels, seed=seed),
        "encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 1), "timestep": torch.ones(batch),
    }  # fmt: skip


def flux3(seed, batch, grid):
    reference = positions((2, 3), 4)
    reference[:, 0] = 10
    return {
        **packed(seed, batch, grid), "img_ids": positions(grid, 4), "txt_ids": torch.zeros(TEXT, 4),
        "image_cond_hidden_states": draw(batch, 6, 4, seed=seed + 2), "image_cond_ids": reference,
    }  # fmt: skip


def krea2(seed, batch, grid):
    ids = torch.cat([torch.zeros(TEXT, 3), positions(grid)])
    texts = {"encoder_hidden_states": draw(batch, TEXT, 3, 16, seed=seed + 1)}
    return {**packed(seed, batch, grid), **texts, "position_ids": ids}


def qwen21(seed, batch, grid):
    slots = torch.tensor([[False] * TEXT + [True] * (grid[0] * grid[1] // 4)])
    return {**packed(seed, batch, grid), "img_shapes": [[(1, *grid)]] * batch, "img_mask": slots.expand(batch, -1)}


def ideogram4(seed, batch, grid):
    count = grid[0] * grid[1]
    marks = torch.tensor([LANGUAGE] * TEXT + [IMAGE] * count).expand(batch, -1)
    ids = torch.cat([torch.arange(TEXT)[:, None].expand(-1, 3), positions(grid).long() + 100])
    return {
        "hidden_states": draw(batch, TEXT + count, 4, seed=seed), "timestep": torch.ones(batch),
        "encoder_hidden_states": draw(batch, TEXT + count, 16, seed=seed + 1), "indicator": marks,
        "position_ids": ids.expand(batch, -1, -1), "segment_ids": torch.ones_like(marks),
    }  # fmt: skip


def glm(seed, batch, grid):
    return {
        **pictures(seed, batch, grid), "encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 1),
        "prior_token_id": torch.arange(grid[0] * grid[1]).expand(batch, -1) % 8,
        "prior_token_drop": torch.zeros(batch, dtype=torch.bool), "target_size": torch.full((batch, 2), 64.0),
        "crop_coords": torch.zeros(batch, 2),
    }  # fmt: skip


def ernie(seed, batch, grid):
    return {**pictures(seed, batch, grid), "text_bth": draw(batch, TEXT, 16, seed=seed + 1),
            "text_lens": torch.full((batch,), 3)}  # fmt: skip


def nucleus(seed, batch, grid):
    return {**packed(seed, batch, grid, 16), "img_shapes": [(1, *grid)] * batch}


HEADS = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 2}
FAMILIES = {
    "flux3": Family(
        lambda: Flux3Transformer2DModel(
            **HEADS, in_channels=4, cond_in_channels=4, num_single_layers=2, joint_attention_dim=16,
            timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
        ),
        flux3,
        scale=1,
        is_kin=True,
    ),
    "krea2": Family(
        lambda: Krea2Transformer2DModel(
            **HEADS, in_channels=4, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=16,
            text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1,
            text_intermediate_size=24, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
        ),
        krea2,
        scale=1,
        is_kin=True,
    ),
    "qwen-image-21": Family(
        lambda: QwenImage21Transformer2DModel(
            **HEADS, in_channels=4, out_channels=4, context_in_dim=16, axes_dims_rope=(8, 4, 4)
        ),
        qwen21,
        scale=1,
        is_kin=True,
    ),
    "ideogram4": Family(
        lambda: Ideogram4Transformer2DModel(
            **HEADS, in_channels=4, intermediate_size=32, adaln_dim=16, llm_features_dim=16, rope_theta=100,
            mrope_section=(4, 2, 2),
        ),
        ideogram4,
        scale=1,
        is_kin=True,
    ),
    "glm-image": Family(
        lambda: GlmImageTransformer2DModel(
            **HEADS, in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
            prior_vq_quantizer_codebook_size=8,
        ),
        glm,
        is_kin=True,
    ),
    "ernie-image": Family(
        lambda: ErnieImageTransformer2DModel(
            hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=4, out_channels=4,
            patch_size=2, text_in_dim=16, rope_axes_dim=(8, 4, 4),
        ),
        ernie,
    ),
    "nucleus-moe": Family(
        lambda: NucleusMoEImageTransformer2DModel(
            **HEADS, in_channels=16, out_channels=4, joint_attention_dim=16, axes_dims_rope=(8, 4, 4), num_experts=3,
            moe_intermediate_dim=16, capacity_factors=2.0, mlp_ratio=8.0, dense_moe_strategy="leave_first_block_dense",
        ),
        nucleus,
        scale=1,
        is_kin=True,
    ),
}  # fmt: skip
