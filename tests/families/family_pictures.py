"""Latents (B, C, H, W) with text that is joined or crossed, or classes."""

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from family import TEXT, Family, draw  # fmt: skip


def pictures(seed, batch, grid, patch=2):
    return {
        "hidden_states": draw(batch, 4, grid[0] * patch, grid[1] * patch, seed=seed),
        "timestep": torch.full((batch,), 900.0),
    }


def texts(seed, batch, width=16):
    return {"encoder_hidden_states": draw(batch, TEXT, width, seed=seed + 1)}


def mask(batch):
    keep = torch.ones(batch, TEXT)
    keep[:, 3:] = 0
    return keep


def sd3(seed, batch, grid):
    return {**pictures(seed, batch, grid), **texts(seed, batch), "pooled_projections": draw(batch, 8, seed=seed + 2)}


def pixart(seed, batch, grid):
    return {
        **pictures(seed, batch, grid), **texts(seed, batch), "encoder_attention_mask": mask(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def dit(seed, batch, grid):
    grid = (grid[1], grid[1])  # diffusers' DiT takes squares alone
    return {
        **pictures(seed, batch, grid),
        "timestep": torch.full((batch,), 900),
        "class_labels": torch.arange(batch) + 3,
    }


def hunyuan(seed, batch, grid):
    rotary = get_2d_rotary_pos_embed(8, ((0, 0), grid), grid, output_type="pt")
    return {
        **pictures(seed, batch, grid), **texts(seed, batch), "text_embedding_mask": mask(batch),
        "encoder_hidden_states_t5": draw(batch, 4, 16, seed=seed + 3), "text_embedding_mask_t5": torch.ones(batch, 4),
        "image_meta_size": torch.ones(batch, 6), "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": rotary,
    }  # fmt: skip


def sana(seed, batch, grid):
    return {**pictures(seed, batch, grid, 1), **texts(seed, batch), "encoder_attention_mask": mask(batch)}


def lumina(seed, batch, grid):
    return {**pictures(seed, batch, grid), **texts(seed, batch), "timestep": torch.full((batch,), 0.1),
            "encoder_attention_mask": mask(batch).bool()}  # fmt: skip


def aura(seed, batch, grid):
    return {**pictures(seed, batch, grid), **texts(seed, batch)}


def cogview(seed, batch, grid):
    size = torch.tensor([[64.0, 96.0]]).repeat(batch, 1)
    return {**pictures(seed, batch, grid), **texts(seed, batch), "original_size": size, "target_size": size,
            "crop_coords": torch.zeros(batch, 2)}  # fmt: skip


FAMILIES = {
    "sd3": Family(
        lambda: SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
            pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        sd3,
    ),
    "pixart": Family(
        lambda: PixArtTransformer2DModel(
            sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            cross_attention_dim=16, caption_channels=16, out_channels=8, norm_num_groups=1,
            use_additional_conditions=False,
        ),
        pixart,
    ),
    "dit": Family(
        lambda: DiTTransformer2DModel(
            sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            out_channels=8, num_embeds_ada_norm=10,
        ),
        dit,
    ),
    "hunyuan-dit": Family(
        lambda: HunyuanDiT2DModel(
            sample_size=16, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=4, hidden_size=16, text_len=TEXT,
            text_len_t5=4, activation_fn="gelu-approximate", learn_sigma=True,
        ),
        hunyuan,
    ),
    "sana": Family(
        lambda: SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
            sample_size=32,
        ),
        sana,
    ),
    "lumina2": Family(
        lambda: Lumina2Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
            cap_feat_dim=16,
        ),
        lumina,
        scale=1,
    ),
    "auraflow": Family(
        lambda: AuraFlowTransformer2DModel(
            sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
            attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16,
            out_channels=4, pos_embed_max_size=256,
        ),
        aura,
        scale=1,
    ),
    "cogview3plus": Family(
        lambda: CogView3PlusTransformer2DModel(
            patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
            text_embed_dim=16, time_embed_dim=8, condition_dim=2, pos_embed_max_size=16, sample_size=16,
        ),
        cogview,
        is_kin=True,
    ),
    "cogview4": Family(
        lambda: CogView4Transformer2DModel(
            patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
            text_embed_dim=16, time_embed_dim=8, condition_dim=4, rope_axes_dim=(16, 16),
        ),
        cogview,
        is_kin=True,
    ),
}  # fmt: skip
