"""The model of clips: what it takes over from the model of pictures, which frames it sees, a training end to end."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.core.protocols import Cond
from smalti.data.emoji import EmojiItem, EmojiSet
from smalti.recipes import clip
from smalti.recipes.clip import PRESETS, clip_source, one_style, train
from smalti.sampling.pictures import draw_pictures
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.config import TrainConfig
from smalti.zoo.loader import load_model, model_card


def clips_of(count, split="train", topics=None):
    """Clips whose frames get darker one by one."""
    kind = ("animals-nature", "animal-mammal", "fluent-3d", False)
    items = [EmojiItem(f"1f43{i}", f"animal {i}", (), *kind, str(i)) for i in range(count)]
    images = np.full((count, 16, 64, 64, 4), 255, np.uint8)
    images[..., :3] -= (15 * np.arange(16, dtype=np.uint8))[:, None, None, None]
    return EmojiSet(tuple(items), images, f"{count}")


@pytest.fixture(scope="module")
def emoji():
    return load_model("emoji")


def test_the_one_style_and_none_keep_their_rows(emoji):
    styles = emoji.config["styles"]
    model = one_style(emoji.transformer, styles.index("fluent-3d"))
    cond = {"text": torch.randn(1, 4, 384), "pooled": torch.randn(1, 384)}
    x, t = torch.randn(1, 16, 8, 8), torch.tensor([0.4])
    for ours, theirs in ((0, styles.index("fluent-3d")), (1, len(styles))):
        given = [Cond(**cond, label=torch.tensor([label])) for label in (ours, theirs)]
        assert torch.equal(model(x, t, given[0]), emoji.transformer(x, t, given[1]))


def test_a_sample_is_every_second_frame_from_the_first_or_the_second(emoji, tmp_path):
    encoder = EmbeddingCache(MiniLMEncoder(length=8), tmp_path / "text")
    source = clip_source(emoji.autoencoder, clips_of(2), 8, encoder, tmp_path)
    assert len(source.views) == 2
    even, odd = (table[torch.tensor([0])] for table in source.views)
    assert even.shape == (1, 16, 8, 8, 8)
    expected = emoji.autoencoder.encode(clips_of(1).pixels()[:, :, 3]).tensor
    torch.testing.assert_close(odd[:, :, 1], expected, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(even[:, :, 1], odd[:, :, 1], atol=1e-2)


def test_a_training_gives_a_model_that_draws_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "load_clips", lambda split, topics: clips_of(4 if split == "train" else 2))
    config = TrainConfig(steps=2, batch=2, warmup=1, sample_every=2, eval_every=2, save_every=2)
    folder = train(replace(PRESETS["cpu"], training=config, measured=2), tmp_path)
    card = model_card(folder)
    assert card["clips_seen"] == 4
    assert {"motion", "motion, real"} < set(card["metrics"])
    sheet = Image.open(next((tmp_path / "transformer" / "samples").glob("*.png")))
    assert sheet.width > 8 * 64
    (film,) = draw_pictures(load_model(folder), ["a cat"], ["fluent-3d"], [0], num_inference_steps=1)
    assert len(film) == 8
