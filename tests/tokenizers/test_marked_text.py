"""Marked text: parts do not know each other, and text without markers is read as always."""

import pytest
import torch

from smalti.core.errors import UserError
from smalti.tokenizers.marked_text import MarkedTextEncoder
from smalti.tokenizers.text_encoder import MiniLMEncoder

MARKERS = ("[LEFT]", "[RIGHT]")


@pytest.fixture(scope="module")
def encoder():
    return MarkedTextEncoder(MiniLMEncoder(length=12), MARKERS, 24)


def test_a_part_is_the_same_beside_any_other(encoder):
    one, other = encoder.encode(["[PAIR] [LEFT] an apple [RIGHT] a dog", "[PAIR] [LEFT] an apple [RIGHT] two cats"])[
        torch.arange(2)
    ].tokens
    left = int((encoder.encode(["[PAIR] [LEFT] an apple [RIGHT] a dog"]).segments == 0).sum())
    assert torch.equal(one[:left], other[:left])
    assert not torch.equal(one[left:], other[left:])
    alone = MiniLMEncoder(length=12).encode(["[LEFT] an apple"])
    assert torch.allclose(one[:left], alone.tokens[0, :left], atol=1e-4)


def test_segments_say_whose_tokens_are_and_the_pooled_vector_is_the_mean(encoder):
    found = encoder.encode(["[LEFT] an apple [RIGHT] a dog"])
    assert found.tokens.shape == (1, 24, 384)
    assert torch.equal(found.mask, found.segments >= 0)
    assert found.segments[0][found.mask[0]].unique().tolist() == [0, 1]
    parts = MiniLMEncoder(length=12).encode(["[LEFT] an apple", "[RIGHT] a dog"]).pooled
    assert torch.allclose(found.pooled[0], parts.mean(0), atol=1e-4)
    assert not found.tokens[0][~found.mask[0]].any()


def test_text_without_markers_is_one_part(encoder):
    assert encoder.parts("a dog") == ["a dog"]
    assert encoder.parts("[RIGHT] a [LEFT] b") == ["[RIGHT] a [LEFT] b"]
    plain = MiniLMEncoder(length=12).encode(["a dog", ""])
    found = encoder.encode(["a dog", ""])
    assert torch.allclose(found.tokens[:, :12], plain.tokens, atol=1e-4)
    assert torch.equal(found.mask[:, :12], plain.mask)
    assert torch.allclose(found.pooled, plain.pooled, atol=1e-4)


def test_mistakes_are_named(encoder):
    with pytest.raises(UserError, match="at least 2"):
        MarkedTextEncoder(MiniLMEncoder(length=12), ("[A]",), 24)
    with pytest.raises(UserError, match="at least one string"):
        encoder.encode([])


def test_segments_that_are_given_are_parts(encoder):
    given = encoder.encode([["[LEFT] an apple", "[RIGHT] a dog"]])
    assert torch.equal(given.tokens, encoder.encode(["[LEFT] an apple [RIGHT] a dog"]).tokens)
