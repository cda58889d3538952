import torch
from shipped import assert_made_by

from smalti.core.files import read_json
from smalti.data.emoji import load_emoji
from smalti.recipes import vit_self, vit_teacher
from smalti.recipes.vit_self import PRESETS, VitSelfRecipe, train
from smalti.tokenizers.vision_encoder import VisionTransformer
from smalti.training.config import TrainConfig
from smalti.zoo.loader import ZOO, load_part

TINY = VitSelfRecipe(
    encoder={"depth": 1, "heads": 2, "head_dim": 8},
    decoder={"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
    training=TrainConfig(steps=2, batch=4, save_every=1, eval_every=1, eval_samples=8),
)


def test_it_writes_the_encoder_alone_and_resumes(tmp_path, monkeypatch):
    asked = []

    def load(split, **more):
        asked.append(split)
        return load_emoji(split, styles=["noto"], topics=["animals"])

    monkeypatch.setattr(vit_self, "load_emoji", load)
    monkeypatch.setattr(vit_teacher, "vision_metrics", lambda encoder, settings: {})
    folder = train(TINY, tmp_path)
    assert asked == ["train", "held-out"]
    card = read_json(folder / "smalti.json")
    assert card["recipe"] == "vit-self"
    assert card["held_out_loss"] > 0
    model = load_part(folder, VisionTransformer)
    torch.manual_seed(TINY.training.seed)
    assert not torch.allclose(model.x_embedder.weight, VisionTransformer(**TINY.encoder).x_embedder.weight, atol=1e-4)
    before = model.state_dict()
    again = load_part(train(TINY, tmp_path, resume=True), VisionTransformer).state_dict()
    assert all(torch.equal(before[key], again[key]) for key in before)


def test_the_shipped_one_was_made_by_this_recipe_and_knows_more_than_its_controls():
    card = read_json(ZOO / "vit-self" / "smalti.json")
    assert_made_by(card, PRESETS["cpu"])
    metrics = card["metrics"]
    assert metrics["group probe, trained"] > metrics["group probe, untrained"] + 0.05
    assert metrics["group probe, trained"] > metrics["group probe, pixels"] + 0.03
    assert load_part(ZOO / "vit-self", VisionTransformer).base_size == 8
    assert (ZOO / "vit-self" / "diffusion_pytorch_model.safetensors").stat().st_size < 6e6
