"""Transformers of unusual inputs: gists of the text, tokens of a language model, parts of a U-Net, molecules."""

import torch
from diffusers import (
    BriaFibo2Transformer2DModel,
    Cosmos3OmniTransformer,
    DreamLiteTransformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    OmniGenTransformer2DModel,
    RFD4ProteinaTransformer,
    TransformerTemporalModel,
)
from family import TEXT, Family, draw
from family_pictures import pictures, texts
from family_video import FRAMES  # fmt: skip


def fibo2(seed, batch, grid):
    bundles = draw(batch, 2, TEXT, 16, seed=seed + 1)  # one for the gist, one for the block that reads the text
    return {
        **pictures(seed, batch, grid), "timestep": torch.ones(batch), "encoder_hidden_states": bundles,
        "context_latents": [draw(batch, 4, 4, 6, seed=seed + 2)],
    }  # fmt: skip


def cosmos3(seed, batch, grid):
    """One packed sequence without a batch axis: text, then all clips."""
    count = FRAMES * grid[0] * grid[1]
    total = batch * count
    axes = torch.meshgrid(*(torch.arange(n) for n in (FRAMES, *grid)), indexing="ij")
    place = torch.stack([one.flatten() for one in axes]).repeat(1, batch) + TEXT
    seen = torch.arange(TEXT, TEXT + total)
    return {
        "input_ids": torch.arange(TEXT) + seed, "text_indexes": torch.arange(TEXT), "und_len": TEXT,
        "position_ids": torch.cat([torch.arange(TEXT).expand(3, -1), place], 1), "sequence_length": TEXT + total,
        "vision_tokens": [draw(1, 4, FRAMES, 2 * grid[0], 2 * grid[1], seed=seed + i) for i in range(batch)],
        "vision_token_shapes": [(FRAMES, *grid)] * batch, "vision_sequence_indexes": seen,
        "vision_mse_loss_indexes": seen, "vision_timesteps": torch.full((total,), 900.0),
        "vision_noisy_frame_indexes": [torch.arange(FRAMES)] * batch,
    }  # fmt: skip


def dreamlite(seed, batch, grid):
    return {**pictures(seed, batch, grid, 1), **texts(seed, batch), "timestep": torch.tensor(900)}


def joyimage_plus(seed, batch, grid):
    return {
        "hidden_states": draw(batch, grid[0] * grid[1], 4, 1, 2, 2, seed=seed), **texts(seed, batch),
        "timestep": torch.full((batch,), 900.0), "shape_list": [[(1, *grid)]] * batch,
    }  # fmt: skip


def omnigen(seed, batch, grid):
    total = TEXT + 1 + grid[0] * grid[1]
    return {
        **pictures(seed, batch, grid), "input_ids": torch.arange(batch * TEXT).reshape(batch, TEXT) % 11 + seed,
        "timestep": torch.ones(batch), "input_img_latents": [], "input_image_sizes": {},
        "attention_mask": torch.ones(batch, total, total), "position_ids": torch.arange(total).expand(batch, -1),
    }  # fmt: skip


def proteina(seed, batch, grid):
    count = grid[0] * grid[1]
    known = torch.zeros(batch, count, dtype=torch.bool)
    return {
        "bb_ca": draw(batch, count, 3, seed=seed), "local_latents": draw(batch, count, 8, seed=seed + 1),
        "bb_ca_time": torch.ones(batch), "local_latents_time": torch.ones(batch),
        "padding_mask": torch.ones(batch, count, dtype=torch.bool),
        "token_type": torch.ones(batch, count, dtype=torch.long),
        "conditioning": {"is_in_context_conditioning": known, "supports_local_latent": ~known},
    }  # fmt: skip


def temporal(seed, batch, grid):
    return {
        "hidden_states": draw(batch * FRAMES, 4, *grid, seed=seed), "timestep": torch.full((batch,), 900),
        "num_frames": FRAMES,
    }  # fmt: skip


FAMILIES = {
    "bria-fibo2": Family(
        lambda: BriaFibo2Transformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=16, injection_layer_ids=(1,),
            perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4, gist_min_text_len=2,
            gist_max_text_len=8, axes_dims=(8, 4, 4), axes_lens=(32, 32, 32),
        ),
        fibo2,
        scale=1,
        is_kin=True,
    ),
    "cosmos3-omni": Family(
        lambda: Cosmos3OmniTransformer(
            head_dim=16, hidden_size=32, intermediate_size=32, latent_channel=4, num_attention_heads=2,
            num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=16, vocab_size=64, rope_axes_dim=(4, 2, 2),
        ),
        cosmos3,
        sample="vision_tokens",
        time="vision_timesteps",
        is_kin=True,
    ),
    "dreamlite": Family(
        lambda: DreamLiteTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, norm_num_groups=2,
            cross_attention_dim=16, norm_type="ada_norm", num_embeds_ada_norm=1000,
        ),
        dreamlite,
        is_kin=True,
    ),
    "joyimage-plus": Family(
        lambda: JoyImageEditPlusTransformer3DModel(
            patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2,
            rope_dim_list=[4, 6, 6],
        ),
        joyimage_plus,
        is_kin=True,
    ),
    "omnigen": Family(
        lambda: OmniGenTransformer2DModel(
            in_channels=4, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
            num_layers=2, pad_token_id=0, vocab_size=64, max_position_embeddings=64,
            original_max_position_embeddings=64, rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            pos_embed_max_size=16, time_step_dim=16,
        ),
        omnigen,
        scale=1,
        is_kin=True,
    ),
    "rfd4-proteina": Family(
        lambda: RFD4ProteinaTransformer(
            nlayers=2, token_dim=16, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=8, token_type_emb_dim=4,
            t_emb_dim=16, tri_mult_c=8, num_sequence_classes=5,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"), feats_pair_repr=("xt_bb_ca_pair_dists",),
            feats_pair_cond=("time_emb_bb_ca", "time_emb_local_latents"),
        ),
        proteina,
        sample="bb_ca",
        time="bb_ca_time",
        scale=1,
        beside=("local_latents",),
        clocks=("local_latents_time",),
        is_kin=True,
    ),
    "temporal": Family(
        lambda: TransformerTemporalModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, norm_num_groups=2
        ),
        temporal,
        uses_time=False,
        is_kin=True,
    ),
}  # fmt: skip
