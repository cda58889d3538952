"""Latents with frames: Wan, LTX, CogVideoX, HunyuanVideo, Latte, Mochi, Allegro."""

import torch
from diffusers import (
    AllegroTransformer3DModel,
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from family import TEXT, Family, draw  # fmt: skip

FRAMES = 3


def clips(seed, batch, grid, patch=2, channels=4):
    return {
        "hidden_states": draw(batch, channels, FRAMES, grid[0] * patch, grid[1] * patch, seed=seed),
        "timestep": torch.full((batch,), 900.0),
        "encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 1),
    }


def mask(batch):
    keep = torch.ones(batch, TEXT)
    keep[:, 3:] = 0
    return keep


def ltx(seed, batch, grid):
    return {
        **clips(seed, batch, grid), "hidden_states": draw(batch, FRAMES * grid[0] * grid[1], 4, seed=seed),
        "encoder_attention_mask": mask(batch), "num_frames": FRAMES, "height": grid[0], "width": grid[1],
    }  # fmt: skip


def cogvideo(seed, batch, grid):
    arguments = clips(seed, batch, grid)
    return {**arguments, "hidden_states": arguments["hidden_states"].transpose(1, 2).contiguous()}


def hunyuan(seed, batch, grid):
    return {**clips(seed, batch, grid, 1), "encoder_attention_mask": mask(batch),
            "pooled_projections": draw(batch, 8, seed=seed + 2), "guidance": torch.full((batch,), 6000.0)}  # fmt: skip


def latte(seed, batch, grid):
    return {**clips(seed, batch, grid), "timestep": torch.full((batch,), 900)}


def mochi(seed, batch, grid):
    return {**clips(seed, batch, grid), "encoder_attention_mask": mask(batch).bool()}


def allegro(seed, batch, grid):
    rows, columns = grid
    count = FRAMES * rows * columns
    axes = [torch.arange(n) for n in (FRAMES, rows, columns)]
    t, h, w = (one.reshape(1, -1).expand(batch, -1) for one in torch.meshgrid(*axes, indexing="ij"))
    pairs = [
        (torch.cos(one[0, :, None] * freq), torch.sin(one[0, :, None] * freq))
        for one in (t, h, w)
        for freq in [torch.ones(1, 8) * 0.1]
    ]
    assert t.shape[1] == count
    return {**clips(seed, batch, grid), "attention_mask": torch.ones(batch, FRAMES, rows * 2, columns * 2),
            "encoder_attention_mask": mask(batch), "image_rotary_emb": (pairs, (t, h, w))}  # fmt: skip


FAMILIES = {
    "wan": Family(
        lambda: WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        ),
        clips,
    ),
    "ltx": Family(
        lambda: LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            num_layers=2, qk_norm="rms_norm_across_heads", caption_channels=16,
        ),
        ltx,
    ),
    "cogvideox": Family(
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4,
            text_embed_dim=16, num_layers=2, sample_width=12, sample_height=8, sample_frames=9, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=TEXT, use_rotary_positional_embeddings=True,
        ),
        cogvideo,
    ),
    "hunyuan-video": Family(
        lambda: HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
        ),
        hunyuan,
    ),
    "latte": Family(
        lambda: LatteTransformer3DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
            caption_channels=16, in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, video_length=FRAMES,
        ),
        latte,
    ),
    "mochi": Family(
        lambda: MochiTransformer3DModel(
            patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=3, pooled_projection_dim=16,
            in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=TEXT,
        ),
        mochi,
        is_kin=True,
    ),
    "allegro": Family(
        lambda: AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
            cross_attention_dim=48, sample_width=12, sample_height=8, sample_frames=FRAMES, caption_channels=16,
        ),
        allegro,
        is_kin=True,
    ),
}  # fmt: skip
