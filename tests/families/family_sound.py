"""Sound: ACE-Step, LongCat-Audio, MiniMax Music 3, Stable Audio 3, the spectrogram decoder of T5-FiLM."""

import torch
from diffusers import (
    AceStepTransformer1DModel,
    LongCatAudioDiTTransformer,
    MiniMaxMusic3RVQDepthDecoder,
    MiniMaxMusic3Transformer1DModel,
    StableAudio3DiTModel,
    T5FilmDecoder,
)
from family import TEXT, Family, draw  # fmt: skip


def length_of(grid):
    return grid[0] * grid[1]


def ace_step(seed, batch, grid):
    return {
        "hidden_states": draw(batch, 2 * length_of(grid), 4, seed=seed), "timestep": torch.ones(batch),
        "timestep_r": torch.ones(batch), "encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 1),
        "context_latents": draw(batch, 2 * length_of(grid), 4, seed=seed + 2),
    }  # fmt: skip


def longcat_audio(seed, batch, grid):
    keep = torch.ones(batch, TEXT, dtype=torch.bool)
    keep[:, 3:] = False
    return {
        "hidden_states": draw(batch, length_of(grid), 4, seed=seed), "timestep": torch.ones(batch),
        "encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 1), "encoder_attention_mask": keep,
        "latent_cond": draw(batch, length_of(grid), 4, seed=seed + 2),
    }  # fmt: skip


def music3(seed, batch, grid):
    return {
        "hidden_states": draw(batch, 4, length_of(grid), seed=seed), "timestep": torch.ones(batch),
        "encoder_hidden_states": draw(batch, length_of(grid), 16, seed=seed + 1),
    }  # fmt: skip


def stable_audio3(seed, batch, grid):
    return {
        "hidden_states": draw(batch, 4, length_of(grid), seed=seed), "timestep": torch.ones(batch),
        "encoder_hidden_states": draw(batch, TEXT, 16, seed=seed + 1),
        "global_hidden_states": draw(batch, 8, seed=seed + 2),
    }  # fmt: skip


def t5_film(seed, batch, grid):
    notes = draw(batch, TEXT, 16, seed=seed + 1)
    return {
        "decoder_input_tokens": draw(batch, length_of(grid), 4, seed=seed), "decoder_noise_time": torch.ones(batch),
        "encodings_and_masks": [(notes, torch.ones(batch, TEXT))],
    }  # fmt: skip


FAMILIES = {
    "ace-step": Family(
        lambda: AceStepTransformer1DModel(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, in_channels=8, audio_acoustic_hidden_dim=4, sliding_window=4, encoder_hidden_size=16,
        ),
        ace_step,
        scale=1,
        clocks=("timestep_r",),
        is_kin=True,
    ),
    "longcat-audio": Family(
        lambda: LongCatAudioDiTTransformer(dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=16, latent_dim=4),
        longcat_audio,
        scale=1,
        is_kin=True,
    ),
    "minimax-music3": Family(
        lambda: MiniMaxMusic3Transformer1DModel(
            in_channels=4, condition_dim=16, num_layers=2, num_attention_heads=2, attention_head_dim=8,
            ff_inner_dim=32, rotary_dim=4, fourier_embedding_dim=8,
        ),
        music3,
        scale=1,
        is_kin=True,
    ),
    "minimax-music3-depth": Family(
        lambda: MiniMaxMusic3RVQDepthDecoder(
            hidden_size=16, num_layers=2, num_attention_heads=2, intermediate_size=16, audio_vocab_size=8,
            num_codebooks=2,
        ),
        refused="forward takes no argument that holds the time",
    ),
    "stable-audio3": Family(
        lambda: StableAudio3DiTModel(
            io_channels=4, embed_dim=16, depth=2, num_heads=2, cond_token_dim=16, global_cond_dim=8,
            local_add_cond_dim=4, timestep_features_dim=16, num_memory_tokens=3,
        ),
        stable_audio3,
        scale=1,
        is_kin=True,
    ),
    "t5-film": Family(
        lambda: T5FilmDecoder(
            input_dims=4, targets_length=48, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=32, dropout_rate=0.0
        ),
        t5_film,
        sample="decoder_input_tokens",
        time="decoder_noise_time",
        scale=1,
        is_kin=True,
    ),
}  # fmt: skip
