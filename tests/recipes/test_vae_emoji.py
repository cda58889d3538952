from smalti.core.files import read_json
from smalti.recipes.emoji import EmojiRecipe
from smalti.recipes.vae_emoji import train
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.training.config import TrainConfig
from smalti.zoo.loader import ZOO, load_part

TINY = EmojiRecipe(
    topics=None,
    styles=("noto",),
    autoencoder={
        "factor": 4, "latent_channels": 4, "widths": (8, 8), "encoder_blocks": (0, 0), "decoder_blocks": (0, 0),
    },
    autoencoder_training=TrainConfig(steps=1, batch=2),
    transformer={},
    training=TrainConfig(steps=1, batch=2),
)  # fmt: skip


def test_it_writes_an_autoencoder_with_its_quality(tmp_path):
    folder = train(TINY, tmp_path)
    model = load_part(folder, ConvAutoencoder)
    assert model.factor == 4
    assert read_json(folder / "smalti.json")["metrics"]["held-out PSNR in dB"] > 18


def test_the_shipped_one_is_good_enough():
    assert read_json(ZOO / "vae-emoji" / "smalti.json")["metrics"]["held-out PSNR in dB"] >= 30
    assert load_part(ZOO / "vae-emoji", ConvAutoencoder).latent_channels == 8
