import torch
from shipped import assert_made_by

from smalti.core.files import read_json
from smalti.data.emoji import load_emoji
from smalti.evaluation.vgg import VGG16
from smalti.recipes import rae_emoji
from smalti.recipes.rae_emoji import PRESETS, RAERecipe, train
from smalti.tokenizers.rae import RAE
from smalti.training import tokenizer
from smalti.training.config import TrainConfig
from smalti.training.tokenizer import TokenizerSettings
from smalti.zoo.loader import ZOO, load_part

TINY = RAERecipe(
    before=TrainConfig(steps=1, batch=4),
    training=TrainConfig(steps=2, batch=4),
    losses=TokenizerSettings(
        kl=0.0, critic=0.75, critic_learns_from=0, critic_from=1, learned_deviation=False, is_augmented=True, tau=0.8
    ),
    model={"depth": 1, "width": 16, "heads": 2},
    critic="random",
    linear_start=64,
    measured=16,
)


def test_it_writes_a_decoder_with_statistics_and_quality(tmp_path, monkeypatch):
    monkeypatch.setattr(
        rae_emoji, "load_emoji", lambda split: load_emoji(split, styles=["noto"], topics=["animals", "hearts"])
    )
    monkeypatch.setattr(tokenizer.VGG16, "pretrained", VGG16)
    folder = train(TINY, tmp_path)
    metrics = read_json(folder / "smalti.json")["metrics"]
    assert {"PSNR", "SSIM", "rFD-EfficientNetLite0", "group probe of latents"} <= metrics.keys()
    assert metrics["group probe of latents"] > metrics["group probe of pixels"]
    model = load_part(folder, RAE)
    latents = model.encode(load_emoji("train", styles=["noto"], topics=["animals", "hearts"]).pixels()).tensor
    assert latents.mean((0, 2, 3)).abs().max() < 0.02
    assert latents.mean(0).abs().max() < 0.02


def test_the_shipped_one_was_made_by_this_recipe_and_knows_more_than_pixels_do():
    card = read_json(ZOO / "rae-emoji" / "smalti.json")
    assert_made_by(card, PRESETS["cpu"])
    metrics = card["metrics"]
    assert metrics["PSNR"] > 21
    assert metrics["group probe of latents"] > metrics["group probe of pixels"] + 0.03
    model = load_part(ZOO / "rae-emoji", RAE)
    assert model.latents_variance.dtype == torch.float32
    assert (ZOO / "rae-emoji" / "diffusion_pytorch_model.safetensors").stat().st_size < 6e6
