"""Two samples in one call, video and sound: LTX-2, MiniMax H3, Kandinsky 6."""

import torch
from diffusers import Kandinsky6Transformer3DModel, LTX2VideoTransformer3DModel, MiniMaxH3Transformer3DModel
from family import TEXT, Family, draw
from family_video import FRAMES, clips, mask  # fmt: skip

SOUND = 7


def ltx2(seed, batch, grid):
    count = FRAMES * grid[0] * grid[1]
    return {
        **clips(seed, batch, grid), "hidden_states": draw(batch, count, 4, seed=seed),
        "audio_hidden_states": draw(batch, SOUND, 4, seed=seed + 2),
        "audio_encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 3), "encoder_attention_mask": mask(batch),
        "audio_encoder_attention_mask": mask(batch), "num_frames": FRAMES, "height": grid[0], "width": grid[1],
        "audio_num_frames": SOUND,
    }  # fmt: skip


def h3(seed, batch, grid):
    count = FRAMES * grid[0] * grid[1]
    spans = torch.arange(TEXT + count + SOUND).split([TEXT, count, SOUND])
    axes = torch.meshgrid(*(torch.arange(n) for n in (FRAMES, *grid)), indexing="ij")
    place = torch.zeros(TEXT + count + SOUND, 3)
    place[spans[0], 0], place[spans[2], 0] = torch.arange(TEXT).float(), 10.0 + torch.arange(SOUND)
    place[spans[1]] = torch.stack([one.flatten() for one in axes], 1) + torch.tensor([10.0, 0, 0])
    tags = torch.cat([torch.full_like(span, kind) for span, kind in zip(spans, (2, 0, 1), strict=True)])
    return {
        "hidden_states": draw(batch, count, 16, seed=seed), "timestep": torch.full((1,), 900.0),
        "audio_hidden_states": draw(batch, SOUND, 4, seed=seed + 2),
        "encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 1), "timestep_indices": torch.zeros_like(tags),
        "token_tags": tags, "position_ids": place, "text_indices": spans[0], "video_indices": spans[1],
        "audio_indices": spans[2],
    }  # fmt: skip


def kandinsky6(seed, batch, grid):
    return {
        **clips(seed, batch, grid), "hidden_states": draw(batch, FRAMES, grid[0] * 2, grid[1] * 2, 4, seed=seed),
        "pooled_projections": draw(batch, 8, seed=seed + 2),
        "audio_hidden_states": draw(batch, SOUND, 4, seed=seed + 3),
    }  # fmt: skip


FAMILIES = {
    "ltx2": Family(
        lambda: LTX2VideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
            audio_cross_attention_dim=8, num_layers=2, caption_channels=16,
        ),
        ltx2,
        beside=("audio_hidden_states",),
    ),
    "minimax-h3": Family(
        lambda: MiniMaxH3Transformer3DModel(
            num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=1,
            ffn_dim=32, in_channels=4, audio_in_channels=4, text_dim=16, freq_dim=16, time_embed_hidden_dim=16,
            time_embed_dim=8, rope_freq_dim=2,
        ),
        h3,
        beside=("audio_hidden_states",),
        is_kin=True,
    ),
    "kandinsky6": Family(
        lambda: Kandinsky6Transformer3DModel(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=32,
            num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=False, in_audio_dim=4,
            out_audio_dim=4,
        ),
        kandinsky6,
        beside=("audio_hidden_states",),
        is_kin=True,
    ),
}  # fmt: skip
