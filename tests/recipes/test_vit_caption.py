import pytest
import torch
from shipped import assert_made_by

from smalti.core.files import read_json
from smalti.data.emoji import load_emoji
from smalti.objectives.caption_contrast import PictureVectors
from smalti.recipes import vit_caption, vit_teacher
from smalti.recipes.vit_caption import PRESETS, VitCaptionRecipe, retrieval, train
from smalti.tokenizers.vision_encoder import VisionTransformer
from smalti.training.config import TrainConfig
from smalti.training.view_source import ViewSource
from smalti.zoo.loader import ZOO, load_part

TINY = VitCaptionRecipe(
    encoder={"depth": 1, "heads": 2, "head_dim": 8},
    training=TrainConfig(steps=2, batch=4, save_every=1, eval_every=1, eval_samples=8),
)


@pytest.fixture
def few(monkeypatch):
    """A few concepts instead of all; what was asked for is kept."""
    asked = []

    def load(split, **more):
        asked.append(split)
        return load_emoji(split, styles=["noto"], topics=["weather"] if split == "train" else ["animals", "food"])

    monkeypatch.setattr(vit_caption, "load_emoji", load)
    monkeypatch.setattr(vit_teacher, "vision_metrics", lambda encoder, settings: {"of": type(encoder).__name__})
    return asked


def test_it_writes_an_encoder_that_was_trained_and_resumes(few, tmp_path):
    folder = train(TINY, tmp_path)
    card = read_json(folder / "smalti.json")
    assert card["recipe"] == "vit-caption"
    assert card["images_seen"] == 8
    assert 0 <= card["metrics"]["first of 20 captions"] <= 1
    model = load_part(folder, VisionTransformer)
    torch.manual_seed(TINY.training.seed)
    assert not torch.allclose(model.x_embedder.weight, VisionTransformer(**TINY.encoder).x_embedder.weight, atol=1e-4)
    before = model.state_dict()
    again = load_part(train(TINY, tmp_path, resume=True), VisionTransformer).state_dict()
    assert all(torch.equal(before[key], again[key]) for key in before)


def test_training_pictures_are_those_of_training_concepts(few, tmp_path, monkeypatch):
    sources = {}
    trainer = vit_caption.Trainer

    def spy(model, objective, source, config, out, **more):
        sources.update(train=source, held_out=more["held_out"])
        return trainer(model, objective, source, config, out, **more)

    monkeypatch.setattr(vit_caption, "Trainer", spy)
    train(TINY, tmp_path)
    assert few[:2] == ["train", "held-out"]
    assert not any(item.held_out for item in sources["train"].pictures.items)
    assert all(item.held_out for item in sources["held_out"].pictures.items)
    assert sources["held_out"].zoom == (1.0, 1.0)


def test_retrieval_is_one_for_a_model_that_knows_and_chance_for_one_that_does_not():
    pictures = load_emoji("held-out", styles=["noto"]).select(topics=["animals", "food", "smileys"])
    count = len(pictures)
    text = torch.eye(count)
    rows = torch.stack([torch.arange(count), torch.arange(count) + 1], 1)
    source = ViewSource(pictures, torch.arange(count), text, rows)

    class Knows(torch.nn.Module):
        start = 0

        def forward(self, pixels):
            self.start += len(pixels)
            return PictureVectors(text[self.start - len(pixels) : self.start], torch.ones(()))

    class Same(torch.nn.Module):
        def forward(self, pixels):
            return PictureVectors(torch.ones(len(pixels), count), torch.ones(()))

    assert retrieval(Knows(), pictures, source) == 1
    assert retrieval(Same(), pictures, source) == 0  # ties count against it


def test_the_shipped_one_was_made_by_this_recipe_and_knows_more_than_its_controls():
    card = read_json(ZOO / "vit-caption" / "smalti.json")
    assert_made_by(card, PRESETS["cpu"])
    metrics = card["metrics"]
    assert metrics["group probe, trained"] > metrics["group probe, untrained"] + 0.05
    assert metrics["group probe, trained"] > metrics["group probe, pixels"] + 0.05
    assert metrics["first of 20 captions"] > 0.3
    assert load_part(ZOO / "vit-caption", VisionTransformer).base_size == 8
    assert (ZOO / "vit-caption" / "diffusion_pytorch_model.safetensors").stat().st_size < 6e6
