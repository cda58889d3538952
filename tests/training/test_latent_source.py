import warnings

import pytest
import torch

from smalti.core.seeds import generators_for
from smalti.tokenizers.text_encoder import EmbeddingCache, MiniLMEncoder
from smalti.training.latent_source import LatentSource, embed_captions

VIEWS = [torch.arange(6.0).reshape(6, 1, 1, 1) + 100 * view for view in range(3)]


@pytest.fixture(scope="module")
def captions():
    phrasings = [["red apple"], ["green apple", "an apple that is green"], ["red apple"], ["cat"], ["dog"], ["fox"]]
    return embed_captions(phrasings, MiniLMEncoder(length=8))


def draws(source, index, count=400):
    return source.batch(torch.full((count,), index), generators_for(range(count)))


def test_a_sample_does_not_depend_on_its_batch(captions):
    source = LatentSource(VIEWS, captions, torch.tensor([0, 1, 0, 1, 0, 1]), dropped_label=2)
    indices = torch.tensor([4, 1, 1, 0, 5, 2])
    together = source.batch(indices, generators_for(range(6)))
    for row in range(6):
        alone = source.batch(indices[row : row + 1], generators_for([row]))
        assert torch.equal(alone.x0[0], together.x0[row])
        assert torch.equal(alone.cond.text[0], together.cond.text[row])
        assert torch.equal(alone.cond.label[0], together.cond.label[row])
        assert together.x0[row] % 100 == indices[row]


def test_views_and_phrasings_are_drawn_alike_and_conditions_dropped_at_their_rates(captions):
    source = LatentSource(VIEWS, captions, torch.ones(6, dtype=torch.long), 2, text_dropout=0.2, label_dropout=0.4)
    batch = draws(source, 1)
    assert all(abs(float((batch.x0 // 100 == view).float().mean()) - 1 / 3) < 0.08 for view in range(3))
    first, last = captions.rows[1].tolist()
    assert last - first == 2
    rows = [captions.text.pooled[row].float() for row in (first, first + 1, len(captions.text.pooled) - 1)]
    shares = [float((batch.cond.pooled == row).all(1).float().mean()) for row in rows]
    assert shares == pytest.approx([0.4, 0.4, 0.2], abs=0.07)
    assert float((batch.cond.label == 2).float().mean()) == pytest.approx(0.4, abs=0.07)
    assert batch.cond.text.dtype == torch.float32
    never = draws(LatentSource(VIEWS, captions, text_dropout=0.0), 0)
    assert torch.equal(never.cond.pooled, captions.text.pooled[0].float().expand(400, -1))
    assert never.cond.label is None


def test_without_conditions():
    batch = draws(LatentSource(VIEWS[:1]), 3, 2)
    assert (batch.x0 == 3).all()
    assert (batch.cond.text, batch.cond.label) == (None, None)


def test_equal_phrasings_share_rows(captions):
    assert captions.rows.tolist() == [[0, 1], [1, 3], [0, 1], [3, 4], [4, 5], [5, 6]]
    assert len(captions.text.tokens) == 7
    assert captions.text.tokens.dtype == torch.float16


def test_cut_captions_are_counted_in_one_line(tmp_path, capsys):
    encoder = EmbeddingCache(MiniLMEncoder(length=8), tmp_path)
    long = [f"a caption of {number} words and many more than eight" for number in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_captions([["short"], [long[0], long[1]], [long[2]]], encoder)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["smalti: the last words of 3 of 4 captions were cut: these are longer than text_length"]


def test_other_warnings_go_on():
    class Warning_:
        def encode(self, prompts):
            warnings.warn("something else", stacklevel=1)
            return MiniLMEncoder(length=8).encode(prompts)

    with pytest.warns(UserWarning, match="something else"):
        embed_captions([["a"]], Warning_())


def test_processes_other_than_the_first_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    embed_captions([["a caption that is far longer than eight tokens"]], MiniLMEncoder(length=8))
    assert not capsys.readouterr().err


def test_features_come_from_the_view_that_was_drawn(captions):
    features = {"teacher": [view.reshape(6, 1, 1).expand(6, 4, 2) * 10 for view in VIEWS]}
    source = LatentSource(VIEWS, captions, torch.zeros(6, dtype=torch.long), 2, features=features)
    batch = source.batch(torch.arange(6).repeat(20), generators_for(range(120)))
    assert torch.equal(batch.cond.extra["teacher"][:, 0, 0], batch.x0.flatten() * 10)
    assert len((batch.x0 // 100).unique()) == 3


def test_a_sample_is_drawn_from_its_posterior_anew_and_by_its_own_generator(captions):
    spread = [torch.full_like(view, 0.1) for view in VIEWS]
    labels = torch.zeros(6, dtype=torch.long)
    plain, drawn = LatentSource(VIEWS, captions, labels, 2), LatentSource(VIEWS, captions, labels, 2, deviations=spread)
    noise = draws(drawn, 3).x0 - draws(plain, 3).x0
    assert abs(float(noise.std()) - 0.1) < 0.02
    assert abs(float(noise.mean())) < 0.02
    assert torch.equal(draws(drawn, 3).cond.text, draws(plain, 3).cond.text)
    assert torch.equal(draws(drawn, 3, 5).x0, draws(drawn, 3, 400).x0[:5])
