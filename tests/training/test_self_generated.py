"""Samples that a model draws itself: its pictures, its prompts, drawn once."""

import pytest
import torch

from smalti.core.seeds import generators_for
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.self_generated import self_generated
from smalti.zoo.loader import load_model

PROMPTS, LOOK = ["a red apple", "cat face", "sun"], ["noto", "twemoji", "fluent-3d"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    pipe = load_model("emoji")
    pipe.set_progress_bar_config(disable=True)
    length = pipe.config["text_length"]
    pipe.use_text_encoder(EmbeddingCache(MiniLMEncoder(length=length), tmp_path_factory.mktemp("text")))
    return pipe


def test_samples_are_the_teachers_pictures_as_mean_and_deviation(pipe, tmp_path, monkeypatch):
    source = self_generated(pipe, PROMPTS, LOOK, tmp_path, steps=2, guidance=2.0, first_seed=5, text_dropout=0.0)
    drawn = pipe(
        PROMPTS, style=LOOK, generator=generators_for([5, 6, 7]), num_inference_steps=2, guidance_scale=2.0,
        output_type="pt",
    ).images  # fmt: skip
    latents = pipe.autoencoder.encode(drawn * 2 - 1)
    torch.testing.assert_close(source.views[0], latents.tensor, atol=2e-3, rtol=2e-3)
    spread = (0.5 * latents.statistics["logvar"]).exp() / pipe.autoencoder.latents_std[:, None, None]
    torch.testing.assert_close(source.deviations[0], spread, atol=2e-3, rtol=2e-3)
    one, other = (source.batch(torch.arange(3), generators_for(range(s, s + 3))) for s in (0, 9))
    assert not torch.equal(one.x0, other.x0)
    assert one.cond.label.tolist() == [pipe.config["styles"].index(style) for style in LOOK]
    embedded = pipe.text.encode(PROMPTS)
    torch.testing.assert_close(one.cond.text, embedded.tokens, atol=2e-3, rtol=2e-3)
    assert torch.equal(one.cond.mask, embedded.mask)

    def refuse(*args, **kwargs):
        raise AssertionError("drawn twice")

    monkeypatch.setattr(type(pipe), "__call__", refuse)
    again = self_generated(pipe, PROMPTS, LOOK, tmp_path, steps=2, guidance=2.0, first_seed=5)
    assert torch.equal(again.views[0], source.views[0])
    with pytest.raises(AssertionError, match="drawn twice"):
        self_generated(pipe, PROMPTS, LOOK, tmp_path, steps=2, guidance=2.0, first_seed=6)
