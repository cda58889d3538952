import torch

from smalti.data.emoji import load_emoji
from smalti.recipes import vit_teacher
from smalti.recipes.vit_teacher import drawn_patches, picture_tokens, small_pixels, vision_metrics
from smalti.tokenizers.vision_encoder import VisionTransformer

SETTINGS = {"depth": 1, "heads": 2, "head_dim": 8}


def test_patches_count_as_drawn_where_half_of_them_is_opaque():
    pictures = load_emoji("held-out", styles=["noto"], topics=["hearts"])
    drawn = drawn_patches(pictures, 8).unflatten(1, (8, 8))
    assert drawn[:, 3:5, 3:5].all()
    assert not drawn[:, 0, 0].any()
    alpha = torch.from_numpy(pictures.images[0, 16:24, 8:16, 3]).float() / 255
    assert drawn[0, 2, 1] == (alpha.mean() >= 0.5)


def test_tokens_come_in_the_order_of_the_set():
    pictures = load_emoji("train", styles=["noto"], topics=["food"])
    encoder = VisionTransformer.untrained(**SETTINGS)
    tokens = picture_tokens(encoder, pictures)
    assert tokens.shape == (len(pictures), 64, 16)
    assert len(pictures) > vit_teacher.BATCH
    assert torch.allclose(tokens[70], encoder(pictures.pixels([70]))[0], atol=1e-5)
    assert small_pixels(pictures).shape == (len(pictures), 3 * 32 * 32)


def test_an_encoder_that_ignores_pictures_is_seen_through(monkeypatch):
    """The probe of a constant feature is the most frequent group; what is left of the untrained one is more."""
    monkeypatch.setattr(
        vit_teacher, "load_emoji", lambda split: load_emoji(split, styles=["noto"], topics=["food", "smileys"])
    )
    monkeypatch.setattr(vit_teacher, "PIXEL_SIDE", 8)
    blind = VisionTransformer.untrained(1, **SETTINGS)
    torch.nn.init.zeros_(blind.x_embedder.weight)
    found = vision_metrics(blind, SETTINGS)
    assert found["group probe, trained"] == found["group probe, most frequent"]
    assert found["group probe, untrained"] > found["group probe, most frequent"] + 0.2
    assert found["variance within pictures"] > 0.99
    assert found["pictures"] == len(load_emoji("held-out", styles=["noto"], topics=["food", "smileys"]))
