import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from smalti.core.errors import UserError
from smalti.tokenizers.diffusers_autoencoder import DiffusersAutoencoder

TINY = {
    "kl": lambda: AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ),
    "dc": lambda: AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TINY)
def test_any_autoencoder_on_disk(kind, tmp_path):
    inner = TINY[kind]().eval()
    inner.save_pretrained(tmp_path / "inner")
    wrapped = DiffusersAutoencoder.from_folder(tmp_path / "inner")
    assert wrapped.factor == 2
    pixels = torch.rand(4, 3, 32, 48) * 2 - 1
    wrapped.measure_statistics(pixels.split(2))
    latents = wrapped.encode(pixels)
    assert latents.tensor.shape == (4, wrapped.latent_channels, 16, 24)
    assert latents.tensor.mean((0, 2, 3)).abs().max() < 1e-3
    decoded = wrapped.decode(latents)
    assert decoded.shape == pixels.shape
    wrapped.save_pretrained(tmp_path / "wrapped")
    again = DiffusersAutoencoder.from_pretrained(tmp_path / "wrapped").eval()
    assert torch.equal(again.decode(again.encode(pixels)), decoded)


def test_what_is_no_autoencoder(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        DiffusersAutoencoder.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(UserError, match="no autoencoder of diffusers"):
        DiffusersAutoencoder.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match="cannot read the autoencoder"):
        DiffusersAutoencoder.from_folder(tmp_path)


def test_weights_that_are_torn_pickled_or_do_not_fit(tmp_path):
    TINY["kl"]().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    save_file({key: value for key, value in weights.items() if key != "decoder.conv_in.bias"}, file)
    with pytest.raises(UserError, match="do not fit its config: 1 missing"):
        DiffusersAutoencoder.from_folder(tmp_path)
    save_file({**weights, "more": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="do not fit its config: 1 unexpected"):
        DiffusersAutoencoder.from_folder(tmp_path)
    file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="cannot read the autoencoder"):
        DiffusersAutoencoder.from_folder(tmp_path)
    file.unlink()
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="cannot read the autoencoder"):
        DiffusersAutoencoder.from_folder(tmp_path)


def test_other_autoencoders_are_refused(tmp_path):
    AutoencoderKL(in_channels=1, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not encode pictures of 3 channels"):
        DiffusersAutoencoder.from_folder(tmp_path)
