"""Models that take shapes, or lists of samples: Qwen-Image, Z-Image, and ours."""

from dataclasses import replace

import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from family import TEXT, Family, draw

from smalti.backbones.dit import DiT
from smalti.backbones.dit_dh import DiTDH
from smalti.backbones.lightning_dit import LightningDiT
from smalti.backbones.microdit import MicroDiT
from smalti.backbones.mixed_dit import MixedDiT
from smalti.backbones.mmdit import MMDiT
from smalti.core.protocols import Cond


def qwen(seed, batch, grid):
    keep = torch.ones(batch, TEXT, dtype=torch.long)
    return {
        "hidden_states": draw(batch, grid[0] * grid[1], 16, seed=seed),
        "encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 1), "encoder_hidden_states_mask": keep,
        "timestep": torch.ones(batch), "img_shapes": [[(1, *grid)]] * batch,
    }  # fmt: skip


def z_image(seed, batch, grid):
    return {
        "x": [draw(4, 1, grid[0] * 2, grid[1] * 2, seed=seed + i) for i in range(batch)],
        "t": torch.ones(batch),
        "cap_feats": [draw(TEXT, 16, seed=seed + 50 + i) for i in range(batch)],
    }


def mmdit(seed, batch, grid):
    cond = Cond(text=draw(batch, TEXT, 12, seed=seed + 1), pooled=draw(batch, 10, seed=seed + 2))
    return {"x": draw(batch, 4, grid[0] * 2, grid[1] * 2, seed=seed), "t": torch.ones(batch), "cond": cond}


def dit(seed, batch, grid):
    arguments = mmdit(seed, batch, grid)
    return {**arguments, "cond": Cond(pooled=draw(batch, 10, seed=seed + 2), label=torch.arange(batch) % 3)}


def labelled(seed, batch, grid):
    arguments = mmdit(seed, batch, grid)
    return {**arguments, "cond": Cond(label=torch.arange(batch) % 3)}


def text_dit(seed, batch, grid):
    arguments = mmdit(seed, batch, grid)
    return {**arguments, "cond": replace(arguments["cond"], label=torch.arange(batch) % 3)}


FAMILIES = {
    "qwen-image": Family(
        lambda: QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        qwen,
        scale=1,
    ),
    "z-image": Family(
        lambda: ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0,
            axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
        ),
        z_image,
        sample="x",
        time="t",
        scale=1,
    ),
    "mmdit": Family(MMDiT.tiny, mmdit, sample="x", time="t", scale=1),
    "our-dit": Family(DiT.tiny, dit, sample="x", time="t", scale=1),
    "our-lightning-dit": Family(LightningDiT.tiny, labelled, sample="x", time="t", scale=1, is_kin=True),
    "our-dit-dh": Family(DiTDH.tiny_patches, labelled, sample="x", time="t", scale=1, is_kin=True),
    "our-text-dit": Family(DiT.tiny_text, text_dit, sample="x", time="t", scale=1),
    "our-mixed-dit": Family(MixedDiT.tiny, text_dit, sample="x", time="t", scale=1, is_kin=True),
    "our-microdit": Family(MicroDiT.tiny, text_dit, sample="x", time="t", scale=1, is_kin=True),
}  # fmt: skip
