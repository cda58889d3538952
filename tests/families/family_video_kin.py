"""Later video models: AnyFlow, Helios, Kandinsky 5 and 6 SR, MotifVideo, SANA-WM, Wan-Animate."""

import torch
from diffusers import (
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    HeliosTransformer3DModel,
    Kandinsky5Transformer3DModel,
    Kandinsky6SRTransformer3DModel,
    MotifVideoTransformer3DModel,
    SanaWMLTX2RefinerTransformer3DModel,
    SanaWMTransformer3DModel,
    WanAnimate2Transformer3DModel,
    WanAnimateTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from family import GRIDS, TEXT, Family, draw
from family_video import FRAMES, clips, cogvideo, mask
from family_wan_kin import WAN  # fmt: skip


def anyflow(seed, batch, grid):
    times = torch.full((batch, FRAMES), 900.0)
    return {**cogvideo(seed, batch, grid), "timestep": times, "r_timestep": torch.zeros_like(times)}


def anyflow_far(seed, batch, grid):
    return {**anyflow(seed, batch, grid), "chunk_partition": [1, 2]}


def helios(seed, batch, grid):
    history = {"short": 1, "mid": 2, "long": 4}
    start, arguments = 0, {}
    for name, count in reversed(history.items()):
        arguments |= {
            f"latents_history_{name}": draw(batch, 4, count, grid[0] * 2, grid[1] * 2, seed=seed + 3 + count),
            f"indices_latents_history_{name}": torch.arange(start, start + count).expand(batch, -1),
        }
        start += count
    places = torch.arange(start, start + FRAMES).expand(batch, -1)
    return {**clips(seed, batch, grid), **arguments, "indices_hidden_states": places}


def kandinsky5(seed, batch, grid):
    return {
        **clips(seed, batch, grid), "hidden_states": draw(batch, FRAMES, grid[0] * 2, grid[1] * 2, 4, seed=seed),
        "pooled_projections": draw(batch, 8, seed=seed + 2), "text_rope_pos": torch.arange(TEXT),
        "visual_rope_pos": [torch.arange(n) for n in (FRAMES, *grid)],
    }  # fmt: skip


def kandinsky6_sr(seed, batch, grid):
    noise = draw(batch, 1, 8, 8 * (grid[1] // 6), 4, seed=seed)  # its blocks of attention are squares of 8
    given = draw(*noise.shape[:-1], 5, seed=seed + 1)
    return {"hidden_states": torch.cat([noise, given], -1), "timestep": torch.full((batch,), 900.0)}


def motif(seed, batch, grid):
    return {**clips(seed, batch, grid), "encoder_attention_mask": mask(batch),
            "image_embeds": draw(batch, 3, 8, seed=seed + 2)}  # fmt: skip


def sana_wm(seed, batch, grid):
    return {
        **clips(seed, batch, grid, 1), "timestep": torch.full((batch, 1, FRAMES), 900.0),
        "encoder_attention_mask": mask(batch),
    }  # fmt: skip


def sana_wm_refiner(seed, batch, grid):
    count = FRAMES * grid[0] * grid[1]
    angles = draw(1, count, 16, seed=9).expand(batch, -1, -1)
    return {
        **clips(seed, batch, grid), "hidden_states": draw(batch, count, 4, seed=seed),
        "encoder_attention_mask": mask(batch), "video_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip


def wan_animate(seed, batch, grid):
    rows, columns = 2 * grid[0], 2 * grid[1]
    return {
        **clips(seed, batch, grid, channels=12), "pose_hidden_states": draw(batch, 4, 2, rows, columns, seed=seed + 3),
        "encoder_hidden_states": draw(batch, 512, 16, seed=seed + 1),  # fewer are not told from those of the picture
        "encoder_hidden_states_image": draw(batch, 3, 8, seed=seed + 2),
        "face_pixel_values": draw(batch, 3, 8, 16, 16, seed=seed + 4),
    }  # fmt: skip


def wan_animate2(seed, batch, grid):
    count = grid[0] * grid[1]
    cache = WanAnimate2KVCache(2)
    for layer in range(2):  # what a pass over two reference frames leaves
        cache.get(layer).store(*(draw(batch, 2 * count, 2, 12, seed=seed + 10 * layer + i) for i in (5, 6)))
    clip, texts = clips(seed, batch, grid), [draw(TEXT, 16, seed=seed + 20 + i) for i in range(batch)]
    given = draw(batch, 2, FRAMES, 2 * grid[0], 2 * grid[1], seed=seed + 3)
    sizes = torch.tensor([[FRAMES, *grid]] * batch)
    return {
        "hidden_states": list(clip["hidden_states"]), "timestep": clip["timestep"], "encoder_hidden_states": texts,
        "condition_latents": list(given), "kv_cache": cache, "kv_cache_mode": "cached", "seq_len": FRAMES * count,
        "reference_grid_sizes": sizes - torch.tensor([1, 0, 0]), "origin_len": 4 * (FRAMES - 2),
        "origin_area": [16 * grid[0], 16 * grid[1]],
    }  # fmt: skip


def build_wan_animate2():
    model = WanAnimate2Transformer3DModel(
        text_len=TEXT, in_dim=6, dim=24, ffn_dim=32, freq_dim=16, text_dim=16, out_dim=4, num_heads=2, num_layers=2,
        use_img_emb=False,
    )  # fmt: skip
    with torch.compiler.set_stance(
        "force_eager"
    ):  # building its masks is compiled otherwise, which takes half a minute
        for rows, columns in GRIDS.values():
            frames = FRAMES - 1
            model.block_masks[frames, rows * columns] = model.create_mask(frames, rows * columns, "cpu")
    return model


KANDINSKY = {"time_dim": 16, "model_dim": 32, "ff_dim": 32, "num_visual_blocks": 2, "axes_dims": (4, 6, 6)}
FAMILIES = {
    "anyflow": Family(
        lambda: AnyFlowTransformer3DModel(**WAN), anyflow, is_kin=True
    ),
    "anyflow-far": Family(
        lambda: AnyFlowFARTransformer3DModel(**WAN, full_chunk_limit=3), anyflow_far, is_kin=True
    ),
    "helios": Family(
        lambda: HeliosTransformer3DModel(**WAN, rope_dim=(4, 4, 4), is_amplify_history=True), helios, is_kin=True
    ),
    "kandinsky5": Family(
        lambda: Kandinsky5Transformer3DModel(
            **KANDINSKY, in_text_dim=16, in_text_dim2=8, num_text_blocks=1,
        ),
        kandinsky5,
        is_kin=True,
    ),
    "kandinsky6-sr": Family(
        lambda: Kandinsky6SRTransformer3DModel(
            **KANDINSKY, in_visual_dim=4, out_visual_dim=4, nabla_window=(1, 1, 1),
        ),
        kandinsky6_sr,
        is_kin=True,
    ),
    "motif-video": Family(
        lambda: MotifVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=3, num_decoder_layers=1, text_embed_dim=16, image_embed_dim=8, rope_axes_dim=(4, 6, 6),
            enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
        ),
        motif,
        is_kin=True,
    ),
    "sana-wm": Family(
        lambda: SanaWMTransformer3DModel(
            in_channels=4, num_layers=2, hidden_size=24, num_attention_heads=2, softmax_every_n=2, linear_head_dim=12,
            caption_channels=16, chunk_plucker_channels=4, mlp_ratio=2.0,
        ),
        sana_wm,
        is_kin=True,
    ),
    "sana-wm-refiner": Family(
        lambda: SanaWMLTX2RefinerTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
            audio_cross_attention_dim=8, num_layers=2, caption_channels=16,
        ),
        sana_wm_refiner,
        is_kin=True,
    ),
    "wan-animate": Family(
        lambda: WanAnimateTransformer3DModel(
            **{**WAN, "in_channels": 12}, latent_channels=4, image_dim=8, added_kv_proj_dim=24,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8,
            motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        wan_animate,
        is_kin=True,
    ),
    "wan-animate2": Family(build_wan_animate2, wan_animate2, is_kin=True),
}  # fmt: skip
