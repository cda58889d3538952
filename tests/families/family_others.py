"""Pictures and sound in further layouts: Lumina-Next, Stable Audio, JoyImage, MiniMax, the prior, plain 2-D blocks."""

import torch
from diffusers import (
    HiDreamImageTransformer2DModel,
    JoyImageEditTransformer3DModel,
    LuminaNextDiT2DModel,
    PriorTransformer,
    StableAudioDiTModel,
    Transformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from family import TEXT, Family, draw
from family_pictures import pictures, texts  # fmt: skip


def lumina_next(seed, batch, grid):
    rotary = get_2d_rotary_pos_embed_lumina(8, 384, 384)
    return {
        **pictures(seed, batch, grid), **texts(seed, batch), "timestep": torch.full((batch,), 0.9),
        "encoder_mask": torch.ones(batch, TEXT), "image_rotary_emb": rotary, "cross_attention_kwargs": {},
    }  # fmt: skip


def stable_audio(seed, batch, grid):
    length = grid[0] * grid[1]
    angles = draw(length + 1, 4, seed=9)
    return {
        "hidden_states": draw(batch, 4, length, seed=seed), "timestep": torch.full((batch,), 0.9),
        "encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 1),
        "global_hidden_states": draw(batch, 1, 8, seed=seed + 2), "rotary_embedding": (angles.cos(), angles.sin()),
    }  # fmt: skip


def prior(seed, batch, grid):
    return {
        "hidden_states": draw(batch, 8, seed=seed), "timestep": torch.full((batch,), 900.0),
        "proj_embedding": draw(batch, 8, seed=seed + 1), "encoder_hidden_states": draw(batch, 7, 8, seed=seed + 2),
    }  # fmt: skip


def plain(seed, batch, grid):
    size = {"hidden_states": draw(batch, 4, 2 * grid[0], 2 * grid[1], seed=seed)}
    return {**size, **texts(seed, batch), "timestep": torch.full((batch,), 900)}


def joyimage(seed, batch, grid):
    clip = draw(batch, 4, 1, grid[0] * 2, grid[1] * 2, seed=seed)
    return {"hidden_states": clip, "timestep": torch.full((batch,), 900.0), **texts(seed, batch)}


def hidream(seed, batch, grid):
    return {
        "hidden_states": draw(batch, 4, grid[0] * 2, grid[1] * 2, seed=seed), "timesteps": torch.full((batch,), 900.0),
        "encoder_hidden_states_t5": draw(batch, TEXT, 8, seed=seed + 1),
        "encoder_hidden_states_llama3": draw(4, batch, TEXT, 16, seed=seed + 2),
        "pooled_embeds": draw(batch, 8, seed=seed + 3),
    }  # fmt: skip


FAMILIES = {
    "lumina-next": Family(
        lambda: LuminaNextDiT2DModel(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3,
            num_kv_heads=1, multiple_of=16, cross_attention_dim=16,
        ),
        lumina_next,
        scale=1,
        is_kin=True,
    ),
    "stable-audio": Family(
        lambda: StableAudioDiTModel(
            sample_size=32, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=8, time_proj_dim=8,
            global_states_input_dim=8, cross_attention_input_dim=16,
        ),
        stable_audio,
        scale=1,
    ),
    "prior": Family(
        lambda: PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=8, num_embeddings=7,
            additional_embeddings=4,
        ),
        prior,
        is_kin=True,
    ),
    "transformer-2d": Family(
        lambda: Transformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
            cross_attention_dim=16, sample_size=16, patch_size=2, norm_type="ada_norm_single",
            norm_elementwise_affine=False, caption_channels=16, use_additional_conditions=False,
        ),
        lambda seed, batch, grid: {
            **plain(seed, batch, grid), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        is_kin=True,
    ),
    "joyimage": Family(
        lambda: JoyImageEditTransformer3DModel(
            patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2,
            rope_dim_list=[4, 6, 6],
        ),
        joyimage,
        is_kin=True,
    ),
    "hidream": Family(
        lambda: HiDreamImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, caption_channels=[8, 16], text_emb_dim=8, num_routed_experts=2,
            num_activated_experts=1, axes_dims_rope=(8, 4, 4), max_resolution=(16, 16), llama_layers=[0, 1, 2, 3],
            force_inference_output=True,
        ),
        hidream,
        time="timesteps",
        is_kin=True,
    ),
}  # fmt: skip
