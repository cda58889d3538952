"""Relatives of Wan, HunyuanVideo and CogVideoX."""

import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    ConsisIDTransformer3DModel,
    CosmosTransformer3DModel,
    EasyAnimateTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    SanaVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15ByT5TextProjection
from family import TEXT, Family, draw
from family_video import FRAMES, clips, cogvideo, mask  # fmt: skip

WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
       "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True}  # fmt: skip


def vace(seed, batch, grid):
    control = draw(batch, 8, FRAMES, grid[0] * 2, grid[1] * 2, seed=seed + 5)
    return {**clips(seed, batch, grid), "control_hidden_states": control}


def hunyuan15(seed, batch, grid):
    return {
        **clips(seed, batch, grid, 1), "encoder_attention_mask": torch.ones(batch, TEXT),
        "encoder_hidden_states_2": draw(batch, 4, 12, seed=seed + 3), "encoder_attention_mask_2": torch.ones(batch, 4),
        "image_embeds": draw(batch, 3, 8, seed=seed + 4),
    }  # fmt: skip


def build_hunyuan15():
    model = HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=12,
        image_embed_dim=8, rope_axes_dim=(4, 6, 6), target_size=16,
    )  # fmt: skip
    model.context_embedder_2 = HunyuanVideo15ByT5TextProjection(12, 16, 32)  # 2,048 wide whatever one asks for
    return model


def framepack(seed, batch, grid):
    return {
        **clips(seed, batch, grid), "encoder_attention_mask": mask(batch), "guidance": torch.full((batch,), 6000.0),
        "pooled_projections": draw(batch, 8, seed=seed + 2), "image_embeds": draw(batch, 3, 8, seed=seed + 4),
        "indices_latents": torch.arange(FRAMES) + 7,
        **{f"latents_{name}": draw(batch, 4, count, grid[0] * 2, grid[1] * 2, seed=seed + 5 + count)
           for name, count in (("clean", 1), ("history_2x", 2), ("history_4x", 4))},
        "indices_latents_clean": torch.tensor([6]), "indices_latents_history_2x": torch.tensor([4, 5]),
        "indices_latents_history_4x": torch.arange(4),
    }  # fmt: skip


def cosmos(seed, batch, grid):
    return {**clips(seed, batch, grid), "timestep": torch.full((batch,), 0.9)}


def sana_video(seed, batch, grid):
    return {**clips(seed, batch, grid), "encoder_attention_mask": mask(batch)}


FAMILIES = {
    "skyreels-v2": Family(lambda: SkyReelsV2Transformer3DModel(**WAN), clips, is_kin=True),
    "chronoedit": Family(lambda: ChronoEditTransformer3DModel(**WAN), clips, is_kin=True),
    "wan-vace": Family(
        lambda: WanVACETransformer3DModel(**WAN, vace_layers=[0, 1], vace_in_channels=8), vace, is_kin=True
    ),
    "hunyuan-video-15": Family(build_hunyuan15, hunyuan15, is_kin=True),
    "hunyuan-video-framepack": Family(
        lambda: HunyuanVideoFramepackTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
            pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), has_image_proj=True, image_proj_dim=8,
            has_clean_x_embedder=True,
        ),
        framepack,
        is_kin=True,
    ),
    "cosmos": Family(
        lambda: CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
            extra_pos_embed_type="learnable", concat_padding_mask=False,
        ),
        cosmos,
        scale=1,
        is_kin=True,
    ),
    "easyanimate": Family(
        lambda: EasyAnimateTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
            time_embed_dim=8, text_embed_dim=16, num_layers=2, mmdit_layers=2, sample_width=12, sample_height=8,
        ),
        clips,
        is_kin=True,
    ),
    "sana-video": Family(
        lambda: SanaVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        ),
        sana_video,
        is_kin=True,
    ),
    "consisid": Family(
        lambda: ConsisIDTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4,
            text_embed_dim=16, num_layers=2, sample_width=12, sample_height=8, sample_frames=9, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=TEXT, use_rotary_positional_embeddings=True,
        ),
        cogvideo,
        is_kin=True,
    ),
}  # fmt: skip
