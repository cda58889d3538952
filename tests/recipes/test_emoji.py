import torch

from smalti.core.files import read_json
from smalti.data.emoji import load_emoji
from smalti.recipes.emoji import PRESETS, EmojiRecipe, latent_source, train
from smalti.tokenizers.conv_autoencoder import ConvAutoencoder
from smalti.tokenizers.text_encoder import MiniLMEncoder
from smalti.training.config import TrainConfig
from smalti.zoo.loader import load_model

TINY = EmojiRecipe(
    topics=("smileys", "food", "animals"),
    styles=("noto",),
    autoencoder={
        "factor": 8, "latent_channels": 4, "widths": (8, 8, 8),
        "encoder_blocks": (0, 0, 0), "decoder_blocks": (0, 0, 1),
    },
    autoencoder_training=TrainConfig(steps=2, batch=4),
    transformer={"num_double": 1, "num_single": 1, "heads": 2, "head_dim": 8, "axes_dims_rope": (2, 2, 4)},
    training=TrainConfig(steps=4, batch=4, sample_every=4, eval_every=4, eval_samples=8),
    text_length=8,
    measured=40,
)  # fmt: skip


def test_the_whole_recipe(tmp_path):
    folder = train(TINY, tmp_path)
    card = read_json(folder / "smalti.json")
    assert card["recipe"] == "emoji"
    assert card["images_seen"] == 16
    assert card["autoencoder_psnr"] > 15
    assert 0 <= card["metrics"]["matched preferred"] <= 1
    assert card["settings"]["topics"] == ["smileys", "food", "animals"]
    assert (tmp_path / "transformer" / "samples" / "step-000004.png").is_file()
    pipe = load_model(folder)
    first, again = (
        pipe("red apple", style="noto", num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images[0]
        for _ in range(2)
    )
    assert first.size == (64, 64)
    assert first.tobytes() == again.tobytes()


def test_presets_say_what_they_are():
    cpu, gpu = PRESETS["cpu"], PRESETS["gpu"]
    assert cpu.autoencoder["factor"] == 8
    assert gpu.autoencoder["factor"] == 4
    assert gpu.topics is None
    assert len(cpu.topics) == 6


def test_styles_captions_and_shifts_reach_the_source(tmp_path):
    pictures = load_emoji("held-out", styles=["noto", "twemoji"], topics=["hearts"])
    autoencoder = ConvAutoencoder(**TINY.autoencoder).eval()
    source = latent_source(
        autoencoder, pictures, MiniLMEncoder(length=8), ("noto", "twemoji"), tmp_path, ((0, 0), (2, 0))
    )
    assert len(source) == len(pictures)
    assert len(source.views) == 2
    assert source.labels.tolist() == [["noto", "twemoji"].index(item.style) for item in pictures.items]
    assert not torch.equal(source.views[0][torch.tensor([0])], source.views[1][torch.tensor([0])])
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(pictures))]
    batch = source.batch(torch.arange(len(pictures)), generators)
    assert batch.cond.text.shape == (len(pictures), 8, 384)
    again = source.batch(torch.tensor([1]), [torch.Generator().manual_seed(1)])
    assert torch.equal(batch.x0[1], again.x0[0])
    assert torch.equal(batch.cond.text[1], again.cond.text[0])


def test_deviations_of_the_posterior_are_those_of_the_normalised_latents(tmp_path):
    pictures = load_emoji("held-out", styles=["noto"], topics=["hearts"])
    autoencoder = ConvAutoencoder(**TINY.autoencoder).eval()
    autoencoder.latents_std.fill_(0.5)
    source = latent_source(autoencoder, pictures, MiniLMEncoder(length=8), ("noto",), tmp_path, is_drawn=True)
    rows = torch.arange(len(pictures))
    logvar = autoencoder.encode(pictures.pixels()).statistics["logvar"]
    assert torch.allclose(source.deviations[0][rows], (0.5 * logvar).exp() / 0.5, rtol=1e-3)
